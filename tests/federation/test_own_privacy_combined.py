"""One private site beside others, with every option that changes what it adds to its steps or what becomes of its update.

What leaves the site is measured: with a clip far below any real gradient and a network of thousands of weights, an update is all
noise, of the size that the ledger's entry says and the optimizer makes of it. A gradient that was not clipped, or noise that
was left out, would show as another size.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message, RecordDict
from safetensors.numpy import load_file

from nnunet_fedharm.errors import FedHarmError
from nnunet_fedharm.federation.codec import Weights, decode
from nnunet_fedharm.federation.config import FederateConfig
from nnunet_fedharm.federation.entries import FACTS
from nnunet_fedharm.federation.own_privacy import OWN_FILE
from nnunet_fedharm.federation.server_app import run_server
from nnunet_fedharm.federation.strategy_checks import noise_warnings
from nnunet_fedharm.federation.updates import split_control
from nnunet_fedharm.planning.facts import SiteFacts
from nnunet_fedharm.privacy.accounting import epsilon_of
from nnunet_fedharm.privacy.releases import Release
from nnunet_fedharm.trainers.round_states import RoundStates
from tests.federation.local_grid import Client, LocalGrid
from tests.federation.test_in_process import real_sites, tiny
from tests.federation.test_own_privacy import DELTA, EPSILON, keep_private, ledger

PATIENTS, CLIP, EXPECTED = 3, 1e-3, 2.0
LR, MOMENTUM, MU = 0.01, 0.5, 50.0
RUN: dict[str, Any] = {"segmenter_rounds": 1, "iterations_per_epoch": 2, "initial_lr": LR, "momentum": MOMENTUM}
FEDPROX: dict[str, Any] = {"proximal_mu": MU}
SITES: dict[str, Any] = {"site_clip": 0.01, "site_noise": 1e-3, "weighting": "sites"}
"""Its noise, 1e-5 an entry, is as large as that of B's own steps after the optimizer."""
SUMS: dict[str, Any] = {"secure_aggregation": "all", "secure_bytes": 8}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, make_consortium: Callable[..., Path]) -> Path:
    return make_consortium(tmp_path_factory.mktemp("template"), {"A": (2, 0), "B": (PATIENTS, 0), "C": (2, 0)})


@pytest.fixture
def root(tmp_path: Path, template: Path) -> Path:
    shutil.copytree(template, tmp_path / "consortium")
    keep_private(tmp_path / "consortium", private_clip=CLIP, private_patients_per_step=EXPECTED)
    return tmp_path / "consortium"


def heard_from(client: Client, heard: list[tuple[RecordDict, RecordDict]]) -> Client:
    """The client, whose requests and replies of plain rounds are kept."""

    def answer(message: Message) -> Message | None:
        reply = client(message)
        if message.metadata.message_type == "train" and reply is not None:
            heard.append((message.content, reply.content))
        return reply

    return answer


def federate(root: Path, **options: Any) -> list[tuple[Weights, Weights]]:
    """Run it; what B was given and what it sent in each plain round."""
    config = tiny(root, **{**RUN, **options})
    clients, heard = real_sites(config, 3), []
    clients[101] = heard_from(clients[101], heard)
    run_server(LocalGrid(clients), config)
    for _, reply in heard:
        assert reply.config_records["config"]["status"] == "ok", reply.config_records["config"].get("text")
        assert "epsilon" in str(reply.config_records["config"]["metrics"])
        assert "loss" not in str(reply.config_records["config"]["metrics"])
    return [
        (decode(asked.array_records["weights"], source="server"), decode(told.array_records["weights"], source="B"))
        for asked, told in heard
    ]


def steps_of_b(root: Path, what: str = "segmenter training", *, steps: int) -> Release:
    """The entries of B's private steps, which are all that it told but facts and fingerprint; within its epsilon."""
    entries = ledger(root).releases()
    assert {entry.what for entry in entries if not entry.bounded} == {FACTS}
    assert epsilon_of([entry.noise for entry in entries if entry.bounded], DELTA) <= EPSILON
    mine = [entry for entry in entries if entry.what == what]
    assert sum(entry.steps for entry in mine) == steps
    assert len({entry.noise_multiplier for entry in mine}) == 1
    return mine[0]


def noise_of_a_step(entry: Release) -> float:
    """Standard deviation of the noise on an entry of a step's gradient."""
    return entry.noise_multiplier * CLIP / EXPECTED


def after_two_steps(noise: float, mu: float) -> float:
    """Of a weight after two steps of SGD with Nesterov's momentum whose gradients are all noise.

    The second step's pull is mu times the first one's change, so it is made of the first one's noise and of nothing else.
    """
    pull = mu * LR * (1 + MOMENTUM)
    first, second = (1 + MOMENTUM) * (1 - pull) + MOMENTUM**2, 1 + MOMENTUM
    return LR * noise * math.hypot(first, second)


def size_of(change: Weights) -> float:
    """Standard deviation over all entries of the segmenter."""
    values = [np.ravel(value).astype(np.float64) for name, value in change.items() if "segmenter." in name]
    assert sum(value.size for value in values) > 2000
    return float(np.concatenate(values).std())


def change_of(pair: tuple[Weights, Weights]) -> Weights:
    received, sent = pair
    return {
        name: value - received[name] for name, value in sent.items() if name in received and value.dtype.kind == "f"
    }


