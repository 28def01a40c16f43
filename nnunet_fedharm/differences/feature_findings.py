"""Every feature and every family of features as the report shows them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nnunet_fedharm.differences.findings import Estimate, FeatureFinding
from nnunet_fedharm.differences.options import SIGNIFICANT
from nnunet_fedharm.differences.panel import Panel
from nnunet_fedharm.differences.ranks import RankTests, centred_interval, median_over

Vector = npt.NDArray[np.float64]

_TAIL = 0.01
"""Share of volumes at each end that the outermost bins take in, so that one outlier does not empty all others."""


def feature_findings(panel: Panel, tests: RankTests, *, bins: int) -> list[FeatureFinding]:
    """Tests, medians and histograms, in the panel's order of features."""
    return [_feature(panel, tests, index, bins) for index in range(len(panel.names))]


def _feature(panel: Panel, tests: RankTests, index: int, bins: int) -> FeatureFinding:
    column = panel.values[:, index]
    by_site = {site: column[(panel.codes == code) & np.isfinite(column)] for code, site in enumerate(panel.sites)}
    present = {site: own for site, own in by_site.items() if len(own)}
    edges = common_edges(column[np.isfinite(column)], bins)
    return FeatureFinding(
        name=panel.names[index],
        family=str(panel.families[index]),
        p=_number(tests.p[index]),
        q=_number(tests.q[index]),
        effect=centred_interval(float(tests.effect[index]), tests.draws[:, index], most=1.0),
        medians={site: float(np.median(own)) for site, own in present.items()},
        n=int(tests.n[index]),
        edges=edges.tolist(),
        histogram={site: shares(own, edges).tolist() for site, own in present.items()} if len(edges) else {},
    )


def common_edges(values: Vector, bins: int) -> Vector:
    """(bins + 1,) equally spaced edges over the middle of all sites' values; empty without values."""
    if not len(values):
        return np.zeros(0)
    low, high = np.quantile(values, [_TAIL, 1 - _TAIL])
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        low, high = values.min(), values.max()
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        half = 0.5 * max(abs(low), 1.0)
        low, high = low - half, high + half
    return np.linspace(low, high, bins + 1)


def shares(values: Vector, edges: Vector) -> Vector:
    """(bins,) share of the values in each bin; those beyond the edges are in the outermost bins."""
    counts = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]
    found: Vector = counts / len(values)
    return found


def family_effects(panel: Panel, tests: RankTests) -> dict[str, Estimate]:
    """Family -> median eta squared over its features that were tested."""
    found = {}
    for family in dict.fromkeys(panel.families.tolist()):
        keep = (panel.families == family) & np.isfinite(tests.effect)
        if keep.any():
            found[str(family)] = centred_interval(
                float(median_over(tests.effect[keep])), median_over(tests.draws[:, keep]), most=1.0
            )
    return found


def family_shares(panel: Panel, tests: RankTests) -> dict[str, float]:
    """Family -> share of its tested features with q < .05."""
    found = {}
    for family in dict.fromkeys(panel.families.tolist()):
        keep = (panel.families == family) & np.isfinite(tests.q)
        if keep.any():
            found[str(family)] = float((tests.q[keep] < SIGNIFICANT).mean())
    return found


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
