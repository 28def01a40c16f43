"""What differs between sites, from their histograms on common edges: the pooled statistics up to a bound that is computed.

| symbol | here |
|---|---|
| C (K, F, B + 2) | cases of each site in each cell: below, B bins, above |
| N_b | cases of all sites in cell b |
| R_k | rank sum of site k, each case at the middle rank of its cell |
| D_k = sum_b C_kb (N_b - C_kb) / 2 | how far R_k can be from the true rank sum: the order inside cells is unknown |

Cases inside a cell are ties. What could be found by knowing their order is bounded for every feature: `RankTest.error`,
`ks_bounds`, `wasserstein`. Distances are of values cut at the outermost TRIM of all cases.

References:
    Kruskal, Wallis, "Use of Ranks in One-Criterion Variance Analysis", JASA 1952.
    Tomczak, Tomczak, "The need to report effect size estimates revisited", 2014 (eta squared of H).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import chi2

from nnunet_fedharm.differences.sketch import TRIM, Counts, Edges, quantile

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RankTest:
    """Kruskal-Wallis of every feature.

    Attributes:
        h: (F,) statistic, corrected for ties; NaN where fewer than two sites have the feature or it does not vary.
        p: (F,) from chi squared with sites - 1 degrees of freedom.
        effect: (F,) eta squared, (H - k + 1) / (n - k).
        error: (F,) largest possible difference of `effect` from that of the unbinned values.
    """

    h: Numbers
    p: Numbers
    effect: Numbers
    error: Numbers


def kruskal_wallis(counts: Counts) -> RankTest:
    """Test of each feature from counts (..., K, F, cells); leading axes are batches (bootstrap replicates)."""
    counts = np.asarray(counts, dtype=np.float64)
    middle = middle_ranks(counts.sum(-3))
    sizes, total = counts.sum(-1), counts.sum((-3, -1))
    sums = np.einsum("...kfb,...fb->...kf", counts, middle)
    return rank_test_from_sums(
        squares=_over(sums**2, sizes).sum(-2),
        slack=_slack(counts, sums, sizes, total),
        total=total,
        sites=(sizes > 0).sum(-2),
        tie=tie_correction(counts.sum(-3)),
    )


def rank_test_from_sums(
    *, squares: Numbers, slack: Numbers, total: Numbers, sites: npt.NDArray[Any], tie: Numbers
) -> RankTest:
    """The test from what are sums over sites, so that secure aggregation can do it too.

    Args:
        squares: (..., F) sum over sites of R_k^2 / n_k.
        slack: (..., F) sum over sites of (2 |R_k - n_k (N + 1) / 2| D_k + D_k^2) / n_k.
        total: (..., F) cases.
        sites: (..., F) sites that have the feature.
        tie: (..., F) tie correction of H.
    """
    usable = (sites > 1) & (tie > 0) & (total > sites)
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = 12 / (total * (total + 1))
        plain = np.maximum(factor * squares - 3 * (total + 1), 0.0)
        h = np.where(usable, plain / tie, np.nan)
        effect = (h - sites + 1) / (total - sites)
        error = (np.abs(h - plain) + factor * slack) / (total - sites)
    p = np.where(usable, chi2.sf(h, np.maximum(sites - 1, 1)), np.nan)
    return RankTest(h=h, p=p, effect=effect, error=np.minimum(error, 1.0))


def noisy_rank_test(counts: Counts, sigma: float, *, simulations: int, generator: np.random.Generator) -> RankTest:
    """Kruskal-Wallis of counts that carry normal noise, against sites that are alike under the same noise.

    Noise makes sites differ, so chi squared would call everything significant. Alike sites are simulated: cases drawn from the
    pooled counts, the noise added, negative counts set to zero, as in the data.

    Args:
        counts: (K, F, cells) with noise of standard deviation `sigma` on each.
        simulations: of alike sites.

    Returns:
        h of the counts, p of the simulations, effect with the simulations' mean H in the place of its expectation without
        noise; error is not known.
    """
    found = kruskal_wallis(np.maximum(counts, 0))
    sizes = np.rint(np.maximum(counts.sum(-1), 0)).astype(np.int64)
    pooled = np.maximum(counts.sum(0), 0)
    share = _over(pooled, pooled.sum(-1, keepdims=True) + 0 * pooled)
    share[:, 0] += pooled.sum(-1) == 0
    drawn = np.empty((simulations, counts.shape[1]))
    for index in range(simulations):
        alike = generator.multinomial(sizes, np.broadcast_to(share, counts.shape)) + generator.normal(
            0, sigma, counts.shape
        )
        drawn[index] = kruskal_wallis(np.maximum(alike, 0)).h
    known = np.isfinite(found.h)
    as_large = (np.nan_to_num(drawn, nan=0.0) >= np.nan_to_num(found.h, nan=np.inf)).sum(0)
    expected = np.nan_to_num(drawn, nan=0.0).mean(0)
    total, sites = np.maximum(counts, 0).sum((0, -1)), len(counts)
    return RankTest(
        h=found.h,
        p=np.where(known, (1 + as_large) / (1 + simulations), np.nan),
        effect=np.where(known, (found.h - expected) / np.maximum(total - sites, 1), np.nan),
        error=np.full(len(found.h), np.nan),
    )


def middle_ranks(pooled: Counts) -> Numbers:
    """(..., F, cells) middle rank of each cell's cases, from counts of all sites together."""
    return np.asarray(np.cumsum(pooled, axis=-1) - pooled + (pooled + 1) / 2)


