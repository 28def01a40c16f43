"""Kruskal-Wallis of every feature with its effect size, and intervals by resampling patients.

| symbol | meaning |
|---|---|
| n, k | volumes that have the feature, sites that have such volumes |
| R_j, n_j | rank sum and volumes of site j; ties share their middle rank |
| H | (12 / (n (n + 1)) sum R_j^2 / n_j - 3 (n + 1)) / (1 - sum (t^3 - t) / (n^3 - n)), t volumes per tie |
| eta^2 | (H - k + 1) / (n - k): the share of the variance of ranks that sites explain, unbiased, so below 0 by chance |

A bootstrap draw differs from the data as the data differ from the truth, so draws of a distance are too large by about as
much as the estimate is. `centred_interval` takes that out; plain percentiles would leave out the estimate itself where
sites are alike.

References:
    Kruskal, Wallis, "Use of ranks in one-criterion variance analysis", JASA 1952.
    Tomczak, Tomczak, "The need to report effect size estimates revisited", Trends in Sport Sciences 2014.
    Benjamini, Hochberg, "Controlling the false discovery rate", JRSS B 1995.
    Efron, Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 10 (bias) and 13 (intervals).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from nnunet_fedharm.differences.findings import Estimate

Vector = npt.NDArray[np.float64]
Codes = npt.NDArray[np.intp]
Weights = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RankTests:
    """Kruskal-Wallis of F features.

    Attributes:
        p, q: (F,), q after Benjamini-Hochberg over all that have a p; NaN where the feature is constant, or at one site.
        effect: (F,) eta squared of ranks.
        draws: (B, F) the same of each bootstrap draw.
        n: (F,) volumes that have the feature.
    """

    p: Vector
    q: Vector
    effect: Vector
    draws: Weights
    n: Codes


def rank_tests(values: Vector, codes: Codes, weights: Weights) -> RankTests:
    """Tests of every feature.

    Args:
        values: (n, F); NaN where a feature is missing.
        codes: (n,) site of each row, from 0.
        weights: (B, n) how often each row is drawn, of `resample_patients`; (0, n) for no intervals.
    """
    features, once = values.shape[1], np.ones((1, len(values)))
    p, effect, draws = np.full(features, np.nan), np.full(features, np.nan), np.full((len(weights), features), np.nan)
    for feature, column in enumerate(values.T):
        p[feature] = _kruskal_p(column, codes)
        if np.isfinite(p[feature]):
            effect[feature] = eta_squared(column, codes, once)[0]
            draws[:, feature] = eta_squared(column, codes, weights)
    return RankTests(p, false_discovery(p), effect, draws, np.isfinite(values).sum(0))


def _kruskal_p(column: Vector, codes: Codes) -> float:
    finite = np.isfinite(column)
    groups = [column[finite & (codes == code)] for code in np.unique(codes[finite])]
    if len(groups) < 2 or np.ptp(column[finite]) == 0 or finite.sum() <= len(groups):
        return float("nan")
    return float(stats.kruskal(*groups).pvalue)


def eta_squared(column: Vector, codes: Codes, weights: Weights) -> Vector:
    """(B,) eta squared of ranks of one feature with row i counted weights[:, i] times.

    Args:
        column: (n,); rows with NaN do not count.
        codes: (n,) site of each row, from 0.
        weights: (B, n), whole numbers.

    Returns:
        (B,); NaN where all that counts is equal, or at one site.
    """
    rows = np.flatnonzero(np.isfinite(column))
    rows = rows[np.argsort(column[rows], kind="stable")]
    if not len(rows):
        return np.full(len(weights), np.nan)
    values, weight = column[rows], weights[:, rows]
    starts = np.flatnonzero(np.r_[True, np.diff(values) > 0])
    tied = np.add.reduceat(weight, starts, axis=1)
    below = np.cumsum(tied, axis=1) - tied
    group = np.cumsum(np.r_[False, np.diff(values) > 0])
    middle = (below + (tied + 1) / 2)[:, group]
    belongs = np.eye(int(codes.max()) + 1)[codes[rows]]
    n, size, rank_sum = weight.sum(1), weight @ belongs, (weight * middle) @ belongs
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(size > 0, rank_sum**2 / size, 0.0).sum(1)
        correction = 1 - (tied**3 - tied).sum(1) / (n**3 - n)
        h = (12 / (n * (n + 1)) * share - 3 * (n + 1)) / correction
        sites = (size > 0).sum(1)
        effect = (h - sites + 1) / (n - sites)
    effect[(correction <= 1e-12) | (sites < 2) | (n <= sites)] = np.nan
    return effect


def false_discovery(p: Vector) -> Vector:
    """(F,) Benjamini-Hochberg q; NaN stays NaN and does not count."""
    q = np.full(len(p), np.nan)
    known = np.isfinite(p)
    if known.any():
        q[known] = stats.false_discovery_control(p[known])
    return q


def centred_interval(
    value: float, draws: npt.NDArray[Any], *, least: float = -np.inf, most: float = np.inf
) -> Estimate:
    """Estimate with the percentiles of its bootstrap draws, moved by the mean difference between draws and estimate.

    Args:
        value: of the data.
        draws: (B,); what is not finite does not count.
        least, most: bounds of what the quantity can be.
    """
    known = draws[np.isfinite(draws)]
    if not np.isfinite(value):
        return Estimate(None)
    if len(known) < 2:
        return Estimate(float(value))
    low, high = np.percentile(known, [2.5, 97.5]) - (known.mean() - value)
    return Estimate(float(value), float(np.clip(low, least, most)), float(np.clip(high, least, most)))


def median_over(values: npt.NDArray[Any]) -> Any:
    """(...) median over the last axis of what is finite; NaN where nothing is."""
    known = np.where(np.isfinite(values), values, np.nan)
    filled = np.concatenate([known, np.full((*known.shape[:-1], 1), np.nan)], axis=-1)
    ordered = np.sort(filled, axis=-1)
    count = np.isfinite(ordered).sum(-1, keepdims=True)
    low, high = (np.take_along_axis(ordered, np.maximum(index, 0), axis=-1) for index in ((count - 1) // 2, count // 2))
    return np.where(count > 0, (low + high) / 2, np.nan)[..., 0]
