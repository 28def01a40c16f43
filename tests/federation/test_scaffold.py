"""SCAFFOLD and FedProx on quadratics whose common optimum is known: the sites' code with torch's optimizer, the server's code.

Site i has the loss 1/2 (w - b_i)' A_i (w - b_i). With different A_i local steps pull the average off the optimum.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nnunet_fedharm.errors import CheckpointError
from nnunet_fedharm.federation.aggregation import SiteUpdate
from nnunet_fedharm.federation.codec import Weights
from nnunet_fedharm.federation.ownership import Ownership
from nnunet_fedharm.federation.state import Memory
from nnunet_fedharm.federation.strategy import Strategy, controlled, current_control, next_model
from nnunet_fedharm.trainers.local_objectives import ControlVariate, Objective, extended
from nnunet_fedharm.trainers.round_states import RoundStates

CURVATURE = {"A": (1.0, 0.1), "B": (0.05, 1.0), "C": (0.5, 0.5)}
GOAL = {"A": (1.0, -2.0), "B": (-3.0, 1.0), "C": (0.5, 4.0)}
CASES = {"A": 4, "B": 2, "C": 2}
STEPS = 20


def optimum(cases: dict[str, int]) -> np.ndarray:
    """Of the mean of the losses, weighted by cases."""
    share = {site: number / sum(cases.values()) for site, number in cases.items()}
    curvature = sum(share[site] * np.array(CURVATURE[site]) for site in cases)
    return sum(share[site] * np.array(CURVATURE[site]) * np.array(GOAL[site]) for site in cases) / curvature


class Point(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))


@dataclass
class Federation:
    """Sites with durable optimizers and control variates, and a server with its memory."""

    folder: Path
    strategy: Strategy
    momentum: float = 0.0
    lr: float = 0.1
    proximal_mu: float = 0.0
    weighting: str = "cases"
    memory: Memory = field(default_factory=Memory)
    weights: Weights = field(default_factory=lambda: {"w": np.zeros(2, np.float32)})
    optimizers: dict[str, dict[str, object]] = field(default_factory=dict)

    def round(self, number: int, present: str, lost: str = "") -> None:
        """One round with the `present` sites; replies of `lost` ones never reach the server."""
        control = None
        if self.strategy.name == "scaffold":
            control = current_control(self.memory, controlled(Ownership(), self.weights))
        updates = {site: self.train(site, number, control) for site in present}
        for site in lost:
            del updates[site]
        made = next_model(
            self.strategy,
            self.weights,
            updates,
            Ownership(),
            self.memory,
            phase="segmenter",
            number=number,
            weighting=self.weighting,
            batch_size=1,
        )
        self.weights, self.memory = made.weights, made.memory

    def train(self, site: str, number: int, control: Weights | None) -> SiteUpdate:
        network = Point()
        network.w.data = torch.from_numpy(self.weights["w"].copy())
        optimizer = torch.optim.SGD(network.parameters(), self.lr, momentum=self.momentum, nesterov=self.momentum > 0)
        if site in self.optimizers:
            optimizer.load_state_dict(self.optimizers[site])
        curvature, goal = torch.tensor(CURVATURE[site]), torch.tensor(GOAL[site])
        counted = self.memory.numbers.get("counted", {}).get(site)
        states = RoundStates(self.folder / site, site, "cpu")
        drift = (
            None if control is None else ControlVariate(states, Objective(control=control, counted=counted), network)
        )
        correction = None if drift is None else drift.correction
        added = extended([optimizer], network, frozenset(), proximal_mu=self.proximal_mu, correction=correction)
        with added as terms:
            for _ in range(STEPS):
                optimizer.zero_grad()
                (0.5 * (curvature * (network.w - goal) ** 2).sum()).backward()
                optimizer.step()
        self.optimizers[site] = optimizer.state_dict()
        change = {} if drift is None or terms is None else drift.update(terms, number)
        return SiteUpdate({"w": network.w.detach().numpy()}, STEPS, CASES[site], {}, change)

    def error(self, cases: dict[str, int] = CASES) -> float:
        return float(np.abs(self.weights["w"] - optimum(cases)).max())


def test_averaging_is_biased_where_scaffold_is_not(tmp_path: Path) -> None:
    plain, corrected = (Federation(tmp_path / name, Strategy(name=name)) for name in ("fedavg", "scaffold"))
    for number in range(60):
        plain.round(number, "ABC")
        corrected.round(number, "ABC")
    assert plain.error() > 0.1
    assert corrected.error() < 1e-3


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_momentum_that_lives_on_between_rounds_does_no_harm(tmp_path: Path, momentum: float) -> None:
    federation = Federation(tmp_path, Strategy(name="scaffold"), momentum=momentum, lr=0.1 * (1 - momentum))
    for number in range(80):
        federation.round(number, "ABC")
    assert federation.error() < 1e-3


def test_sites_that_are_away_keep_their_part_of_the_sum(tmp_path: Path) -> None:
    federation = Federation(tmp_path, Strategy(name="scaffold"), weighting="sites")
    for number in range(150):
        federation.round(number, ("ABC", "AB", "BC", "AC")[number % 4])
    for number in range(150, 170):
        federation.round(number, "ABC")
    assert federation.error(dict.fromkeys(CASES, 1)) < 1e-2


def test_lost_replies_are_forgotten_by_both_sides(tmp_path: Path) -> None:
    """The server's sum is the sum of what the sites go back to, whatever was lost."""
    federation = Federation(tmp_path, Strategy(name="scaffold"))
    for number in range(12):
        federation.round(number, "ABC", lost="B" if number % 3 else "")
    numbers, summed = federation.memory.numbers, federation.memory.part("control")["w"]
    assert numbers["counted"] == {"A": 11, "B": 9, "C": 11}
    held = {
        site: RoundStates(tmp_path / site, site, "cpu").exactly("control", numbers["counted"][site])["w"].numpy()
        for site in CASES
    }
    np.testing.assert_allclose(summed, sum(CASES[site] * held[site] for site in CASES), atol=1e-5)
    assert all(len(list((tmp_path / site).iterdir())) <= 2 for site in CASES), "old ones are not kept"


