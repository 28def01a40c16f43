"""A round that is asked for again is answered again: nothing is trained, and paid, twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import RecordDict

from nnunet_fedharm.federation.codec import bundle, encode
from nnunet_fedharm.federation.entries import digest_of
from nnunet_fedharm.federation.kept_reply import KEPT_FILE, KeptReply
from nnunet_fedharm.federation.messages import TRAIN_REPLY, Unpacked, reply
from nnunet_fedharm.federation.policy import Policy
from nnunet_fedharm.federation.server_app import run_server
from nnunet_fedharm.federation.site import Site
from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.privacy.ledger import Ledger
from nnunet_fedharm.trainers.private_sampling import SEGMENTER
from tests.federation.local_grid import LocalGrid
from tests.federation.test_in_process import PowerCut, cut_at, real_sites, tiny

RUN = "0123456789ab-012345"


def site_at(folder: Path, **rules: Any) -> Site:
    return Site("A", NnunetRoot(folder).create(), "cpu", 1, policy=Policy(**rules))


def request(number: int = 0, weight: float = 1.0) -> Unpacked:
    weights = bundle(encode({"conv": np.full((2, 2), weight, np.float32)}))
    return Unpacked({"run_id": RUN, "phase": "segmenter", "round": number}, weights)


def answered(value: float = 2.0) -> RecordDict:
    said = {
        "site": "A",
        "phase": "segmenter",
        "round": 0,
        "plans_hash": "0" * 64,
        "n_steps": 1,
        "n_cases": 2,
        "metrics": {"train_loss": 0.5},
        "seconds": 3.0,
    }
    return reply(TRAIN_REPLY, said, bundle(encode({"conv": np.full((2, 2), value, np.float32)})))


def test_the_same_request_gets_the_same_bytes_and_any_other_none(tmp_path: Path) -> None:
    site = site_at(tmp_path)
    KeptReply.to(site, request()).write(answered())
    again = KeptReply.to(site, request()).read()
    assert again is not None
    assert digest_of(again) == digest_of(answered())
    assert again.config_records["config"] == answered().config_records["config"]
    for other in (request(1), request(weight=1.5)):
        assert KeptReply.to(site, other).read() is None
    for rules in ({"max_epsilon": 3.0}, {"metrics": ("train_loss",)}):
        assert KeptReply.to(site_at(tmp_path, **rules), request()).read() is None, "made under other rules"
    assert KeptReply.to(replace(site, secure_only=True), request()).read() is None
    KeptReply.to(site, request(1)).write(answered(3.0))
    assert KeptReply.to(site, request()).read() is None, "the last one alone is kept"


@pytest.mark.parametrize("damage", ["cut", "changed", "other"])
def test_a_damaged_reply_is_not_sent_and_the_log_says_so(tmp_path: Path, damage: str) -> None:
    site = site_at(tmp_path)
    kept = KeptReply.to(site, request())
    kept.write(answered())
    data = kept.path.read_bytes()
    changed = data[:-1] + bytes([data[-1] ^ 1])
    kept.path.write_bytes({"cut": data[:-5], "changed": changed, "other": b"something else"}[damage])
    assert kept.read() is None
    assert (tmp_path / "fedharm" / "site.log").read_text().strip()


def test_a_reply_that_finds_no_room_is_sent_all_the_same(tmp_path: Path) -> None:
    site = site_at(tmp_path)
    kept = KeptReply.to(site, request())
    kept.path.mkdir(parents=True)  # nothing can be moved into its place
    kept.write(answered())
    assert "Cannot write" in (tmp_path / "fedharm" / "site.log").read_text()
    assert kept.read() is None


@pytest.mark.slow
def test_a_server_that_dies_in_a_private_round_costs_the_patients_of_nobody_a_second_time(
    tmp_path: Path, make_consortium: Callable[..., Path]
) -> None:
    consortium = make_consortium(tmp_path / "consortium", {"A": (3, 0), "B": (3, 0)})
    config = tiny(consortium, epsilon=6.0, delta=1e-3, patients_per_step=2.0, segmenter_rounds=3)
    clients = real_sites(config, 2)
    with pytest.raises(PowerCut):  # when A has trained, and entered, its second round
        run_server(LocalGrid({**clients, 101: cut_at(clients[101], ("segmenter", 1))}), config)
    kept = list(consortium.glob(f"sites/*/fedharm/*/{KEPT_FILE}"))
    assert len(kept) == 2
    before = [path.stat().st_mtime_ns for path in sorted(kept)]
    ledgers = {site: Ledger(consortium / "sites" / site / "fedharm") for site in "AB"}
    assert {site: steps(ledger) for site, ledger in ledgers.items()} == {"A": 2, "B": 1}
    seen: list[int] = []

    def look(message: Any) -> Any:
        answer = clients[100](message)
        if message.content.config_records["config"].get("round") == 1:
            seen.append(sorted(kept)[0].stat().st_mtime_ns)
        return answer

    run_server(LocalGrid({100: look, 101: clients[101]}), config)
    assert seen == before[:1], "A sent what it had"
    assert {site: steps(ledger) for site, ledger in ledgers.items()} == {"A": 3, "B": 3}
    assert not list(consortium.glob(f"sites/*/fedharm/*/{KEPT_FILE}")), "there is no further round"


def steps(ledger: Ledger) -> int:
    return sum(release.steps for release in ledger.releases() if release.what == SEGMENTER)