def offered_by_b(root: Path) -> Weights:
    """B's part of the last secure sum, without its share of the noise of sites."""
    arrays = load_file(root / "sites" / "B" / "fedharm" / "secure-sums" / "offer.safetensors")
    return {name: value for name, value in arrays.items() if name.startswith("sum:tensor:")}


def states_of_b(root: Path) -> RoundStates:
    """What B keeps between rounds."""
    (folder,) = (path.parent for path in (root / "sites" / "B" / "fedharm").glob(f"*/{OWN_FILE}"))
    return RoundStates(folder, "B", "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("mu", [0.0, MU])
@pytest.mark.parametrize("site_dp", ["off", "server", "local"])
def test_what_a_private_site_sends_is_noise_of_the_size_in_its_ledger(root: Path, site_dp: str, mu: float) -> None:
    options = {} if site_dp == "off" else {"site_dp": site_dp, **SITES}
    (sent,) = federate(root, proximal_mu=mu, **options)
    expected = after_two_steps(noise_of_a_step(steps_of_b(root, steps=2)), mu)
    if site_dp == "local":
        expected = math.hypot(expected, SITES["site_clip"] * SITES["site_noise"])
    assert size_of(change_of(sent)) == pytest.approx(expected, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("site_dp", ["off", "distributed"])
def test_what_a_private_site_gives_to_a_secure_sum_is_that_noise_too(root: Path, site_dp: str) -> None:
    options = {} if site_dp == "off" else {"site_dp": site_dp, "site_clip": 1.0, "site_noise": 0.5}
    assert not federate(root, **FEDPROX, **SUMS, **options), "no update travels in the open"
    expected = after_two_steps(noise_of_a_step(steps_of_b(root, steps=2)), MU)
    assert size_of(offered_by_b(root)) == pytest.approx(expected, rel=0.05)


@pytest.mark.slow
def test_a_control_variate_of_a_private_site_is_made_of_noisy_gradients_only(root: Path) -> None:
    rounds = federate(root, strategy="scaffold", segmenter_rounds=2, proximal_mu=1.0)
    noise = noise_of_a_step(steps_of_b(root, steps=4))
    changes = [split_control(sent)[1] for _, sent in rounds]
    # c_i is the mean gradient of a round's two steps; its change in round 2 the difference of two such means.
    assert size_of(changes[0]) == pytest.approx(noise / math.sqrt(2), rel=0.05)
    assert size_of(changes[1]) == pytest.approx(noise, rel=0.05)
    kept = states_of_b(root).exactly("control", 1)
    for name, value in kept.items():
        np.testing.assert_allclose(value.numpy(), changes[0][name] + changes[1][name], atol=1e-9)


@pytest.mark.slow
def test_a_private_site_s_harmonizer_is_pulled_by_fedprox_after_the_noise(root: Path) -> None:
    options: dict[str, Any] = {"harmonizer": "curve", "harmonizer_rounds": 1, "proximal_mu": 1e-3}
    federate(root, **options)
    entry = steps_of_b(root, "harmonizer training", steps=2)
    state = states_of_b(root).exactly("harmonizer", 0)["training"]["optimizers"]["harmonizer"]
    means = torch.cat([item["exp_avg"].flatten() for item in state["state"].values()]).double()
    # AdamW's mean gradient after two steps: 0.9 x 0.1 g1 + 0.1 g2.
    error = 4 / math.sqrt(2 * len(means))
    assert means.std() == pytest.approx(noise_of_a_step(entry) * math.hypot(0.09, 0.1), rel=max(0.05, error))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strategy": "scaffold", "secure_aggregation": "segmenter"}, "scaffold needs the single updates"),
        ({"strategy": "scaffold", "site_dp": "server", **SITES}, "scaffold is not made for site-dp"),
        ({"strategy": "scaffold", "site_dp": "local", **SITES}, "scaffold is not made for site-dp"),
        ({"strategy": "scaffold", "site_dp": "distributed", **SUMS}, "scaffold needs the single updates"),
        ({"patient_noise": "distributed", "secure_aggregation": "all"}, "no epsilon to add noise for"),
        ({"site_dp": "server", **SITES, **SUMS}, "use distributed"),
        ({"site_dp": "distributed"}, "Use secure-aggregation all"),
    ],
)
def test_what_does_not_go_together_is_refused_before_the_start_whoever_is_private(
    options: dict[str, Any], words: str
) -> None:
    with pytest.raises(FedHarmError, match=words) as caught:
        FederateConfig(sites="A,B,C", **options)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("options", "private", "words"),
    [
        ({"norm_bound": 3.0}, "B", "norm-bound may leave them out"),
        ({"strategy": "median"}, "B", "strategy median may leave them out"),
        ({"norm_bound": 3.0}, "ABC", ""),
        ({"norm_bound": 3.0}, "", ""),
        ({}, "B", ""),
    ],
)
def test_a_run_that_may_leave_out_a_private_site_in_every_round_says_so(
    options: dict[str, Any], private: str, words: str
) -> None:
    promised = {"epsilon": EPSILON, "delta": DELTA}
    own = {site: promised if site in private else {} for site in "ABC"}
    facts = [SiteFacts(site, "Dataset001_X", {}, {}, None, ".nii.gz", 2, 0, {}, "r", own[site]) for site in "ABC"]
    found = noise_warnings(FederateConfig(sites="A,B,C", **options), facts)
    assert len(found) == bool(words)
    assert all(words in text and text.startswith("The noise of B, ") for text in found)
