"""FedProx and SCAFFOLD in real rounds: off they change nothing, on they do what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nnunet_fedharm.errors import FederationError
from nnunet_fedharm.trainers.local_objectives import Objective, extended
from nnunet_fedharm.trainers.local_training import LocalResult
from nnunet_fedharm.trainers.weights import Weights
from tests.trainers.conftest import Planned
from tests.trainers.test_local_training import equal, site, start

ARGUMENTS: dict[str, Any] = {"round_index": 0, "first_epoch": 0, "epochs": 1}


def moved(weights: Weights, result: LocalResult, part: str = "") -> float:
    """Length of the whole change of the tensors that begin with `part`."""
    names = [name for name in result.weights if name.startswith(part) and weights[name].dtype.kind == "f"]
    return float(np.sqrt(sum(np.sum((result.weights[name] - weights[name]) ** 2.0) for name in names)))


@pytest.mark.parametrize("phase", ["harmonizer", "segmenter"])
def test_a_mu_of_zero_is_no_fedprox_bit_for_bit_and_a_large_one_is(active: Planned, tmp_path: Path, phase: str) -> None:
    weights = start(active)
    runs = {
        name: site(active, tmp_path / name).run(phase=phase, weights=weights, objective=objective, **ARGUMENTS)
        for name, objective in (
            ("plain", Objective()),
            ("zero", Objective(proximal_mu=0.0)),
            ("large", Objective(proximal_mu=90.0)),
        )
    }
    assert equal(runs["plain"], runs["zero"])
    assert not equal(runs["plain"], runs["large"])
    if phase == "segmenter":  # the harmonizer's Adam takes steps of one length; that it arrives is tested below
        assert 0 < moved(weights, runs["large"]) < moved(weights, runs["plain"])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("mu", [0.0, 1.0, 9.0])
def test_fedprox_arrives_where_its_objective_is_least(optimizer: str, mu: float) -> None:
    """Of a/2 (w - b)² + mu/2 (w - w0)²: (a b + mu w0) / (a + mu), whatever the optimizer."""
    network = nn.Linear(1, 1, bias=False)
    nn.init.constant_(network.weight, 2.0)
    steps: torch.optim.Optimizer = torch.optim.SGD(network.parameters(), 0.02, momentum=0.9, nesterov=True)
    if optimizer == "adam":
        steps = torch.optim.AdamW(network.parameters(), 0.02, weight_decay=0.0)
    with extended([steps], network, frozenset(), proximal_mu=mu):
        for _ in range(800):
            steps.zero_grad()
            (0.5 * 3.0 * (network.weight + 1.0) ** 2).sum().backward()
            steps.step()
    assert float(network.weight.detach()) == pytest.approx((3.0 * -1.0 + mu * 2.0) / (3.0 + mu), abs=2e-3)
    before = float(network.weight.detach())
    network.weight.grad = torch.zeros_like(network.weight)
    steps.state.clear()
    steps.step()
    assert float(network.weight.detach()) == before, "outside the block nothing is added any more"


def test_a_control_of_zero_moves_nothing_and_measures_the_mean_gradient(active: Planned, tmp_path: Path) -> None:
    weights = start(active)
    names = [name for name in weights if name.startswith("segmenter.")]
    zero = {name: np.zeros_like(weights[name]) for name in names}
    plain = site(active, tmp_path / "plain").run(phase="segmenter", weights=weights, **ARGUMENTS)
    first = site(active, tmp_path / "on").run(
        phase="segmenter", weights=weights, objective=Objective(control=zero), **ARGUMENTS
    )
    assert equal(plain, first)
    assert sorted(first.control) == names
    assert any(np.abs(value).max() > 0 for value in first.control.values())
    kept = torch.load(tmp_path / "on" / "control_round_00000.pt", weights_only=True)
    for name in names:
        np.testing.assert_array_equal(kept[name].numpy(), first.control[name])


def test_what_equals_the_own_control_corrects_nothing(active: Planned, tmp_path: Path) -> None:
    weights = start(active)
    zero = {name: np.zeros_like(weights[name]) for name in weights if name.startswith("segmenter.")}
    training = site(active, tmp_path)
    first = training.run(phase="segmenter", weights=weights, objective=Objective(control=zero), **ARGUMENTS)
    later = {**ARGUMENTS, "round_index": 1, "first_epoch": 1, "weights": weights, "phase": "segmenter"}
    same = training.run(objective=Objective(control=first.control, counted=0), **later)
    (tmp_path / "segmenter_round_00001.pt").unlink()
    assert equal(same, training.run(**later))
    pushed = {name: value + np.float32(1e-2) for name, value in first.control.items()}
    (tmp_path / "segmenter_round_00001.pt").unlink()
    assert not equal(same, training.run(objective=Objective(control=pushed, counted=0), **later))


def test_the_last_counted_round_comes_over_the_network_and_is_checked() -> None:
    with pytest.raises(FederationError, match=r"is .*x.; it has to be a whole number"):
        Objective(counted="../x")  # type: ignore[arg-type]


def test_control_variates_of_another_network_are_refused(active: Planned, tmp_path: Path) -> None:
    weights = start(active)
    training = site(active, tmp_path)
    for control in (
        {"segmenter.unknown": np.zeros(2, np.float32)},
        {next(iter(weights)): np.zeros((7, 7), np.float32)},
    ):
        with pytest.raises(FederationError, match="belongs to no tensor of this network"):
            training.run(phase="segmenter", weights=weights, objective=Objective(control=control), **ARGUMENTS)
    with pytest.raises(FederationError, match="segmenter rounds only"):
        training.run(phase="harmonizer", weights=weights, objective=Objective(control={}), **ARGUMENTS)
