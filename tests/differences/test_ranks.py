"""Rank tests are scipy's; the weighted form is the form of repeated rows; intervals cover, false alarms are rare."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from nnunet_fedharm.differences.cross_validation import resample_patients
from nnunet_fedharm.differences.ranks import centred_interval, eta_squared, false_discovery, median_over, rank_tests


def test_eta_squared_by_hand() -> None:
    """Ranks 1 2 3 | 4 5 6: H = 12 / 42 (36 / 3 + 225 / 3) - 21 = 3.857; (H - 1) / 4."""
    found = eta_squared(np.array([1.0, 2, 3, 10, 11, 12]), np.array([0, 0, 0, 1, 1, 1]), np.ones((1, 6)))
    assert found[0] == pytest.approx((12 / 42 * (36 / 3 + 225 / 3) - 21 - 1) / 4)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), ties=st.booleans(), missing=st.booleans())
def test_weights_mean_repeated_rows_and_the_statistic_is_that_of_scipy(seed: int, ties: bool, missing: bool) -> None:
    generator = np.random.default_rng(seed)
    codes = np.sort(generator.integers(0, 3, 30))
    codes[:3] = [0, 1, 2]
    values = generator.normal(size=30) + codes * 0.3
    values = np.round(values, 0) if ties else values
    values[3:][generator.random(27) < 0.2 * missing] = np.nan
    weights = generator.integers(0, 3, (4, 30)).astype(float)
    weights[:, :3] = 1
    found = eta_squared(values, codes, weights)
    for row, effect in zip(weights.astype(int), found, strict=True):
        drawn, sites = np.repeat(values, row), np.repeat(codes, row)
        groups = [drawn[(sites == site) & np.isfinite(drawn)] for site in range(3)]
        if np.ptp(np.concatenate(groups)) == 0:
            assert np.isnan(effect)
            continue
        h, n = stats.kruskal(*groups).statistic, sum(map(len, groups))
        assert effect == pytest.approx((h - 3 + 1) / (n - 3), abs=1e-10)


def test_p_values_are_those_of_scipy_and_q_is_benjamini_hochberg() -> None:
    generator = np.random.default_rng(0)
    codes = np.repeat([0, 1, 2], 12)
    values = generator.normal(size=(36, 5)) + codes[:, None] * [0, 0.2, 0.5, 1, 0]
    values[:, 4] = 7.0
    found = rank_tests(values, codes, np.zeros((0, 36)))
    expected = [stats.kruskal(*(values[codes == c, f] for c in range(3))).pvalue for f in range(4)]
    np.testing.assert_allclose(found.p[:4], expected)
    np.testing.assert_allclose(found.q[:4], stats.false_discovery_control(expected))
    assert np.isnan([found.p[4], found.q[4], found.effect[4]]).all()
    assert found.draws.shape == (0, 5)


def test_a_site_with_one_volume_or_a_feature_at_one_site_only_is_no_error() -> None:
    values = np.array([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0], [9.0, np.nan]])
    found = rank_tests(values, np.array([0, 0, 0, 1]), np.ones((2, 4)))
    assert np.isfinite(found.p[0])
    assert np.isnan(found.p[1])
    assert found.n.tolist() == [4, 3]
    assert np.isnan(rank_tests(np.zeros((0, 1)), np.zeros(0, dtype=int), np.zeros((2, 0))).p[0])


@pytest.mark.parametrize(("shift", "truth"), [(0.0, 0.0), (1.5, 0.3355)])
def test_intervals_cover_the_true_effect(shift: float, truth: float) -> None:
    """The truth for 1.5 standard deviations is that of 2 x 200000 volumes."""
    generator = np.random.default_rng(5)
    codes = np.repeat([0, 1], 25)
    hits = 0
    for _ in range(100):
        column = generator.normal(size=50) + shift * codes
        weights = resample_patients(codes, np.arange(50), 200, generator)
        found = centred_interval(
            float(eta_squared(column, codes, np.ones((1, 50)))[0]), eta_squared(column, codes, weights)
        )
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= truth <= found.high
    assert hits >= 88


def test_without_differences_few_features_pass_the_false_discovery_level() -> None:
    generator = np.random.default_rng(0)
    codes = np.repeat([0, 1, 2], [20, 15, 10])
    alarms = [
        (rank_tests(generator.normal(size=(45, 40)), codes, np.zeros((0, 45))).q < 0.05).any() for _ in range(100)
    ]
    assert np.mean(alarms) <= 0.1


def test_helpers_say_nan_where_nothing_is() -> None:
    assert np.isnan(false_discovery(np.array([np.nan]))).all()
    np.testing.assert_array_equal(median_over(np.array([[1.0, np.nan, 3.0, 8.0], [np.nan] * 4])), [3.0, np.nan])
    assert median_over(np.array([4.0, 1.0])) == 2.5
    assert np.isnan(median_over(np.zeros(0)))
    assert centred_interval(float("nan"), np.ones(3)).value is None
    assert centred_interval(1.0, np.ones(0)).low is None
    bounded = centred_interval(0.9, np.array([0.5, 1.5]), least=0.0, most=1.0)
    assert (bounded.low, bounded.high) == (pytest.approx(0.425), 1.0)
