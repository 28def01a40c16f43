"""Every reply that tells something about patients is in the site's ledger before it leaves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict

from nnunet_fedharm.errors import PrivacyError
from nnunet_fedharm.federation import messages
from nnunet_fedharm.federation.codec import encode
from nnunet_fedharm.federation.entries import RELEASES, digest_of, enter_release
from nnunet_fedharm.federation.messages import json_hash, reply
from nnunet_fedharm.privacy.ledger import Ledger

TRAIN = {"phase": "segmenter", "round": 2, "run_id": "run"}


def answer(value: float, **config: float) -> RecordDict:
    weights = encode({"w": np.full(3, value, dtype=np.float32)})
    return RecordDict({"config": ConfigRecord({"site": "A", **config}), "weights": weights})


def test_a_round_is_entered_by_name_and_makes_the_total_unbounded(tmp_path: Path) -> None:
    enter_release(tmp_path, messages.TRAIN.name, TRAIN, answer(1.0))
    assert Ledger(tmp_path).spent(1e-5).unbounded == ("weights and metrics, segmenter round 3",)
    assert Ledger(tmp_path).releases()[0].run_id == "run"


def test_the_same_reply_once_more_is_one_entry_and_another_one_is_another(tmp_path: Path) -> None:
    for content in (answer(1.0, seconds=1.0), answer(1.0, seconds=2.0), answer(2.0, seconds=1.0)):
        enter_release(tmp_path, messages.TRAIN.name, TRAIN, content)
    assert len(Ledger(tmp_path).releases()) == 2
    assert digest_of(answer(1.0, n_cases=3)) != digest_of(answer(1.0, n_cases=4))


def test_a_round_that_took_longer_the_second_time_is_the_same_round() -> None:
    def digest(dice: float, seconds: float) -> str:
        values = {
            "site": "A",
            "phase": "segmenter",
            "round": 2,
            "plans_hash": json_hash({}),
            "n_steps": 1,
            "n_cases": 1,
        }
        values |= {"metrics": {"dice": dice, "seconds": seconds}, "seconds": seconds}
        return digest_of(reply(messages.TRAIN_REPLY, values, encode({"w": np.ones(3, dtype=np.float32)})))

    assert digest(0.5, 1.0) == digest(0.5, 2.0) != digest(0.6, 1.0)


def test_what_tells_nothing_about_patients_is_not_entered(tmp_path: Path) -> None:
    enter_release(tmp_path, messages.FINISH.name, TRAIN, answer(1.0))
    assert Ledger(tmp_path).releases() == []


def test_nothing_is_sent_where_the_entry_cannot_be_stored(tmp_path: Path) -> None:
    Ledger(tmp_path).path.write_text("nonsense\n")
    with pytest.raises(PrivacyError, match="backup"):
        enter_release(tmp_path, messages.TRAIN.name, TRAIN, answer(1.0))


def test_every_request_of_a_training_run_is_decided() -> None:
    handled = {"preflight", "summarize", "prepare", "store_plans", "train", "finish"}
    assert {getattr(messages, name.upper()).name for name in handled} <= set(RELEASES)
