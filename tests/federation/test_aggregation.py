"""Means over sites, against numpy.average on float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_fedharm.errors import FederationError, ShapeError
from nnunet_fedharm.federation.aggregation import SiteUpdate, mean_metric, shares, weighted_mean

AMOUNTS = st.lists(st.integers(1, 1000), min_size=1, max_size=6)


def update(value: float, *, steps: int = 1, cases: int = 1, **metrics: float) -> SiteUpdate:
    return SiteUpdate({"w": np.full((2, 3), value, np.float32)}, steps, cases, metrics)


@settings(max_examples=50, deadline=None)
@given(amounts=AMOUNTS, seed=st.integers(0, 99))
def test_weighted_mean_equals_numpy_average_in_float64(amounts: list[int], seed: int) -> None:
    generator = np.random.default_rng(seed)
    values = {f"s{i}": {"w": generator.normal(size=(3, 4)).astype(np.float32)} for i in range(len(amounts))}
    share = {f"s{i}": amount / sum(amounts) for i, amount in enumerate(amounts)}
    stacked = np.stack([values[site]["w"].astype(np.float64) for site in values])
    expected = np.average(stacked, axis=0, weights=np.array(amounts, float)).astype(np.float32)
    found = weighted_mean(values, share)["w"]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_the_order_of_the_sites_does_not_matter_bit_for_bit() -> None:
    generator = np.random.default_rng(1)
    values = {site: {"w": generator.normal(size=50).astype(np.float32)} for site in "ABCD"}
    share = {"A": 0.1, "B": 0.2, "C": 0.3, "D": 0.4}
    results = [
        weighted_mean({site: values[site] for site in order}, share)["w"] for order in itertools.permutations("ABCD")
    ]
    for result in results:
        np.testing.assert_array_equal(result, results[0])


@settings(max_examples=30, deadline=None)
@given(amounts=AMOUNTS, seed=st.integers(0, 99))
def test_equal_weights_are_a_fixed_point(amounts: list[int], seed: int) -> None:
    value = np.random.default_rng(seed).normal(size=20).astype(np.float32)
    updates = {f"s{i}": SiteUpdate({"w": value}, amount, 1, {}) for i, amount in enumerate(amounts)}
    mean = weighted_mean({site: item.weights for site, item in updates.items()}, shares(updates, "steps"))
    np.testing.assert_array_equal(mean["w"], value)


def test_integers_are_rounded_and_booleans_voted() -> None:
    values = {
        "A": {"n": np.array([1, 10]), "m": np.array([True, True])},
        "B": {"n": np.array([2, 20]), "m": np.array([False, True])},
    }
    mean = weighted_mean(values, {"A": 0.7, "B": 0.3})
    np.testing.assert_array_equal(mean["n"], [1, 13])
    np.testing.assert_array_equal(mean["m"], [True, True])
    assert mean["n"].dtype == np.int64


def test_shares_follow_steps_cases_or_sites() -> None:
    updates = {"A": update(0, steps=30, cases=1), "B": update(1, steps=10, cases=9)}
    assert shares(updates, "steps", batch_size=2) == {"A": 0.75, "B": 0.25}
    assert shares(updates, "cases") == {"A": 0.1, "B": 0.9}
    assert shares(updates, "sites") == {"A": 0.5, "B": 0.5}


def test_a_round_in_which_nobody_worked_is_refused() -> None:
    with pytest.raises(FederationError, match="No site did any work"):
        shares({"A": update(0, steps=0)}, "steps")
    with pytest.raises(FederationError, match="choose steps, cases or sites"):
        shares({"A": update(0)}, "votes")


def test_shapes_and_names_that_differ_name_the_site() -> None:
    good = {"w": np.zeros(2, np.float32)}
    with pytest.raises(ShapeError, match=r"w: B sent \(3,\), A sent \(2,\)"):
        weighted_mean({"A": good, "B": {"w": np.zeros(3, np.float32)}}, {"A": 0.5, "B": 0.5})
    with pytest.raises(ShapeError, match="B and A sent tensors of different names"):
        weighted_mean({"A": good, "B": {"v": good["w"]}}, {"A": 0.5, "B": 0.5})


def test_a_metric_is_averaged_over_the_sites_that_measured_it() -> None:
    updates = {"A": update(0, dice=0.5), "B": update(0, dice=float("nan")), "C": update(0)}
    assert mean_metric(updates, {"A": 0.2, "B": 0.4, "C": 0.4}, "dice") == pytest.approx(0.5)
    assert mean_metric(updates, {"A": 0.2, "B": 0.4, "C": 0.4}, "val_loss") is None
