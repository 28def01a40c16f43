"""A harmonizer that learns before steps of shared noise: its noise is each site's own, and one budget holds both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nnunet_fedharm.federation.secure.patient_noise import shared_steps_of
from nnunet_fedharm.federation.server_app import run_server
from nnunet_fedharm.privacy.ledger import Ledger
from nnunet_fedharm.privacy.options import VOTE_NOISE
from tests.federation.local_grid import LocalGrid
from tests.federation.test_in_process import real_sites, tiny
from tests.federation.test_private_rounds import DELTA, SHARED_NOISE, THREE_SITES

pytestmark = pytest.mark.slow

ROUNDS = 2
WHATS = ("harmonizer training", "votes on polarity", "segmenter training")


def test_a_harmonizer_learns_before_the_shared_steps_with_noise_of_its_own_in_the_same_budget(
    tmp_path: Path, make_consortium: Callable[..., Path]
) -> None:
    root = make_consortium(tmp_path / "consortium", THREE_SITES)
    judged = {"harmonizer": "polarity", "reference": "A", "harmonizer_rounds": 2}
    config = replace(tiny(root, **SHARED_NOISE, **judged, segmenter_rounds=ROUNDS), sites="A,B,C")
    results = run_server(LocalGrid(real_sites(config, 3)), config)

    facts = {site: {"n_labelled": count, "n_unlabelled": 0} for site, (count, _) in THREE_SITES.items()}
    planned = shared_steps_of(config, facts)
    without = shared_steps_of(replace(config, harmonizer="none", harmonizer_rounds=0), facts)
    assert planned is not None
    assert without is not None
    assert (planned.harmonizer_rate, without.harmonizer_rate) == (1.0, 0.0), (
        "an expected three of the two patients of A"
    )
    assert planned.noise > without.noise, "the harmonizer has a part of the budget"
    for site in THREE_SITES:
        ledger = Ledger(root / "sites" / site / "fedharm")
        judge, votes, steps = ([entry for entry in ledger.releases() if entry.what == what] for what in WHATS)
        whole = [(entry.noise_multiplier, entry.sample_rate, entry.noise_alone) for entry in judge]
        assert whole == ([(planned.noise, 1.0, 0.0)] * 2 if site == "A" else [])
        assert [entry.noise_multiplier >= VOTE_NOISE for entry in votes] == ([] if site == "A" else [True])
        assert [(entry.noise_multiplier, entry.noise_alone > 0) for entry in steps] == [(planned.noise, True)] * ROUNDS
        assert ledger.spent(DELTA).epsilon <= config.epsilon
    model = torch.load(results / "checkpoint_final.pth", map_location="cpu", weights_only=False)["network_weights"]
    told = model["harmonizer.bank_polarity"]
    assert torch.equal(told[0], torch.ones_like(told[0])), "the reference is upright"
    assert not torch.equal(told[1:], torch.ones_like(told[1:])), "the others voted, with noise"
