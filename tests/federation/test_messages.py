"""Schemas: what is packed is what is unpacked, and everything else is refused by key."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict

from nnunet_fedharm.errors import FederationError
from nnunet_fedharm.federation.codec import encode
from nnunet_fedharm.federation.messages import (
    PREFLIGHT,
    PREFLIGHT_REPLY,
    TRAIN,
    TRAIN_REPLY,
    Schema,
    SiteFailure,
    error_reply,
    json_hash,
    pack,
    reply,
    unpack,
    unpack_reply,
)

RUN = "0123456789ab-cdef01"
HELLO: dict[str, Any] = {"run_id": RUN, "dataset": "910", "check_data": True}
TRAINING: dict[str, Any] = {
    "run_id": RUN,
    "dataset_name": "Dataset001_Blobs",
    "configuration": "2d",
    "fold": "all",
    "trainer_name": "nnUNetTrainerFedHarmNone",
    "plans_hash": "0" * 64,
    "seed": 1,
    "local_groups": "",
    "proximal_mu": 0.0,
    "scaffold": False,
    "counted": {},
    "site_dp": {},
    "shared_steps": {},
    "phase": "segmenter",
    "round": 0,
    "first_epoch": 0,
    "epochs": 1,
    "fp16": False,
}


def test_a_request_comes_back_as_it_was_packed() -> None:
    assert unpack(PREFLIGHT, pack(PREFLIGHT, HELLO), source="the server").values == HELLO


def test_json_keeps_the_order_of_keys() -> None:
    labels = {"background": 0, "z": 1, "a": 2}
    content = reply(PREFLIGHT_REPLY, {"site": "A", "facts": {"labels": labels}, "plans_hash": ""})
    values = unpack_reply(PREFLIGHT_REPLY, content, source="A").values
    assert list(values["facts"]["labels"]) == ["background", "z", "a"]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("run_id", "../../etc", "not allowed there"),
        ("dataset_name", "Dataset001_../x", "not allowed there"),
        ("phase", "other", "not allowed there"),
        ("fold", "7", "not allowed there"),
        ("epochs", 0, "allowed is 1"),
        ("round", -1, "allowed is 0"),
        ("round", 1.5, "is float, expected int"),
        ("fp16", 1, "is int, expected bool"),
        ("trainer_name", "x" * 65, "65 characters"),
    ],
)
def test_values_out_of_bounds_are_refused_by_key(key: str, value: object, words: str) -> None:
    content = pack(TRAIN, TRAINING, encode({"w": np.zeros(1, np.float32)}))
    content.config_records["config"][key] = value  # type: ignore[assignment]
    with pytest.raises(FederationError, match=f"^{key} of the train request from the server .*{words}"):
        unpack(TRAIN, content, source="the server")


def test_missing_and_unknown_keys_are_refused() -> None:
    content = pack(PREFLIGHT, HELLO)
    del content.config_records["config"]["dataset"]
    with pytest.raises(FederationError, match="lacks 'dataset'"):
        unpack(PREFLIGHT, content, source="x")
    content = pack(PREFLIGHT, HELLO)
    content.config_records["config"]["more"] = 1
    with pytest.raises(FederationError, match="has the unknown key 'more'"):
        unpack(PREFLIGHT, content, source="x")
    with pytest.raises(FederationError, match="has no config record"):
        unpack(PREFLIGHT, RecordDict(), source="x")


def test_weights_travel_exactly_where_the_schema_says_so() -> None:
    with pytest.raises(FederationError, match="The train request needs weights"):
        pack(TRAIN, TRAINING)
    content = pack(TRAIN, TRAINING, encode({"w": np.zeros(1, np.float32)}))
    del content["weights"]
    with pytest.raises(FederationError, match="lacks its weights"):
        unpack(TRAIN, content, source="x")


def test_an_error_reply_raises_with_the_sites_sentence() -> None:
    with pytest.raises(SiteFailure, match="Site B: no dataset") as caught:
        unpack_reply(PREFLIGHT_REPLY, error_reply("DataError", "Site B: no dataset"), source="B")
    assert caught.value.kind == "DataError"


def test_json_that_is_too_long_or_not_finite_is_refused() -> None:
    with pytest.raises(FederationError, match="characters; at most"):
        reply(PREFLIGHT_REPLY, {"site": "A", "facts": {"x": "y" * 300_000}, "plans_hash": ""})
    with pytest.raises(FederationError, match="not plain JSON"):
        reply(PREFLIGHT_REPLY, {"site": "A", "facts": {"x": float("nan")}, "plans_hash": ""})
    forged = RecordDict(
        {"config": ConfigRecord({"status": "ok", "site": "A", "facts": '{"x": NaN}', "plans_hash": ""})}
    )
    with pytest.raises(FederationError, match="is not JSON"):
        unpack_reply(PREFLIGHT_REPLY, forged, source="A")


def test_the_hash_of_plans_ignores_the_order_of_keys() -> None:
    assert json_hash({"a": 1, "b": [2]}) == json_hash({"b": [2], "a": 1})
    assert json_hash({"a": 1}) != json_hash({"a": 2})


TRAINED: dict[str, Any] = {
    "site": "A",
    "phase": "segmenter",
    "round": 0,
    "plans_hash": "0" * 64,
    "n_steps": 1,
    "n_cases": 2,
    "metrics": {"train_loss": 1.0, "dice": 0.5},
    "seconds": 1.0,
}


@pytest.mark.parametrize(
    "metrics",
    [{"case_0001": 1.0}, {"dice": [0.5] * 4}, {"dice": "0.5"}, {"dice": True}, {"dice": {"case_0001": 0.5}}],
)
def test_metrics_are_a_few_known_numbers_when_sent_and_when_read(metrics: dict[str, Any]) -> None:
    weights = encode({"w": np.zeros(2, np.float32)})
    with pytest.raises(FederationError, match="only finite numbers named train_loss"):
        reply(TRAIN_REPLY, {**TRAINED, "metrics": metrics}, weights)
    content = reply(TRAIN_REPLY, TRAINED, weights)
    assert unpack_reply(TRAIN_REPLY, content, source="A").values["metrics"] == TRAINED["metrics"]
    content.config_records["config"]["metrics"] = json.dumps(metrics)
    with pytest.raises(FederationError, match="only finite numbers named train_loss"):
        unpack_reply(TRAIN_REPLY, content, source="A")


def test_a_sites_sentence_cannot_write_on_the_operators_terminal() -> None:
    with pytest.raises(SiteFailure) as caught:
        unpack_reply(PREFLIGHT_REPLY, error_reply("Kind\n", "bad\x1b[2J\nline"), source="A")
    assert str(caught.value) == "bad [2J line"
    assert caught.value.kind == "Kind "


def test_no_item_of_any_message_is_unbounded() -> None:
    from nnunet_fedharm.federation import messages
    from nnunet_fedharm.federation.report import messages as report
    from nnunet_fedharm.federation.secure import messages as secure

    schemas = [
        value for room in (messages, report, secure) for value in vars(room).values() if isinstance(value, Schema)
    ]
    assert len(schemas) > 20
    for schema in schemas:
        for key, item in schema.items.items():
            assert item.type in (str, int, float, bool, dict), (schema.name, key)
            assert 0 < item.most <= (64 * 2**20 if item.type is dict else 2**62), (schema.name, key)
            assert item.type is not str or item.most <= 256, (schema.name, key)
            assert item.type is not str or item.pattern is not None, (schema.name, key)
