"""Means that a few bad sites cannot steer, against numpy, Flower and brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.serverapp.strategy.fedtrimmedavg import trim_mean
from flwr.serverapp.strategy.multikrum import select_multikrum
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_fedharm.errors import FederationError, ShapeError
from nnunet_fedharm.federation.codec import Weights
from nnunet_fedharm.federation.robust import (
    coordinate_median,
    krum_choice,
    krum_least,
    krum_scores,
    norm_outliers,
    squared_distances,
    trimmed,
    trimmed_mean,
    update_norms,
)

HONEST = 1.0
"""Where the good sites' updates lie, give or take .1."""


def sites(count: int, seed: int = 0, *, spread: float = 0.1) -> dict[str, Weights]:
    generator = np.random.default_rng(seed)
    shape = {"a": (3, 4), "b": (5,)}
    return {
        f"s{index:02d}": {
            name: generator.normal(HONEST, spread, size).astype(np.float32) for name, size in shape.items()
        }
        for index in range(count)
    }


def stacked(weights: dict[str, Weights], name: str) -> np.ndarray:
    return np.stack([weights[site][name].astype(np.float64) for site in sorted(weights)])


@pytest.mark.parametrize("count", [1, 3, 4, 7])
def test_the_median_is_numpys(count: int) -> None:
    weights = sites(count)
    found = coordinate_median(weights)
    for name, value in found.items():
        np.testing.assert_array_equal(value, np.median(stacked(weights, name), axis=0).astype(np.float32))
        assert value.dtype == np.float32


@pytest.mark.parametrize(("count", "trim"), [(5, 0.2), (10, 0.2), (10, 0.1), (4, 0.25), (8, 0.25)])
def test_the_trimmed_mean_is_flowers_where_the_share_is_a_whole_number_of_sites(count: int, trim: float) -> None:
    weights = sites(count)
    for name, value in trimmed_mean(weights, trim).items():
        np.testing.assert_allclose(value, trim_mean(stacked(weights, name), trim), rtol=1e-6)


def test_the_share_is_rounded_up_so_that_something_is_always_cut() -> None:
    assert [trimmed(0.2, n) for n in (3, 4, 5, 6, 10, 11)] == [1, 1, 1, 2, 2, 3]
    assert [trimmed(0.4, n) for n in (1, 2, 3, 4, 5, 6)] == [0, 0, 1, 1, 2, 2], "one reply is always left"
    four = {site: {"w": np.float32([value])} for site, value in zip("ABCD", (0, 1, 3, 1000), strict=True)}
    assert trimmed_mean(four, 0.2)["w"] == [2.0]
    with pytest.raises(FederationError, match="needs 3 replies, got 2"):
        trimmed_mean({"A": four["A"], "B": four["B"]}, 0.2)


@pytest.mark.parametrize("byzantine", [1, 2])
def test_krum_scores_are_those_of_brute_force(byzantine: int) -> None:
    weights = sites(2 * byzantine + 4, seed=3)
    flat = np.concatenate([stacked(weights, name).reshape(len(weights), -1) for name in "ab"], axis=1)
    expected = []
    for index, own in enumerate(flat):
        others = sorted(float(np.sum((own - other) ** 2)) for j, other in enumerate(flat) if j != index)
        expected.append(sum(others[: len(flat) - byzantine - 2]))
    np.testing.assert_allclose(krum_scores(squared_distances(weights), byzantine), expected, rtol=1e-12)


@pytest.mark.parametrize("keep", [1, 4])
def test_krum_chooses_whom_flower_chooses(keep: int) -> None:
    weights = sites(7, seed=5, spread=1.0)
    contents = [
        RecordDict({"arrays": ArrayRecord({name: Array(value) for name, value in weights[site].items()})})
        for site in sorted(weights)
    ]
    names = {id(content): site for content, site in zip(contents, sorted(weights), strict=True)}
    chosen = select_multikrum(contents, num_malicious_nodes=2, num_nodes_to_select=keep)
    assert set(krum_choice(weights, 2, keep=keep)) == {names[id(content)] for content in chosen}


def test_krum_refuses_fewer_than_2f_and_3_replies() -> None:
    assert [krum_least(f) for f in (1, 2)] == [5, 7]
    with pytest.raises(FederationError, match="1 bad sites needs at least 5 replies, got 4"):
        krum_choice(sites(4), 1, keep=1)


