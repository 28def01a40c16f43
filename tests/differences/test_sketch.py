"""Statistics from sketches against the same statistics of the pooled values."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from nnunet_fedharm.differences import sketch
from nnunet_fedharm.differences.sketch_statistics import (
    cut_of,
    display_histogram,
    kruskal_wallis,
    ks_bounds,
    rank_test_from_sums,
    site_rank_sums,
    tie_correction,
    wasserstein,
)
from nnunet_fedharm.errors import ShapeError

Table = npt.NDArray[np.float64]

KINDS = ("normal", "skewed", "offset", "outlier", "atoms", "large", "tiny", "constant")
BINS = 64


def site_values(generator: np.random.Generator, n: int, shift: float) -> Table:
    """Features as they occur: skewed, with an offset a hundred thousand times the spread, with one absurd value, discrete."""
    draw = generator.normal(shift, 1, size=(n, len(KINDS)))
    draw[:, 1] = np.exp(1.5 * draw[:, 1])
    draw[:, 2] = 0.9995 + 1e-5 * draw[:, 2]
    draw[0, 3] = 1e6
    draw[:, 4] = np.round(draw[:, 4])
    draw[:, 5] = 1e9 * (5 + draw[:, 5])
    draw[:, 6] = 1e-4 * draw[:, 6]
    draw[:, 7] = 3.0
    return draw


def sites(seed: int = 0, shift: float = 0.7, sizes: tuple[int, ...] = (60, 45, 30)) -> list[Table]:
    generator = np.random.default_rng(seed)
    return [site_values(generator, n, shift * index) for index, n in enumerate(sizes)]


def final_counts(tables: list[Table]) -> tuple[npt.NDArray[Any], sketch.Edges]:
    """The exchanges of a federation: locate, zoom, zoom, final."""
    low, high = sketch.located_range(np.sum([sketch.locate(table) for table in tables], axis=0))
    for _ in range(2):
        edges = sketch.equal_edges(low, high, BINS)
        pooled = np.sum([sketch.count_bins(table, edges) for table in tables], axis=0)
        low, high = sketch.zoomed_range(pooled, edges)
    edges = sketch.final_edges(pooled, edges, BINS)
    return np.stack([sketch.count_bins(table, edges)[:, :-1] for table in tables]), edges


def test_sketches_of_sites_add_up_to_the_sketch_of_all_cases() -> None:
    tables = sites()
    pooled = np.concatenate(tables)
    np.testing.assert_array_equal(sum(map(sketch.locate, tables)), sketch.locate(pooled))
    edges = sketch.equal_edges(np.full(8, -3.0), np.full(8, 3.0), 10)
    whole = sketch.count_bins(pooled, edges)
    np.testing.assert_array_equal(sum(sketch.count_bins(table, edges) for table in tables), whole)
    np.testing.assert_array_equal(whole.sum(1), len(pooled), "every case counts once")


def test_missing_and_extreme_values_have_cells_of_their_own() -> None:
    values = np.array([[np.nan], [np.inf], [0.0], [1e300], [-1e300], [1e-300]])
    counts = sketch.locate(values)[0]
    assert counts[-1] == 2
    assert counts[sketch.LOCATE_CELLS // 2] == 2, "zero and what is as good as zero"
    assert counts[0] == counts[-2] == 1
    histogram = sketch.count_bins(values, np.array([[-1.0, 0.0, 1.0]]))[0]
    np.testing.assert_array_equal(histogram, [1, 0, 2, 1, 2])


@settings(max_examples=30, deadline=None)
@given(exponent=st.integers(-18, 38), sign=st.sampled_from([-1, 1]), seed=st.integers(0, 99))
def test_a_range_holds_nearly_all_cases_and_is_not_much_wider(exponent: int, sign: int, seed: int) -> None:
    values = sign * 2.0**exponent * (1 + np.random.default_rng(seed).uniform(size=(200, 1)))
    low, high = sketch.located_range(sketch.locate(values))
    assert ((values >= low) & (values <= high)).mean() >= 0.98
    assert high - low < 2 * (values.max() - values.min())


def test_an_absurd_value_does_not_stretch_the_grid() -> None:
    _, edges = final_counts(sites())
    assert edges[KINDS.index("outlier"), -1] < 10


def test_every_feature_that_varies_is_resolved() -> None:
    tables = sites()
    counts, _ = final_counts(tables)
    whole = np.concatenate([counts.sum(0), np.zeros((len(KINDS), 1))], axis=1)
    resolved = dict(zip(KINDS, sketch.is_resolved(whole), strict=True))
    assert {name for name, good in resolved.items() if not good} <= {"constant", "atoms"}


def test_medians_lie_within_a_bin_of_the_pooled_ones() -> None:
    tables = sites()
    counts, edges = final_counts(tables)
    for index, table in enumerate(tables):
        whole = np.concatenate([counts[index], np.zeros((len(KINDS), 1))], axis=1)
        found = sketch.quantile(whole, edges, 0.5)
        exact = np.median(table, axis=0)
        width = np.array(
            [np.diff(own)[max(0, np.searchsorted(own, x) - 1)] for own, x in zip(edges, exact, strict=True)]
        )
        assert (np.abs(found - exact) <= 2 * width + 1e-12).all()


@pytest.mark.parametrize("shift", [0.0, 0.3, 1.0])
def test_kruskal_wallis_agrees_with_scipy_within_the_stated_error(shift: float) -> None:
    tables = sites(shift=shift)
    counts, _ = final_counts(tables)
    test = kruskal_wallis(counts)
    n, k = sum(map(len, tables)), len(tables)
    for feature in range(len(KINDS) - 1):
        exact = stats.kruskal(*(table[:, feature] for table in tables))
        effect = (exact.statistic - k + 1) / (n - k)
        assert abs(test.effect[feature] - effect) <= test.error[feature] + 1e-9, KINDS[feature]
        assert abs(test.effect[feature] - effect) < 0.02, KINDS[feature]
    assert np.isnan(test.p[-1]), "a constant has no test"


def test_kruskal_wallis_of_discrete_values_is_exact() -> None:
    generator = np.random.default_rng(1)
    tables = [generator.integers(0, 6, size=(n, 1)).astype(float) for n in (20, 25, 31)]
    edges = np.arange(-0.5, 7)[None]
    counts = np.stack([sketch.count_bins(table, edges)[:, :-1] for table in tables])
    exact = stats.kruskal(*(table[:, 0] for table in tables))
    test = kruskal_wallis(counts)
    assert test.h[0] == pytest.approx(exact.statistic, rel=1e-12)
    assert test.p[0] == pytest.approx(exact.pvalue, rel=1e-10)


def test_the_rank_test_needs_nothing_but_sums_over_sites() -> None:
    counts, _ = final_counts(sites())
    pooled = counts.sum(0)
    shares = [site_rank_sums(own, pooled) for own in counts]
    found = rank_test_from_sums(
        squares=sum(share[0] for share in shares),
        slack=sum(share[1] for share in shares),
        total=pooled.sum(-1),
        sites=sum(own.sum(-1) > 0 for own in counts),
        tie=tie_correction(pooled),
    )
    np.testing.assert_allclose(found.h, kruskal_wallis(counts).h)
    np.testing.assert_allclose(found.error, kruskal_wallis(counts).error)


@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_distances_agree_with_scipy_within_the_stated_error(shift: float) -> None:
    tables = sites(shift=shift)
    counts, edges = final_counts(tables)
    low, high = ks_bounds(counts[0], counts[1])
    cut = cut_of(counts.sum(0), edges)
    found, error = wasserstein(counts[0], counts[1], edges, cut)
    for feature in range(len(KINDS) - 1):
        a, b = tables[0][:, feature], tables[1][:, feature]
        exact = stats.ks_2samp(a, b).statistic
        assert low[feature] - 1e-12 <= exact <= high[feature] + 1e-12, KINDS[feature]
        true = stats.wasserstein_distance(*(np.clip(x, cut.low[feature], cut.high[feature]) for x in (a, b)))
        true /= cut.unit[feature]
        assert abs(found[feature] - true) <= error[feature] * (1 + 1e-9) + 1e-15, KINDS[feature]
        assert abs(found[feature] - true) < 0.05, KINDS[feature]
    assert np.isnan(found[-1]), "a constant has no distance"


def test_values_are_cut_where_the_pooled_ones_would_be() -> None:
    tables = sites()
    counts, edges = final_counts(tables)
    cut = cut_of(counts.sum(0), edges)
    pooled = np.clip(np.concatenate(tables), cut.low, cut.high)
    np.testing.assert_allclose(cut.unit[:-1], pooled.std(0)[:-1], rtol=0.02)
    assert cut.unit[-1] == 0


def test_a_picture_of_a_histogram_keeps_every_case() -> None:
    counts, edges = final_counts(sites())
    for feature in range(len(KINDS)):
        plain, shares = display_histogram(counts[:, feature], edges[feature], 20)
        assert plain.shape == (21,)
        np.testing.assert_allclose(shares.sum(1), 1)
        assert (shares >= 0).all()


def test_standardised_values_are_cut_and_constants_are_calm() -> None:
    tables = sites()
    counts, edges = final_counts(tables)
    standard = sketch.standard_of(np.concatenate([counts.sum(0), np.zeros((len(KINDS), 1))], axis=1), edges)
    found = standard.apply(np.concatenate(tables))
    assert np.abs(found).max() <= sketch.WINSOR
    assert np.ptp(found[:, -1]) == 0
    assert 0.5 < found[:, 0].std() < 1.5


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ShapeError, match="do not have the same features"):
        sketch.count_bins(np.zeros((3, 2)), np.zeros((3, 4)))
    with pytest.raises(ShapeError, match="needs a table"):
        sketch.locate(np.zeros(3))
