"""Noise that all sites add together, through the real Flower: SuperLink, a SuperNode a site, and a private start to end."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nnunet_fedharm.federation.events import read_events
from nnunet_fedharm.federation.launch import federate
from nnunet_fedharm.federation.secure.patient_noise import shared_steps_of
from nnunet_fedharm.privacy.accounting import Noise, epsilon_of
from nnunet_fedharm.privacy.ledger import Ledger
from nnunet_fedharm.privacy.options import PRIVACY_FILE
from tests.federation.test_in_process import tiny
from tests.federation.test_private_rounds import DELTA, SHARED_NOISE, THREE_SITES

pytestmark = [pytest.mark.slow, pytest.mark.long]

ROUNDS = 2
EPSILON = SHARED_NOISE["epsilon"]


def weights_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = torch.load(checkpoint, map_location="cpu", weights_only=False)["network_weights"]
    return weights


def test_sites_share_the_noise_they_planned_in_secure_sums_and_end_with_one_model(
    tmp_path: Path, make_consortium: Callable[..., Path]
) -> None:
    root = make_consortium(tmp_path / "consortium", THREE_SITES)
    config = tiny(root, **SHARED_NOISE, segmenter_rounds=ROUNDS, join_wait_s=120.0, deadline_s=600.0)
    fold = federate(config, show=lambda _: None)

    events = read_events(root / "server" / "fedharm" / "events.jsonl")[0]
    sums = [event for event in events if event["event"] == "secure_sum"]
    assert [event["sites"] for event in sums] == [["A", "B", "C"]] * ROUNDS

    facts = {site: {"n_labelled": count} for site, (count, _) in THREE_SITES.items()}
    planned = shared_steps_of(replace(config, sites="A,B,C"), facts)
    assert planned is not None
    promised = json.loads((fold / PRIVACY_FILE).read_text())["patient_level"]
    assert promised["noise_multiplier"] == pytest.approx(planned.noise)
    assert (promised["epsilon"], promised["least_sites"]) == (EPSILON, 3)
    model = weights_of(fold / "checkpoint_final.pth")
    for site in THREE_SITES:
        ledger = Ledger(root / "sites" / site / "fedharm")
        steps = [entry for entry in ledger.releases() if entry.what == "segmenter training"]
        assert [entry.steps for entry in steps] == [1] * ROUNDS
        assert {entry.noise_multiplier for entry in steps} == {planned.noise}
        assert {entry.sample_rate for entry in steps} == {planned.sample_rate}
        assert {entry.note for entry in steps} == {"inside a secure sum of at most 3 sites"}
        spent = ledger.spent(DELTA)
        statistics = [entry.noise for entry in ledger.releases() if entry.bounded and entry not in steps]
        assert len(statistics) == 1, "the fingerprint; plain nnU-Net reads no style"
        assert spent.epsilon == pytest.approx(epsilon_of([*statistics, Noise(planned.noise, 3 / 7, ROUNDS)], DELTA))
        assert 4.0 < spent.epsilon <= EPSILON
        assert spent.unbounded == ()
        (own,) = (root / "sites" / site / "nnUNet_results").rglob("checkpoint_final.pth")
        at_site = weights_of(own)
        moved = [
            name
            for name, value in model.items()
            if name.startswith("segmenter.") and not torch.equal(value, at_site[name])
        ]
        assert moved == [], "the model is one"