ATTACKS = {
    "scaled": lambda honest, generator: 100 * honest,
    "sign-flipped": lambda honest, generator: -10 * honest,
    "random": lambda honest, generator: generator.normal(0, 50, honest.shape).astype(np.float32),
}


@pytest.mark.parametrize("attack", sorted(ATTACKS))
def test_one_bad_site_of_five_moves_the_mean_but_no_robust_one(attack: str) -> None:
    weights, generator = sites(5, seed=1), np.random.default_rng(2)
    weights["s02"] = {name: ATTACKS[attack](value, generator) for name, value in weights["s02"].items()}

    def error(found: Weights) -> float:
        return max(float(np.abs(value - HONEST).max()) for value in found.values())

    plain = {name: stacked(weights, name).mean(axis=0) for name in "ab"}
    assert error(plain) > 1
    assert error(coordinate_median(weights)) < 0.35
    assert error(trimmed_mean(weights, 0.2)) < 0.35
    assert "s02" not in krum_choice(weights, 1, keep=4)


@settings(max_examples=30, deadline=None)
@given(
    bad=st.lists(st.sampled_from([-1e30, -7.0, 0.0, 0.99, 1e-9, 3.0, 1e30]), min_size=2, max_size=2),
    seed=st.integers(0, 99),
)
def test_with_fewer_bad_sites_than_half_every_number_lies_between_good_ones(bad: list[float], seed: int) -> None:
    good = sites(3, seed)
    weights = good | {
        f"z{i}": {name: np.full_like(v, value) for name, v in good["s00"].items()} for i, value in enumerate(bad)
    }
    for found in (coordinate_median(weights), trimmed_mean(weights, 0.4)):
        for name, value in found.items():
            own = stacked(good, name)
            assert (value >= own.min(axis=0) - 1e-6).all()
            assert (value <= own.max(axis=0) + 1e-6).all()


def test_the_order_of_the_sites_does_not_matter_bit_for_bit() -> None:
    weights = sites(5)
    orders = list(itertools.permutations(weights))[::17]
    for order in orders:
        again = {site: weights[site] for site in order}
        for robust in (coordinate_median, lambda sent: trimmed_mean(sent, 0.2)):
            for name, value in robust(again).items():
                np.testing.assert_array_equal(value, robust(weights)[name])
        assert krum_choice(again, 1, keep=2) == krum_choice(weights, 1, keep=2)


def test_integers_are_rounded_and_booleans_decided_by_more_than_half() -> None:
    weights = {
        site: {"n": np.array([number]), "m": np.array([number > 1])}
        for site, number in zip("ABC", (1, 2, 50), strict=True)
    }
    found = coordinate_median(weights)
    assert (found["n"], found["n"].dtype, found["m"]) == ([2], np.int64, [True])


def test_shapes_that_differ_name_the_site() -> None:
    with pytest.raises(ShapeError, match="B and A sent w"):
        coordinate_median({"A": {"w": np.zeros(2)}, "B": {"w": np.zeros(3)}})


def test_norms_are_those_of_all_floating_numbers_together() -> None:
    former = {"a": np.zeros((2, 2), np.float32), "b": np.zeros(3, np.float32), "n": np.array(4)}
    sent = {"A": {"a": np.full((2, 2), 1.0), "b": np.float32([0, 0, 2]), "n": np.array(9)}}
    assert update_norms(sent, former, former) == {"A": pytest.approx(np.sqrt(4 + 4))}
    assert update_norms(sent, former, ["b"]) == {"A": pytest.approx(2.0)}


def test_only_a_norm_above_the_bound_is_told_and_only_from_three_replies_on() -> None:
    norms = {"A": 1.0, "B": 1.1, "C": 0.9, "D": 30.0}
    assert list(norm_outliers(norms, 3.0)) == ["D"]
    assert "norm 30, more than norm-bound 3 times the median 1.05" in norm_outliers(norms, 3.0)["D"]
    assert norm_outliers(norms, 3.0, what="The change of its control variate")["D"].startswith("The change of its")
    assert norm_outliers(norms, 0.0) == norm_outliers(norms, 40.0) == {}
    assert norm_outliers({"A": 1.0, "D": 30.0}, 3.0) == {}
    assert norm_outliers({"A": 0.0, "B": 0.0, "D": 1e-3}, 3.0) == {}, (
        "most sites have converged: any factor is too small"
    )
