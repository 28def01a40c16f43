"""Schema of every message: keys, types and bounds, checked when packed and when unpacked.

A message is a RecordDict with one ConfigRecord `config` and, where the schema says so, one ArrayRecord `weights`. Structured
values travel as strict JSON text. A reply has `status`: "ok", or "error" with `kind` and `text` (one sentence without any
case identifier).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from nnunet_fedharm.errors import FederationError

PHASES = ("harmonizer", "segmenter")
_CONFIG, _WEIGHTS = "config", "weights"
_KIB, _MIB = 2**10, 2**20


class SiteFailure(FederationError):
    """A site could not do what it was asked; carries what it said.

    Attributes:
        kind: class name of the error at the site.
    """

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


@dataclass(frozen=True)
class Item:
    """One key of a message.

    Attributes:
        type: str, int, float, bool, or dict for a JSON object sent as text.
        most: largest number, or longest text in characters.
        least: smallest number.
        pattern: what a text has to look like.
        numbers: the only names that a JSON object may have, all of them with finite numbers; empty for any object.
    """

    type: type
    most: float = 256
    least: float = 0
    pattern: str | None = None
    numbers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Schema:
    """All keys of one message.

    Attributes:
        name: for error messages, "train request" for instance.
        items: key -> type and bounds; every key is required and no other is allowed.
        weights: whether an ArrayRecord travels along.
    """

    name: str
    items: Mapping[str, Item]
    weights: bool = False


RUN_ID = Item(str, 40, pattern=r"[0-9a-f]{12}-[0-9a-f]{6}")
DATASET = Item(str, 128, pattern=r"(\d{1,3}|Dataset\d{3}_[A-Za-z0-9_.-]+)")
DATASET_NAME = Item(str, 128, pattern=r"Dataset\d{3}_[A-Za-z0-9_.-]+")
SITE = Item(str, 64, pattern=r"[A-Za-z0-9][A-Za-z0-9_.-]*")
HASH = Item(str, 64, pattern=r"([0-9a-f]{64})?")
WORD = Item(str, 64, pattern=r"[A-Za-z0-9_]+")
CONFIGURATION = Item(str, 16, pattern="2d|3d_fullres")
COUNT = Item(int, 10**9)
SECONDS = Item(float, 10**9)
FLAG = Item(bool, 1)
PLANS = Item(dict, 8 * _MIB)
DATASET_JSON = Item(dict, 1 * _MIB)
FINGERPRINT = Item(dict, 32 * _MIB)
PHASE = Item(str, 16, pattern="|".join(PHASES))
PLANS_HASH = Item(str, 64, pattern="[0-9a-f]{64}")
METRICS = ("train_loss", "val_loss", "dice", "seconds", "epsilon")
GROUPS = Item(str, 64, pattern=r"([a-z]+(,[a-z]+)*)?")

_TRAINING = {
    "run_id": RUN_ID,
    "dataset_name": DATASET_NAME,
    "configuration": CONFIGURATION,
    "fold": Item(str, 3, pattern="all|[0-4]"),
    "trainer_name": WORD,
    "plans_hash": PLANS_HASH,
    "seed": Item(int, 2**62),
    "local_groups": GROUPS,
}

PREFLIGHT = Schema("preflight request", {"run_id": RUN_ID, "dataset": DATASET, "check_data": FLAG})
PREFLIGHT_REPLY = Schema("preflight reply", {"site": SITE, "facts": Item(dict, 256 * _KIB), "plans_hash": HASH})
_STATISTICS = {
    "run_id": RUN_ID,
    "dataset_name": DATASET_NAME,
    "noise": Item(float, 10**6),
    "epsilon": Item(float, 10**6),
    "delta": Item(float, 1),
}
"""Noise multiplier of what is asked for, and the budget of the run; zeros without differential privacy."""
SUMMARIZE = Schema("summarize request", {**_STATISTICS, "summed_over": COUNT, "colluding": COUNT})
SUMMARIZE_REPLY = Schema("summarize reply", {"site": SITE, "summary": Item(dict, 4 * _MIB)})
PREPARE = Schema(
    "prepare request",
    {
        **_STATISTICS,
        "styled": FLAG,
        "configuration": CONFIGURATION,
        "plans": PLANS,
        "dataset_json": DATASET_JSON,
        "fingerprint": FINGERPRINT,
    },
)
PREPARE_REPLY = Schema("prepare reply", {"site": SITE, "style": Item(dict, 256 * _KIB), "seconds": SECONDS})
STORE_PLANS = Schema(
    "plans request",
    {
        "run_id": RUN_ID,
        "dataset_name": DATASET_NAME,
        "plans": PLANS,
        "dataset_json": DATASET_JSON,
        "fingerprint": FINGERPRINT,
    },
)
STORE_PLANS_REPLY = Schema("plans reply", {"site": SITE, "plans_hash": HASH})
TRAIN = Schema(
    "train request",
    {
        **_TRAINING,
        "phase": PHASE,
        "round": COUNT,
        "first_epoch": COUNT,
        "epochs": Item(int, 10**6, 1),
        "fp16": FLAG,
        "proximal_mu": Item(float, 10**6),
        "scaffold": FLAG,
        "counted": Item(dict, 64 * _KIB),
        "site_dp": Item(dict, _KIB),
        "shared_steps": Item(dict, _KIB),
    },
    weights=True,
)
TRAIN_REPLY = Schema(
    "train reply",
    {
        "site": SITE,
        "phase": PHASE,
        "round": COUNT,
        "plans_hash": PLANS_HASH,
        "n_steps": COUNT,
        "n_cases": COUNT,
        "metrics": Item(dict, 1 * _KIB, numbers=METRICS),
        "seconds": SECONDS,
    },
    weights=True,
)
FINISH = Schema("finish request", {**_TRAINING, "epoch": COUNT, "privacy": Item(dict, 16 * _KIB)}, weights=True)
FINISH_REPLY = Schema("finish reply", {"site": SITE})


@dataclass(frozen=True)
class Unpacked:
    """A message whose keys, types and bounds hold; the weights are still encoded."""

    values: dict[str, Any]
    weights: ArrayRecord = field(default_factory=ArrayRecord)


def pack(schema: Schema, values: Mapping[str, Any], weights: ArrayRecord | None = None) -> RecordDict:
    """A message's content.

    Raises:
        FederationError: a key is missing, unknown, of another type or out of bounds.
    """
    _check_keys(schema, set(values), "the sender")
    config = ConfigRecord({key: _to_wire(schema, key, values[key]) for key in schema.items})
    return _with_weights(schema, config, weights)


def reply(schema: Schema, values: Mapping[str, Any], weights: ArrayRecord | None = None) -> RecordDict:
    """A successful reply's content."""
    content = pack(schema, values, weights)
    content.config_records[_CONFIG]["status"] = "ok"
    return content


