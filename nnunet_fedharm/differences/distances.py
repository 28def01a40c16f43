"""How far apart are two sites? Kolmogorov-Smirnov and Wasserstein distances of each feature, resampled by patient.

| symbol | meaning |
|---|---|
| F, G | distribution functions of a feature at two sites |
| KS | max over x of abs(F(x) - G(x)), in [0, 1] |
| W | integral over x of abs(F(x) - G(x)), in standard deviations of the feature over all sites together |

One scale for all pairs makes W a metric between sites. Before W, values are cut at the outermost half percent of all sites:
one volume with a thousandfold value would set the scale of everything else. Both distances are above 0 for two samples of
one distribution; what is more than chance is for the rank tests and the kernel test to say.

References:
    Smirnov, "Table for estimating the goodness of fit of empirical distributions", Ann. Math. Stat. 1948.
    Vallender, "Calculation of the Wasserstein distance between probability distributions on the line", 1974.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from nnunet_fedharm.differences.findings import PairFinding
from nnunet_fedharm.differences.panel import Panel, judged
from nnunet_fedharm.differences.ranks import centred_interval, median_over
from nnunet_fedharm.differences.sketch import TRIM

Vector = npt.NDArray[np.float64]
Weights = npt.NDArray[np.float64]

TOP = 10
"""Features that a pair of sites lists."""


def scaled(values: Vector, *, trim: float = TRIM) -> Vector:
    """(n, F) values cut at the outermost shares of each feature and divided by its standard deviation over all rows.

    NaN for a feature that does not vary.
    """
    known = np.isfinite(values).any(0)
    cut = np.full(values.shape, np.nan)
    if known.any():
        low, high = np.nanquantile(values[:, known], [trim, 1 - trim], axis=0)
        cut[:, known] = np.clip(values[:, known], low, high)
        deviation = np.nanstd(cut[:, known], axis=0)
        size = np.nanmax(np.abs(cut[:, known]), axis=0)
        flat = deviation <= 1e-12 * size
        cut[:, known] /= np.where(flat, np.nan, deviation)
    return cut


def distances(column: Vector, second: npt.NDArray[np.bool_], weights: Weights) -> tuple[Vector, Vector]:
    """Both distances of one feature between two sites, with row i counted weights[:, i] times.

    Args:
        column: (n,) values of both sites; rows with NaN do not count.
        second: (n,) whether a row is of the second site.
        weights: (B, n).

    Returns:
        KS and W, (B,) each, W in the units of `column`; NaN where a site has no value that counts.
    """
    rows = np.flatnonzero(np.isfinite(column))
    rows = rows[np.argsort(column[rows], kind="stable")]
    values, weight = column[rows], weights[:, rows]
    there = second[rows]
    sizes = (weight * ~there).sum(1), (weight * there).sum(1)
    usable = (sizes[0] > 0) & (sizes[1] > 0)
    if len(rows) < 2 or not usable.any():
        nothing = np.full(len(weights), np.nan)
        return nothing, nothing
    signed = weight * np.where(there, -1.0, 1.0)
    signed /= np.where(there, np.where(usable, sizes[1], 1)[:, None], np.where(usable, sizes[0], 1)[:, None])
    gap = np.abs(np.cumsum(signed, axis=1))[:, :-1]
    steps = np.diff(values)
    ks = np.max(gap * (steps > 0), axis=1)
    return np.where(usable, ks, np.nan), np.where(usable, gap @ steps, np.nan)


def pair_findings(panel: Panel, weights: Weights) -> Iterator[PairFinding]:
    """Distances between each two sites, without the kernel test.

    Args:
        panel: one row per patient and site.
        weights: (B, n) of `resample_patients`.
    """
    values = scaled(panel.values)
    for first in range(len(panel.sites)):
        for second in range(first + 1, len(panel.sites)):
            yield _pair(panel, values, weights, first, second)


def _pair(panel: Panel, values: Vector, weights: Weights, first: int, second: int) -> PairFinding:
    rows = np.isin(panel.codes, (first, second))
    there = panel.codes[rows] == second
    drawn = np.concatenate([np.ones((1, int(rows.sum()))), weights[:, rows]])
    found = np.array([distances(column, there, drawn) for column in values[rows].T])
    ks, wasserstein = found[:, 0].T, found[:, 1].T
    counted = judged(panel.names)
    middle = [median_over(each[:, counted]) for each in (ks, wasserstein)]
    return PairFinding(
        first=panel.sites[first],
        second=panel.sites[second],
        ks=centred_interval(middle[0][0], middle[0][1:], least=0.0, most=1.0),
        wasserstein=centred_interval(middle[1][0], middle[1][1:], least=0.0),
        by_family=_by_family(panel, wasserstein[0]),
        features=_largest(panel.names, wasserstein[0]),
    )


def _by_family(panel: Panel, distance: Vector) -> dict[str, float]:
    medians = {name: float(median_over(distance[panel.families == name])) for name in dict.fromkeys(panel.families)}
    return {str(name): value for name, value in medians.items() if np.isfinite(value)}


def _largest(names: Sequence[str], distance: Vector) -> list[tuple[str, float]]:
    known = [index for index in range(len(names)) if np.isfinite(distance[index])]
    order = sorted(known, key=lambda index: (-distance[index], names[index]))
    return [(names[index], float(distance[index])) for index in order[:TOP]]