def site_rank_sums(own: Counts, pooled: Counts) -> tuple[Numbers, Numbers]:
    """One site's shares of `squares` and `slack`, (F,) each, from its own and all sites' counts (F, cells)."""
    own, pooled = np.asarray(own, dtype=np.float64), np.asarray(pooled, dtype=np.float64)
    sums = (own * middle_ranks(pooled)).sum(-1)
    sizes, total = own.sum(-1), pooled.sum(-1)
    room = (own * (pooled - own)).sum(-1) / 2
    slack = _over(2 * np.abs(sums - sizes * (total + 1) / 2) * room + room**2, sizes)
    return _over(sums**2, sizes), slack


def _slack(counts: Counts, sums: Numbers, sizes: Numbers, total: Numbers) -> Numbers:
    room = (counts * (counts.sum(-3, keepdims=True) - counts)).sum(-1) / 2
    away = np.abs(sums - sizes * (total[..., None, :] + 1) / 2)
    return _over(2 * away * room + room**2, sizes).sum(-2)


def tie_correction(pooled: Counts) -> Numbers:
    """(..., F) 1 - sum (N_b^3 - N_b) / (N^3 - N) of counts (..., F, cells)."""
    total = pooled.sum(-1)
    return np.asarray(1 - _over((pooled**3 - pooled).sum(-1), total**3 - total))


def _over(numerator: Numbers, denominator: Numbers) -> Numbers:
    return np.divide(numerator, denominator, out=np.zeros(np.shape(numerator)), where=np.asarray(denominator) > 0)


def distribution(counts: Counts) -> Numbers:
    """(..., F, B + 1) share of the cases below each edge, of counts (..., F, B + 2)."""
    counts = np.asarray(counts, dtype=np.float64)
    return _over(np.cumsum(counts, axis=-1)[..., :-1], counts.sum(-1, keepdims=True) + 0 * counts[..., :-1])


def ks_bounds(first: Counts, second: Counts) -> tuple[Numbers, Numbers]:
    """Kolmogorov-Smirnov distance of two sites, (F,) each: at the edges, and the largest that the true one can be.

    Args:
        first, second: (F, B + 2) counts.
    """
    a, b = distribution(first), distribution(second)
    zero, one = np.zeros((len(a), 1)), np.ones((len(a), 1))
    left_a, left_b = np.hstack([zero, a]), np.hstack([zero, b])
    right_a, right_b = np.hstack([a, one]), np.hstack([b, one])
    inside = np.maximum(right_a - left_b, right_b - left_a).max(-1)
    return np.abs(a - b).max(-1), np.minimum(inside, 1.0)


