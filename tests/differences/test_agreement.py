"""CCC and ICC against published tables and other routes to the same numbers; the bootstrap over patients."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import f_oneway

from nnunet_fedharm.differences.agreement import concordance, intraclass_correlation, median, share_at_least
from nnunet_fedharm.errors import ShapeError
from nnunet_fedharm.evaluation.resampling import compare, nanmean

SHROUT_FLEISS = np.array([[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]], float)
"""Table 2 of Shrout and Fleiss 1979: six targets, four judges."""


def test_icc_of_the_table_of_shrout_and_fleiss_is_029() -> None:
    assert intraclass_correlation(SHROUT_FLEISS[..., None])[0] == pytest.approx(0.2898, abs=5e-5)


def test_the_mean_squares_agree_with_scipys_one_way_analyses() -> None:
    """MSR and MSC as scipy's between-group mean squares, MSE as what is left of the total."""
    x = SHROUT_FLEISS
    n, k = x.shape
    total = ((x - x.mean()) ** 2).sum()

    def between(groups: np.ndarray) -> float:
        """Between-group sum of squares out of F and the total: F = (SSB / dfB) / (SSW / dfW)."""
        f = f_oneway(*groups).statistic
        ratio = f * (len(groups) - 1) / (x.size - len(groups))
        return total * ratio / (1 + ratio)

    rows, columns = between(x), between(x.T)
    msr, msc = rows / (n - 1), columns / (k - 1)
    mse = (total - rows - columns) / ((n - 1) * (k - 1))
    assert (msr, msc, mse) == pytest.approx((11.24, 32.49, 1.02), abs=0.01)  # their table 3
    expected = (msr - mse) / (msr + (k - 1) * mse + k * (msc - mse) / n)
    assert intraclass_correlation(x[..., None])[0] == pytest.approx(expected)


def test_ccc_of_equal_series_is_one_and_of_shifted_ones_is_known() -> None:
    series = np.random.default_rng(0).normal(size=(40, 1))
    assert concordance(series, series)[0] == pytest.approx(1)
    shift, variance = 0.8, series.var()
    assert concordance(series, series + shift)[0] == pytest.approx(2 * variance / (2 * variance + shift**2))
    centred = series - series.mean()
    gain = 3.0
    assert concordance(centred, gain * centred)[0] == pytest.approx(2 * gain / (1 + gain**2))
    assert concordance(centred, -centred)[0] == pytest.approx(-1)


def test_ccc_is_lins_precision_times_accuracy() -> None:
    generator = np.random.default_rng(1)
    x = generator.normal(5, 2, (30, 1))
    y = 0.7 * x + generator.normal(2, 1, (30, 1))
    v, u = x.std() / y.std(), (x.mean() - y.mean()) / np.sqrt(x.std() * y.std())
    accuracy = 2 / (v + 1 / v + u**2)
    assert concordance(x, y)[0] == pytest.approx(np.corrcoef(x[:, 0], y[:, 0])[0, 1] * accuracy)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), shift=st.floats(-50, 50), gain=st.floats(0.1, 50))
def test_both_coefficients_ignore_order_and_common_units(seed: int, shift: float, gain: float) -> None:
    table = np.random.default_rng(seed).normal(size=(6, 3, 2))
    icc = intraclass_correlation(table)
    assert intraclass_correlation(gain * table + shift) == pytest.approx(icc)
    assert intraclass_correlation(table[::-1, ::-1]) == pytest.approx(icc)
    ccc = concordance(table[:, 0], table[:, 1])
    assert concordance(gain * table[:, 1] + shift, gain * table[:, 0] + shift) == pytest.approx(ccc)
    assert intraclass_correlation(table[..., :1])[0] == pytest.approx(icc[0])


def test_icc_of_two_sites_approaches_the_ccc_of_many_patients() -> None:
    generator = np.random.default_rng(2)
    x = generator.normal(size=(5000, 1))
    pair = np.stack([x, x + generator.normal(0.3, 0.5, x.shape)], axis=1)
    assert intraclass_correlation(pair)[0] == pytest.approx(concordance(pair[:, 0], pair[:, 1])[0], abs=1e-3)


def test_a_constant_feature_is_undefined_and_counts_in_no_share() -> None:
    generator = np.random.default_rng(0)
    varying = generator.normal(size=(6, 2, 1))
    table = np.concatenate([np.full((6, 2, 1), 0.1 + 0.2), varying], axis=2)
    ccc = concordance(table[:, 0], table[:, 0])
    assert math.isnan(ccc[0])
    assert share_at_least(ccc, 0.9) == 1.0
    assert math.isnan(intraclass_correlation(table)[0])
    assert concordance(np.zeros((4, 1)), np.ones((4, 1)))[0] == 0.0
    assert math.isnan(share_at_least(np.array([np.nan]), 0.5))
    assert math.isnan(median(np.array([np.nan])))


def test_shares_and_medians_are_over_the_features() -> None:
    values = np.array([0.95, 0.9, 0.8, 0.75, 0.1, np.nan])
    assert share_at_least(values, 0.75) == pytest.approx(4 / 5)
    assert share_at_least(values, 0.9) == pytest.approx(2 / 5)
    assert median(values) == 0.8


def test_incomplete_tables_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"patients >= 2.*\(1, 3, 2\)"):
        intraclass_correlation(np.ones((1, 3, 2)))
    with pytest.raises(ShapeError, match="one shape"):
        concordance(np.ones((3, 2)), np.ones((4, 2)))


def test_the_interval_of_a_change_is_that_of_paired_data() -> None:
    generator = np.random.default_rng(0)
    before = generator.normal(size=200)
    after = before + generator.normal(0.5, 0.1, 200)
    found = compare(before, after, nanmean, seed=1, stream="x")
    half = 1.96 * (after - before).std() / math.sqrt(200)
    assert found.change.value == pytest.approx((after - before).mean())
    assert found.change.high - found.change.low == pytest.approx(2 * half, rel=0.15)
    assert found.before.high - found.before.low > 5 * (found.change.high - found.change.low)
    assert (
        found
        == compare(before, after, nanmean, seed=1, stream="x")
        != compare(before, after, nanmean, seed=2, stream="x")
    )


def test_nothing_to_resample_gives_no_interval() -> None:
    one = compare(np.array([0.5]), np.array([0.75]), nanmean, seed=0, stream="x")
    assert one.to_dict()["change"] == {"value": 0.25, "low": None, "high": None}
    none = compare(np.array([]), np.array([]), nanmean, seed=0, stream="x")
    assert none.to_dict() == {
        name: dict.fromkeys(("value", "low", "high")) for name in ("before", "after", "change")
    } | {"n": 0}
    with pytest.raises(ShapeError, match="different shapes"):
        compare(np.ones(3), np.ones(4), nanmean, seed=0, stream="x")
