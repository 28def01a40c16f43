"""The server's own steps on the same numbers as Flower's strategies, and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvgM, FedYogi
from flwr.supercore.task_identity import TaskIdentity

from nnunet_fedharm.federation.aggregation import weighted_mean
from nnunet_fedharm.federation.codec import Weights
from nnunet_fedharm.federation.server_steps import (
    adaptive_step,
    add_controls,
    mean_control,
    momentum_step,
    relaxed,
    running_average,
)
from tests.federation.local_grid import LocalGrid

ROUNDS = 5
EXAMPLES = {"A": 3, "B": 1}


def replies_of(former: Weights, number: int) -> dict[str, Weights]:
    """What two sites make of the weights: different pulls with noise, the same for both implementations."""
    generator = np.random.default_rng(number)
    goals = {"A": 1.0, "B": -0.5}
    return {
        site: {
            name: value + 0.2 * (goal - value) + generator.normal(0, 0.05, value.shape)
            for name, value in sorted(former.items())
        }
        for site, goal in goals.items()
    }


def start() -> Weights:
    generator = np.random.default_rng(7)
    # In the order of their names: Flower's FedAvgM pairs the arrays of replies with its own by position.
    return {"a": generator.normal(size=(2, 3)), "b": generator.normal(size=4)}


def flowers_rounds(strategy: Any, first_round: int) -> list[Weights]:
    """Flower's strategy fed with messages; its rounds count from `first_round`."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    weights, found = start(), []
    grid = LocalGrid({node: lambda message: None for node in range(1, 3)})
    for number in range(ROUNDS):
        record = ArrayRecord({name: Array(value) for name, value in weights.items()})
        requests = list(strategy.configure_train(first_round + number, record, ConfigRecord(), grid))
        replies = replies_of(weights, number)
        messages = []
        for site, request in zip(sorted(replies), requests, strict=True):
            arrays = ArrayRecord({name: Array(value) for name, value in replies[site].items()})
            metrics = MetricRecord({"num-examples": EXAMPLES[site]})
            messages.append(Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=request))
        aggregated, _ = strategy.aggregate_train(first_round + number, messages)
        weights = {name: array.numpy() for name, array in aggregated.items()}
        found.append(weights)
    return found


def mean_of(former: Weights, number: int) -> Weights:
    return weighted_mean(replies_of(former, number), {"A": 0.75, "B": 0.25})


def assert_same(mine: list[Weights], flowers: list[Weights]) -> None:
    for one, other in zip(mine, flowers, strict=True):
        for name in one:
            np.testing.assert_allclose(one[name], other[name], rtol=1e-12, atol=1e-14, err_msg=name)


@pytest.mark.parametrize(("lr", "momentum"), [(1.0, 0.9), (0.5, 0.5)])
def test_fedavgm_is_flowers(lr: float, momentum: float) -> None:
    weights, velocity, mine = start(), {}, []
    for number in range(ROUNDS):
        weights, velocity = momentum_step(weights, mean_of(weights, number), velocity, lr=lr, momentum=momentum)
        mine.append(weights)
    assert_same(mine, flowers_rounds(FedAvgM(server_learning_rate=lr, server_momentum=momentum), 1))


@pytest.mark.parametrize(("kind", "flower"), [("fedadam", FedAdam), ("fedyogi", FedYogi)])
def test_fedadam_and_fedyogi_are_flowers(kind: str, flower: Any) -> None:
    options = {"beta1": 0.8, "beta2": 0.95, "tau": 1e-2}
    weights, first, second, mine = start(), {}, {}, []
    for number in range(ROUNDS):
        weights, first, second = adaptive_step(
            weights, mean_of(weights, number), first, second, kind=kind, number=number + 1, lr=0.05, **options
        )
        mine.append(weights)
    # Flower's bias correction has the exponent server_round + 1, and its rounds begin at 1: told 0, it is Adam's own.
    assert_same(mine, flowers_rounds(flower(eta=0.05, beta_1=0.8, beta_2=0.95, tau=1e-2), 0))


def test_the_first_step_of_fedadam_by_hand() -> None:
    former, mean = {"w": np.array([1.0, 1.0])}, {"w": np.array([1.5, 0.9])}
    after, first, second = adaptive_step(
        former, mean, {}, {}, kind="fedadam", number=1, lr=0.1, beta1=0.9, beta2=0.99, tau=1e-3
    )
    change = np.array([0.5, -0.1])
    np.testing.assert_allclose(first["w"], 0.1 * change)
    np.testing.assert_allclose(second["w"], 0.01 * change**2)
    rate = 0.1 * np.sqrt(0.01) / 0.1
    np.testing.assert_allclose(after["w"], 1 + rate * 0.1 * change / (0.1 * np.abs(change) + 1e-3))


@pytest.mark.parametrize("kind", ["fedadam", "fedyogi"])
def test_without_a_change_nothing_moves(kind: str) -> None:
    weights = {"w": np.float32([1, 2]), "n": np.array(3)}
    after, first, second = adaptive_step(
        weights, weights, {}, {}, kind=kind, number=1, lr=0.1, beta1=0.9, beta2=0.99, tau=1e-3
    )
    np.testing.assert_array_equal(after["w"], weights["w"])
    assert set(first) == set(second) == {"w"}, "integers have no gradient"


def test_integers_and_booleans_take_the_mean_and_dtypes_stay() -> None:
    former = {"n": np.array(3), "m": np.array([True]), "w": np.float32([0.0])}
    mean = {"n": np.array(5), "m": np.array([False]), "w": np.float32([1.0])}
    after, velocity = momentum_step(former, mean, {}, lr=2.0, momentum=0.9)
    assert (after["n"], after["m"], after["w"]) == (5, [False], [2.0])
    assert after["w"].dtype == velocity["w"].dtype == np.float32


def test_a_server_rate_of_one_is_the_mean_bit_for_bit() -> None:
    former, mean = {"w": np.float32([0.1])}, {"w": np.float32([0.3])}
    assert relaxed(former, mean, lr=1.0)["w"] is mean["w"]
    np.testing.assert_allclose(relaxed(former, mean, lr=0.5)["w"], 0.2)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_the_running_average_is_the_weighted_mean_of_all_rounds_and_knows_no_start(decay: float) -> None:
    rounds = [{"w": np.random.default_rng(seed).normal(size=3)} for seed in range(6)]
    average: Weights = {}
    for count, value in enumerate(rounds, start=1):
        average = running_average(average, value, decay=decay, count=count)
        powers = np.array([decay ** (count - k) for k in range(1, count + 1)])
        expected = np.average([item["w"] for item in rounds[:count]], axis=0, weights=powers)
        np.testing.assert_allclose(average["w"], expected, rtol=1e-12)


def test_controls_are_the_weighted_mean_of_all_sites_whoever_replied() -> None:
    like = {"w": np.zeros(2)}
    amounts = {"A": 3.0, "B": 1.0}
    own = {"A": np.zeros(2), "B": np.zeros(2)}
    summed: Weights = {}
    for number, present in enumerate(("AB", "B", "A", "AB")):
        changes = {site: {"w": np.random.default_rng((number, ord(site))).normal(size=2)} for site in present}
        for site in present:
            own[site] = own[site] + changes[site]["w"]
        summed = add_controls(summed, changes, amounts, like)
        expected = (3 * own["A"] + own["B"]) / 4
        np.testing.assert_allclose(mean_control(summed, amounts, like, like)["w"], expected, rtol=1e-12)


def test_the_first_control_is_zero() -> None:
    np.testing.assert_array_equal(mean_control({}, {}, {"w": np.ones(2)}, ["w"])["w"], 0.0)
