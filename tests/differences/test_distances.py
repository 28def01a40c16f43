"""Distances are scipy's, in the stated units; the kernel test finds what is there and no more."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics.pairwise import rbf_kernel

from nnunet_fedharm.differences.distances import distances, pair_findings, scaled
from nnunet_fedharm.differences.kernel import discrepancy, kernel_matrix, kernel_test
from nnunet_fedharm.differences.panel import panel_of
from tests.differences.tables import feature_table, panel


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), ties=st.booleans())
def test_distances_are_those_of_scipy_whatever_the_ties_and_weights(seed: int, ties: bool) -> None:
    generator = np.random.default_rng(seed)
    column = generator.normal(size=20)
    column = np.round(column) if ties else column
    column[4] = np.nan
    second = np.arange(20) >= 9
    weights = np.vstack([np.ones(20), generator.integers(0, 3, 20)])
    weights[1, [0, 19]] = 1
    ks, wasserstein = distances(column, second, weights)
    for index, row in enumerate(weights.astype(int)):
        a, b = (
            np.repeat(column[keep & np.isfinite(column)], row[keep & np.isfinite(column)]) for keep in (~second, second)
        )
        assert ks[index] == pytest.approx(stats.ks_2samp(a, b).statistic)
        assert wasserstein[index] == pytest.approx(stats.wasserstein_distance(a, b))


def test_a_shift_by_two_deviations_is_found_in_these_units() -> None:
    """Two sites of equal size, shifted by d within-deviations: W = d / sqrt(1 + d^2 / 4) of the deviation over both."""
    found = next(pair_findings(panel({"A": 800, "B": 800}, shift={"B": 2.0}, names=("glcm_a",)), np.zeros((0, 1600))))
    inside = panel({"A": 800, "B": 800}, names=("glcm_a",)).values.std()
    d = 2.0 / inside
    assert found.wasserstein.value == pytest.approx(d / np.sqrt(1 + d**2 / 4), rel=0.05)
    assert found.ks.value == pytest.approx(2 * stats.norm.cdf(d / 2) - 1, abs=0.04)


def test_a_single_wild_volume_does_not_set_the_scale() -> None:
    values = np.random.default_rng(0).normal(size=(400, 1))
    wild = values.copy()
    wild[7] = 1e9
    inner = np.flatnonzero(np.abs(values[:, 0]) < 2)
    np.testing.assert_allclose(scaled(wild)[inner[inner > 7]], scaled(values)[inner[inner > 7]], rtol=0.02)
    assert scaled(wild)[7] < 4


def test_pairs_are_ranked_and_control_features_stay_out_of_the_median() -> None:
    table = feature_table({"A": 20, "B": 20, "C": 20}, shift={"C": 3.0}, families=("shape",))
    weights = np.ones((1, 60))
    ab, ac, bc = pair_findings(panel_of(table), weights)
    assert [(pair.first, pair.second) for pair in (ab, ac, bc)] == [("A", "B"), ("A", "C"), ("B", "C")]
    assert ac.by_family["shape"] > 2 * ac.by_family["texture"]
    assert ac.wasserstein.value == pytest.approx(ab.wasserstein.value, abs=0.2)
    assert all(name.startswith("shape_") for name, _ in ac.features[:4])
    assert len(ac.features) == 10


def test_constant_missing_and_site_wise_constant_features_are_no_error() -> None:
    table = feature_table({"A": 3, "B": 1}, names=("glcm_a", "glcm_b", "glcm_c"))
    table.values[:, 0], table.values[:3, 1], table.values[3:, 2] = 5.0, 1.0, np.nan
    table.values[3, 1] = 2.0
    (found,) = pair_findings(panel_of(table), np.ones((2, 4)))
    assert found.ks.value == 1.0
    assert [name for name, _ in found.features] == ["glcm_b"]


def test_the_discrepancy_is_the_unbiased_one_of_gretton() -> None:
    values = np.random.default_rng(0).normal(size=(12, 3))
    kernel = kernel_matrix(values)
    squared = [((a - b) ** 2).sum() for i, a in enumerate(values) for b in values[:i]]
    np.testing.assert_allclose(kernel, rbf_kernel(values, gamma=1 / (2 * np.median(squared))))
    x, z, m, n = range(5), range(5, 12), 5, 7
    by_hand = (
        sum(kernel[i, j] for i in x for j in x if i != j) / (m * (m - 1))
        + sum(kernel[i, j] for i in z for j in z if i != j) / (n * (n - 1))
        - 2 * sum(kernel[i, j] for i in x for j in z) / (m * n)
    )
    assert discrepancy(kernel, (np.arange(12) >= 5)[None])[0] == pytest.approx(by_hand)


def test_the_kernel_test_finds_a_change_of_spread_and_holds_its_level() -> None:
    generator = np.random.default_rng(0)
    codes = np.repeat([0, 1], 15)
    alarms = 0
    for _ in range(100):
        kernel = kernel_matrix(generator.normal(size=(30, 4)))
        _, p = kernel_test(kernel, codes, np.arange(30), permutations=99, generator=generator)
        alarms += p is not None and p <= 0.05
    assert alarms <= 11
    kernel = kernel_matrix(generator.normal(size=(30, 4)) * (1 + 3 * codes[:, None]))
    assert kernel_test(kernel, codes, np.arange(30), permutations=99, generator=generator)[1] == 0.01


def test_patients_at_both_sites_are_swapped_and_tiny_sites_are_left_out() -> None:
    generator = np.random.default_rng(0)
    patient = 5 * np.repeat(generator.normal(size=(10, 3)), 2, axis=0)
    codes = np.tile([0, 1], 10)
    kernel = kernel_matrix(patient + 0.3 * codes[:, None])
    paired = kernel_test(kernel, codes, np.repeat(np.arange(10), 2), permutations=99, generator=generator)
    apart = kernel_test(kernel, codes, np.arange(20), permutations=99, generator=generator)
    assert paired[0] == apart[0]
    assert paired[1] is not None
    assert apart[1] is not None
    assert paired[1] < apart[1]
    assert kernel_test(kernel[:3, :3], np.array([0, 0, 1]), np.arange(3), permutations=9, generator=generator) == (
        None,
        None,
    )
    assert kernel_test(kernel, codes, np.arange(20), permutations=0, generator=generator)[1] is None
    np.testing.assert_array_equal(kernel_matrix(np.ones((3, 2))), np.ones((3, 3)))