@dataclass(frozen=True)
class Cut:
    """Where values are cut before distances, and the unit of distances.

    Attributes:
        low, high: (F,) the outermost TRIM of all cases, not beyond the outer edges.
        unit: (F,) standard deviation of the cut values; 0 where they do not vary.
    """

    low: Numbers
    high: Numbers
    unit: Numbers


def cut_of(pooled: Counts, edges: Edges) -> Cut:
    """Cut of pooled counts (F, B + 2) on edges (F, B + 1); cases are spread evenly inside a bin."""
    pooled = np.asarray(pooled, dtype=np.float64)
    whole = np.hstack([pooled, np.zeros((len(pooled), 1))])
    low, high = quantile(whole, edges, TRIM), quantile(whole, edges, 1 - TRIM)
    left, right = (
        np.clip(edges[:, :-1], low[:, None], high[:, None]),
        np.clip(edges[:, 1:], low[:, None], high[:, None]),
    )
    share = _over(pooled, pooled.sum(-1, keepdims=True) + 0 * pooled)
    width = np.diff(edges)
    inside = share[:, 1:-1] * _over(right - left, width)
    at_low = share[:, 0] + (share[:, 1:-1] * _over(np.maximum(left - edges[:, :-1], 0), width)).sum(-1)
    at_high = 1 - at_low - inside.sum(-1)
    centre = (left + right) / 2
    mean = at_low * low + at_high * high + (inside * centre).sum(-1)
    spread = inside * ((centre - mean[:, None]) ** 2 + (right - left) ** 2 / 12)
    variance = spread.sum(-1) + at_low * (low - mean) ** 2 + at_high * (high - mean) ** 2
    alone = (pooled > 0).sum(-1) <= 1
    return Cut(low, high, np.where(alone, 0.0, np.sqrt(np.maximum(variance, 0))))


def wasserstein(first: Counts, second: Counts, edges: Edges, cut: Cut) -> tuple[Numbers, Numbers]:
    """First Wasserstein distance of the cut values of two sites, (F,), and a bound of its error, both in `cut.unit`.

    Args:
        first, second: (F, B + 2) counts.
        edges: (F, B + 1).

    Returns:
        Both NaN where the feature does not vary or a site does not have it.
    """
    a, b = distribution(first), distribution(second)
    width = np.diff(edges)
    start = np.clip(_over(cut.low[:, None] - edges[:, :-1], width), 0, 1)
    end = np.clip(_over(cut.high[:, None] - edges[:, :-1], width), 0, 1)
    gap, slope = (a - b)[:, :-1], np.diff(a - b)
    left, right = gap + start * slope, gap + end * slope
    size = np.abs(left) + np.abs(right)
    area = np.where(left * right < 0, _over(left**2 + right**2, 2 * size), size / 2)
    unknown = np.diff(a) + np.diff(b)
    known = (cut.unit > 0) & (first.sum(-1) > 0) & (second.sum(-1) > 0)
    unit = np.where(known, cut.unit, np.nan)
    return (width * (end - start) * area).sum(-1) / unit, (width * (end - start) * unknown).sum(-1) / unit


def display_histogram(counts: Counts, edges: Edges, bins: int) -> tuple[Edges, Numbers]:
    """Histogram of one feature at all sites on equal bins, for a picture.

    Args:
        counts: (K, B + 2) of one feature.
        edges: (B + 1,).

    Returns:
        (bins + 1,) edges and (K, bins) shares; cases beyond the outer edges are in the outermost bins.
    """
    plain = np.linspace(edges[0], edges[-1], bins + 1)
    below: Any = distribution(counts)
    summed = np.stack([np.interp(plain, edges, row) for row in below])
    summed[:, 0], summed[:, -1] = 0.0, np.where(counts.sum(-1) > 0, 1.0, 0.0)
    return plain, np.diff(summed)