def error_reply(kind: str, text: str) -> RecordDict:
    """The reply of a site that could not do what it was asked. The text may not name a case."""
    return RecordDict({_CONFIG: ConfigRecord({"status": "error", "kind": kind[:64], "text": text[:2000]})})


def unpack(schema: Schema, content: RecordDict, *, source: str) -> Unpacked:
    """Check a request.

    Raises:
        FederationError: it does not follow the schema; the message names the key and who sent it.
    """
    config = content.config_records.get(_CONFIG)
    if config is None:
        raise FederationError(f"The {schema.name} from {source} has no config record.")
    return _unpack(schema, dict(config), content, source)


def unpack_reply(schema: Schema, content: RecordDict, *, source: str) -> Unpacked:
    """Check a reply.

    Raises:
        SiteFailure: the site says that it failed.
        FederationError: it does not follow the schema.
    """
    config = content.config_records.get(_CONFIG)
    if config is None:
        raise FederationError(f"The {schema.name} from {source} has no config record.")
    values: dict[str, Any] = dict(config)
    status = values.pop("status", None)
    if status == "error":
        raise SiteFailure(
            _printable(values.get("kind", ""), 64), _printable(values.get("text", "no reason given"), 2000)
        )
    if status != "ok":
        raise FederationError(f"The {schema.name} from {source} has the status {status!r}.")
    return _unpack(schema, values, content, source)


