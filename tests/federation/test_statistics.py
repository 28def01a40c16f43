"""Noisy statistics are told once a run, and paid for once."""

from __future__ import annotations

import secrets
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nnunet_fedharm.errors import PrivacyError
from nnunet_fedharm.federation.messages import Unpacked
from nnunet_fedharm.federation.site import Site
from nnunet_fedharm.federation.statistics import answer_once
from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.planning.private_summary import fingerprint_release
from nnunet_fedharm.privacy.ledger import Ledger


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(name="A", root=NnunetRoot(tmp_path), device="cpu", num_processes=1)


def question(**values: Any) -> Unpacked:
    return Unpacked(
        {"run_id": "aaaaaaaaaaaa-bbbbbb", "noise": 4.0, "epsilon": 2.0, "delta": 1e-5, "dataset_name": "x", **values}
    )


def fresh() -> dict[str, str]:
    return {"drawn": secrets.token_hex(8)}


def test_the_same_question_gets_the_same_bytes_and_costs_nothing_more(site: Site) -> None:
    first, again = (answer_once(site, question(), fingerprint_release(4.0), fresh) for _ in range(2))
    assert first == again
    (entry,) = Ledger(site.folder).releases()
    assert (entry.what, entry.noise_multiplier, entry.run_id) == ("fingerprint summary", 4.0, "aaaaaaaaaaaa-bbbbbb")


def test_another_run_or_another_question_is_another_release(site: Site) -> None:
    asked = [question(), question(run_id="aaaaaaaaaaaa-cccccc"), question(dataset_name="y")]
    assert len({answer_once(site, each, fingerprint_release(8.0), fresh)["drawn"] for each in asked}) == 3
    assert len(Ledger(site.folder).releases()) == 3


def test_what_the_budget_does_not_hold_is_not_made(site: Site) -> None:
    made: list[bool] = []

    def make() -> dict[str, str]:
        made.append(True)
        return fresh()

    with pytest.raises(PrivacyError, match=r"The budget is epsilon 0\.1"):
        answer_once(site, question(epsilon=0.1), fingerprint_release(4.0), make)
    assert not made
    assert Ledger(site.folder).releases() == []


def test_the_sites_own_limit_holds_whatever_the_server_calls_the_budget(site: Site) -> None:
    own = replace(site, max_epsilon=1.0)
    asked = question(noise=0.01, epsilon=1e6, delta=0.9)
    with pytest.raises(PrivacyError, match=r"The budget is epsilon 1 at delta 1e-05"):
        answer_once(own, asked, fingerprint_release(0.01), fresh)
    assert Ledger(site.folder).releases() == []


def test_an_answer_that_a_crash_kept_from_the_ledger_is_entered_when_it_is_sent(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Ledger, "record", crash)
    with pytest.raises(KeyboardInterrupt):
        answer_once(site, question(), fingerprint_release(4.0), fresh)
    monkeypatch.undo()
    answer_once(site, question(), fingerprint_release(4.0), fresh)
    assert len(Ledger(site.folder).releases()) == 1