def test_a_repeated_round_changes_the_control_variate_once(tmp_path: Path) -> None:
    federation = Federation(tmp_path, Strategy(name="scaffold"))
    federation.round(0, "ABC")
    former = dict(federation.optimizers)
    control = current_control(federation.memory, federation.weights)
    first = federation.train("A", 1, control)
    federation.optimizers = former
    again = federation.train("A", 1, control)
    np.testing.assert_array_equal(first.control["w"], again.control["w"])
    np.testing.assert_array_equal(first.weights["w"], again.weights["w"])


def test_a_site_that_lost_what_the_server_counts_on_says_so(tmp_path: Path) -> None:
    federation = Federation(tmp_path, Strategy(name="scaffold"))
    federation.round(0, "ABC")
    next((tmp_path / "B").iterdir()).unlink()
    with pytest.raises(CheckpointError, match=r"Site B does not hold its control state of round 1 .* --restart"):
        federation.round(1, "ABC")


def test_the_control_variate_is_the_papers_option_two_under_plain_sgd(tmp_path: Path) -> None:
    """c_i' = c_i - c + (x - y_i) / (K lr)."""
    federation = Federation(tmp_path, Strategy(name="scaffold"))
    for number in range(3):
        federation.round(number, "ABC")
    control = current_control(federation.memory, federation.weights)["w"]
    states = RoundStates(tmp_path / "A", "A", "cpu")
    own = states.exactly("control", 2)["w"].numpy()
    update = federation.train("A", 3, {"w": control})
    expected = own - control + (federation.weights["w"] - update.weights["w"]) / (STEPS * federation.lr)
    np.testing.assert_allclose(own + update.control["w"], expected, rtol=1e-4, atol=1e-6)


def test_fedprox_ends_nearer_to_the_optimum_and_a_large_mu_stays_near_the_received_weights(tmp_path: Path) -> None:
    errors = {}
    for mu in (0.0, 1.0):
        federation = Federation(tmp_path / str(mu), Strategy(), proximal_mu=mu)
        for number in range(60):
            federation.round(number, "ABC")
        errors[mu] = federation.error()
    assert errors[1.0] < 0.7 * errors[0.0]
    free, held = (Federation(tmp_path / f"m{mu}", Strategy(), proximal_mu=mu) for mu in (0.0, 9.0))
    moved = [np.abs(item.train("A", 0, None).weights["w"]).max() for item in (free, held)]
    assert moved[1] < 0.15 * moved[0]
