"""Cases unlike the others of their own site.

Some feature of nearly every case deviates, since features are many and skewed. So a case is listed only if it deviates in at
least one feature in twenty, and in many more than the other cases of its site do.

References:
    Iglewicz, Hoaglin, "How to detect and handle outliers", 1993 (|z| > 3.5 from median and MAD).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nnunet_fedharm.differences.findings import OutlierFinding
from nnunet_fedharm.differences.options import StatisticsOptions
from nnunet_fedharm.differences.panel import Panel

Table = npt.NDArray[np.float64]

NORMAL = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""
SHARE = 0.05
"""Share of a case's features that has to deviate."""
_FLOOR = 0.02
"""Share of features below which the spread of cases' numbers of deviating features is not taken seriously."""
LISTED = 3
"""Features that a case lists."""


def robust_z(values: Table) -> Table:
    """(n, F) of (n, F): (x - median) / (1.4826 MAD) of each column; NaN where more than half of the column is one value."""
    known = np.isfinite(values).any(0)
    z = np.full(values.shape, np.nan)
    shifted = values[:, known] - np.nanmedian(values[:, known], axis=0)
    spread = NORMAL * np.nanmedian(np.abs(shifted), axis=0)
    size = np.nanmax(np.abs(values[:, known]), axis=0) if known.any() else spread
    z[:, known] = shifted / np.where(spread > 1e-12 * size, spread, np.nan)
    return z


def outliers(panel: Panel, options: StatisticsOptions) -> list[OutlierFinding]:
    """Cases that deviate in many features, the largest deviation first; sites with too few cases are not judged."""
    found = []
    for code, site in enumerate(panel.sites):
        rows = np.flatnonzero(panel.codes == code)
        if len(rows) < options.outlier_cases:
            continue
        scores = robust_z(panel.values[rows])
        for index in np.flatnonzero(_unlike(scores, options.outlier)):
            found.append(_finding(site, panel.cases[rows[index]], scores[index], panel.names))
    return sorted(found, key=lambda finding: (-finding.score, finding.site, finding.case))


def _unlike(scores: Table, bound: float) -> npt.NDArray[np.bool_]:
    """(n,) cases of one site whose share of deviating features is large, and an outlier among these shares."""
    known = np.isfinite(scores)
    deviates = known & (np.abs(np.where(known, scores, 0.0)) >= bound)
    share = deviates.sum(1) / np.maximum(known.sum(1), 1)
    middle = np.median(share)
    spread = max(NORMAL * float(np.median(np.abs(share - middle))), _FLOOR)
    return np.asarray((share >= SHARE) & (share - middle >= bound * spread), dtype=bool)


def _finding(site: str, case: str, score: npt.NDArray[np.float64], names: tuple[str, ...]) -> OutlierFinding:
    size = np.where(np.isfinite(score), np.abs(score), -1.0)
    order = sorted(range(len(names)), key=lambda index: (-size[index], names[index]))[:LISTED]
    features = [(names[index], float(score[index])) for index in order if size[index] >= 0]
    return OutlierFinding(site, case, float(size.max()), features)
