"""Rounds under differential privacy: what is sent is noisy or nothing, and every site's ledger adds up."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from nnunet_fedharm.federation.entries import FACTS
from nnunet_fedharm.federation.server_app import run_server
from nnunet_fedharm.privacy.accounting import epsilon_of
from nnunet_fedharm.privacy.ledger import Ledger
from nnunet_fedharm.privacy.options import PRIVACY_FILE
from nnunet_fedharm.study.model_facts import read_card_facts
from tests.federation.local_grid import Client, LocalGrid
from tests.federation.test_in_process import real_sites, tiny

pytestmark = pytest.mark.slow
DELTA = 1e-3
THREE_SITES = {"A": (2, 0), "B": (2, 0), "C": (3, 0)}
SHARED_NOISE: dict[str, Any] = {
    "patient_noise": "distributed",
    "secure_aggregation": "segmenter",
    "strategy": "fedavgm",
    "quorum": 3,
    "epsilon": 6.0,
    "delta": DELTA,
    "patients_per_step": 3.0,
    "style_noise": 6.0,
}
"""Noise that all sites add together."""
STATISTICS = {"fingerprint summary": 1}


def listening(client: Client, heard: list[dict[str, object]]) -> Client:
    """The client, whose replies to train requests are kept."""

    def answer(message: Message) -> Message | None:
        reply = client(message)
        if message.metadata.message_type == "train" and reply is not None and reply.has_content():
            heard.append(dict(reply.content.config_records["config"]))
        return reply

    return answer


def test_private_rounds_end_within_the_budget_and_send_no_metric(
    tmp_path: Path, make_consortium: Callable[..., Path]
) -> None:
    root = make_consortium(tmp_path / "consortium", {"A": (3, 0), "B": (2, 0), "C": (0, 2)})
    config = tiny(
        root,
        harmonizer="polarity",
        reference="A",
        harmonizer_rounds=1,
        epsilon=6.0,
        delta=DELTA,
        patients_per_step=2.0,
    )
    heard: list[dict[str, object]] = []
    sites = {node: listening(client, heard) for node, client in real_sites(config, 3).items()}
    results = run_server(LocalGrid(sites), config)
    assert (results / "checkpoint_final.pth").is_file()
    assert len(heard) == 3 + 2 * 2
    for reply in heard:
        assert reply["status"] == "ok", reply.get("text")
        assert set(json.loads(str(reply["metrics"]))) == {"epsilon"}
    steps = {}
    for site in "ABC":
        releases = Ledger(root / "sites" / site / "fedharm").releases()
        noisy = [release for release in releases if release.bounded]
        steps[site] = Counter()
        for release in noisy:
            steps[site][release.what] += release.steps
        assert 0 < epsilon_of([release.noise for release in noisy], DELTA) <= 6.0
        assert Ledger(root / "sites" / site / "fedharm").spent(DELTA).unbounded == ()
        assert {release.what for release in releases if not release.bounded} == {FACTS}
    assert steps == {
        "A": {**STATISTICS, "style of A": 1, "harmonizer training": 1, "segmenter training": 2},
        "B": {**STATISTICS, "style of B": 1, "votes on polarity": 1, "segmenter training": 2},
        "C": {**STATISTICS, "style of C": 1, "votes on polarity": 1},
    }
    promised = json.loads((results / PRIVACY_FILE).read_text())["patient_level"]
    for site in "ABC":
        card = site_card(root, site)["patient_level"]
        assert card["epsilon"] == pytest.approx(Ledger(root / "sites" / site / "fedharm").spent(DELTA).epsilon)
        assert (card["unit"], card["delta"], card["promised"]) == ("patient", DELTA, promised)
        (shown,) = read_card_facts(site_model(root, site), folds=("all",), checkpoint="checkpoint_final.pth").privacy
        assert (shown.unit, shown.epsilon, shown.delta) == ("patient", card["epsilon"], DELTA)


def site_model(root: Path, site: str) -> Path:
    """A site's results folder."""
    (fold,) = (root / "sites" / site / "nnUNet_results").rglob("fold_all")
    return fold.parent


def site_card(root: Path, site: str) -> dict[str, Any]:
    card: dict[str, Any] = json.loads((site_model(root, site) / "fold_all" / PRIVACY_FILE).read_text())
    return card


def test_noise_that_all_sites_add_together_is_one_mechanism_in_every_ledger(
    tmp_path: Path, make_consortium: Callable[..., Path]
) -> None:
    config = tiny(make_consortium(tmp_path / "consortium", THREE_SITES), **SHARED_NOISE)
    root = Path(config.root)
    run_server(LocalGrid(real_sites(config, 3)), config)
    alone = set()
    for site in "ABC":
        ledger = Ledger(root / "sites" / site / "fedharm")
        steps = [entry for entry in ledger.releases() if entry.what == "segmenter training"]
        assert [entry.sample_rate for entry in steps] == [pytest.approx(3 / 7)] * 2
        assert len({entry.noise_multiplier for entry in steps}) == 1
        spent = ledger.spent(DELTA)
        assert 4.0 < spent.epsilon <= 6.0, "rounds and fingerprint, and a step in reserve"
        assert spent.unbounded == ()
        assert not [entry for entry in ledger.releases() if "style" in entry.what], "plain nnU-Net reads none"
        card = site_card(root, site)["patient_level"]
        assert card["epsilon"] == pytest.approx(spent.epsilon)
        assert card["epsilon_alone"] == pytest.approx(spent.alone)
        assert card["promised"]["least_sites"] == 3
        alone.add(round(spent.alone, 6))
    assert len(alone) == 1, "the same noise at every site"
    assert alone.pop() > 6.0