def json_hash(data: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON object, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _unpack(schema: Schema, values: dict[str, Any], content: RecordDict, source: str) -> Unpacked:
    odd = sorted(set(content) - {_CONFIG, _WEIGHTS})
    if odd:  # nobody would read it, and nothing bounds it
        raise FederationError(f"The {schema.name} from {source} has the unknown record {_printable(odd[0], 64)!r}.")
    _check_keys(schema, set(values), source)
    checked = {key: _from_wire(schema, key, values[key], source) for key in schema.items}
    arrays = content.array_records.get(_WEIGHTS)
    if (arrays is not None) != schema.weights:
        raise FederationError(
            f"The {schema.name} from {source} {'lacks its' if schema.weights else 'carries'} weights."
        )
    return Unpacked(checked, arrays if arrays is not None else ArrayRecord())


def _with_weights(schema: Schema, config: ConfigRecord, weights: ArrayRecord | None) -> RecordDict:
    if (weights is not None) != schema.weights:
        raise FederationError(f"The {schema.name} {'needs' if schema.weights else 'takes no'} weights.")
    return RecordDict({_CONFIG: config} if weights is None else {_CONFIG: config, _WEIGHTS: weights})


def _check_keys(schema: Schema, found: set[str], source: str) -> None:
    wanted = set(schema.items)
    if found != wanted:
        odd = sorted(found ^ wanted)[0]
        state = "lacks" if odd in wanted else "has the unknown key"
        raise FederationError(
            f"The {schema.name} from {source} {state} {odd!r}. Install the same nnunet_fedharm everywhere."
        )


def _to_wire(schema: Schema, key: str, value: Any) -> Any:
    item = schema.items[key]
    if item.type is dict:
        _check_numbers(value, item.numbers, f"{key} of the {schema.name}")
        try:
            value = json.dumps(value, allow_nan=False, separators=(",", ":"))
        except (TypeError, ValueError) as error:
            raise FederationError(f"{key} of the {schema.name} is not plain JSON: {error}.") from error
    _check_value(schema, key, value, "the sender")
    return value


def _from_wire(schema: Schema, key: str, value: Any, source: str) -> Any:
    _check_value(schema, key, value, source)
    if schema.items[key].type is not dict:
        return value
    try:
        data = json.loads(value, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise FederationError(f"{key} of the {schema.name} from {source} is not JSON.") from error
    if not isinstance(data, dict):
        raise FederationError(f"{key} of the {schema.name} from {source} is not a JSON object.")
    _check_numbers(data, schema.items[key].numbers, f"{key} of the {schema.name} from {source}")
    return data


def _check_numbers(data: Mapping[str, Any], names: tuple[str, ...], where: str) -> None:
    for name, value in data.items() if names else ():
        if name not in names or type(value) not in (int, float) or not math.isfinite(value):
            raise FederationError(f"{where} has {name[:80]!r}; only finite numbers named {', '.join(names)} are read.")


def _printable(value: Any, most: int) -> str:
    """Text of a site as it may be shown on a terminal and stand in a log."""
    return "".join(sign if sign.isprintable() else " " for sign in str(value)[:most])


def _refuse_constant(text: str) -> float:
    raise ValueError(text)


def _check_value(schema: Schema, key: str, value: Any, source: str) -> None:
    item = schema.items[key]
    wanted = str if item.type is dict else item.type
    where = f"{key} of the {schema.name} from {source}"
    if type(value) is not wanted:
        raise FederationError(f"{where} is {type(value).__name__}, expected {wanted.__name__}.")
    if isinstance(value, str):
        if len(value) > item.most:
            raise FederationError(f"{where} has {len(value)} characters; at most {item.most:.0f} are read.")
        if item.pattern is not None and not re.fullmatch(item.pattern, value):
            raise FederationError(f"{where} is {value[:80]!r}, which is not allowed there.")
    elif isinstance(value, int | float) and not item.least <= value <= item.most:
        raise FederationError(f"{where} is {value}; allowed is {item.least:.0f} to {item.most:.0f}.")
