"""Messages of a run that is private by patient and by site, landmarks included: what is noisy is noisy, the rest is public."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from nnunet_fedharm.federation.codec import decode
from nnunet_fedharm.federation.durable import read_json
from nnunet_fedharm.federation.entries import FACTS
from nnunet_fedharm.federation.events import read_events
from nnunet_fedharm.federation.server_app import run_server
from nnunet_fedharm.planning.private_summary import PRIVATE_VERSION
from nnunet_fedharm.privacy.ledger import Ledger
from nnunet_fedharm.privacy.releases import ANNOUNCED, GAUSSIAN, NONE
from tests.federation.deploy.wire import REPLIES, SECURE_REPLIES, allowed, check_message, check_private
from tests.federation.local_grid import LocalGrid
from tests.federation.test_in_process import real_sites, tiny
from tests.federation.test_secure_in_process import watched

pytestmark = pytest.mark.slow
DELTA = 1e-3
PRIVATE: dict[str, Any] = {
    "epsilon": 6.0,
    "delta": DELTA,
    "patients_per_step": 2.0,
    "secure_aggregation": "all",
    "site_dp": "distributed",
    "site_clip": 0.5,
    "site_noise": 2.0,
}


def run(root: Path, **options: Any) -> tuple[Path, list[Message]]:
    config = tiny(root, harmonizer="nyul", reference="A", **options)
    seen: list[Message] = []
    return run_server(LocalGrid(watched(real_sites(config, 3), seen)), config), seen


def values_of(seen: list[Message], kind: str) -> list[dict[str, Any]]:
    answers = [
        dict(message.content.config_records["config"]) for message in seen if message.metadata.message_type == kind
    ]
    assert all(answer["status"] == "ok" for answer in answers), [answer.get("text") for answer in answers]
    return answers


def test_a_private_run_sends_nothing_about_patients_without_noise(
    tmp_path: Path, make_consortium: Callable[..., Path]
) -> None:
    root = make_consortium(tmp_path / "consortium", {"A": (3, 0), "B": (2, 0), "C": (2, 1)})
    results, seen = run(root, **PRIVATE)
    allows = allowed(root / "server" / "fedharm", [root / "sites" / site for site in "ABC"])
    kinds = {check_message(message, allows) for message in seen}
    assert kinds == (set(REPLIES) - {"train"}) | set(SECURE_REPLIES)
    for message in seen:
        check_private(message)
    for answer in values_of(seen, "query.summarize"):
        summary = json.loads(answer["summary"])
        assert summary["version"] == PRIVATE_VERSION
        assert summary["noise_multiplier"] > 0
        assert not any(summary["sums"]), "what a site adds to the fingerprint is in the secure sum only"
    assert [answer["seconds"] for answer in values_of(seen, "query.prepare")] == [0.0] * 3
    for answer in values_of(seen, "train.secure"):
        assert set(answer) == {"status", "site", "phase", "round", "plans_hash"}
    arrays = {
        name
        for message in seen
        for record in message.content.array_records.values()
        for name in decode(record, source="x")
    }
    assert arrays == {"masked"}, "landmarks are styles, rows of gates stay, updates leave masked"
    check_ledgers(root)
    said = json.loads((results / "privacy.json").read_text())
    assert said["patient_level"]["not_covered"] == ["facts"]
    assert (said["site_level"]["unit"], said["site_level"]["least_sites"]) == ("site", 3)
    rounds = [
        event for event in read_events(root / "server" / "fedharm" / "events.jsonl")[0] if event["event"] == "round_end"
    ]
    assert [(event["dice"], event["train_loss"], event["best"]) for event in rounds] == [(None, None, False)] * 2


def check_ledgers(root: Path) -> None:
    for site in "ABC":
        ledger = Ledger(root / "sites" / site / "fedharm")
        by_mechanism: dict[str, set[str]] = {}
        for release in ledger.releases():
            by_mechanism.setdefault(release.mechanism, set()).add(release.what)
        assert by_mechanism.pop(ANNOUNCED) == {FACTS}
        assert NONE not in by_mechanism
        assert {"fingerprint summary", f"style of {site}"} <= by_mechanism[GAUSSIAN]
        assert {"segmenter training"} <= set().union(*by_mechanism.values())
        spent = ledger.spent(DELTA)
        assert (spent.unbounded, spent.epsilon <= 6.0) == ((), True)


@pytest.mark.long
def test_a_site_that_hides_its_own_updates_sends_noise_and_counts_it(
    tmp_path: Path, make_consortium: Callable[..., Path]
) -> None:
    root = make_consortium(tmp_path / "consortium", {"A": (2, 0), "B": (2, 0), "C": (0, 2)})
    own = {"site_dp": "local", "weighting": "sites", "site_clip": 0.5, "site_noise": 2.0}
    results, seen = run(root, segmenter_rounds=1, **own)
    changed = [
        decode(message.content.array_records["weights"], source="x")
        for message in seen
        if message.metadata.message_type == "train"
    ]
    assert len(changed) == 2
    for name, value in changed[0].items():
        if value.dtype == np.float32 and value.size > 500:
            # Two sites' changes differ by noise of sqrt(2) z S; clipped to .5 in all, what they learnt is nothing beside it.
            assert (value - changed[1][name]).std() == pytest.approx(math.sqrt(2), rel=0.15)
    for answer in values_of(seen, "train"):
        assert (json.loads(answer["metrics"]), answer["seconds"]) == ({}, 0.0)
    folder = root / "sites" / "A" / "fedharm"
    (entry,) = [entry for entry in Ledger(folder).releases() if entry.mechanism == GAUSSIAN]
    assert (entry.what, entry.noise_multiplier) == ("weights, segmenter round 1", 1.0)
    (counted,) = folder.glob("*/site-privacy.json")
    assert read_json(counted)["releases"] == 1
    said = json.loads((results / "privacy.json").read_text())["site_level"]
    assert (said["unit"], said["neighbours"]) == ("site", "any two updates of a site")


@pytest.mark.long
def test_a_run_without_privacy_lists_every_release_by_name(
    tmp_path: Path, make_consortium: Callable[..., Path]
) -> None:
    root = make_consortium(tmp_path / "consortium", {"A": (2, 0), "B": (2, 0), "C": (0, 2)})
    results, seen = run(root, segmenter_rounds=1)
    assert {json.loads(answer["summary"])["version"] for answer in values_of(seen, "query.summarize")} == {1}
    assert not (results / "privacy.json").exists()
    names = {site: Ledger(root / "sites" / site / "fedharm").spent(DELTA).unbounded for site in "AC"}
    assert names["A"] == ("fingerprint summary", "style", "weights and metrics, segmenter round 1")
    assert names["C"] == ("fingerprint summary", "style")
