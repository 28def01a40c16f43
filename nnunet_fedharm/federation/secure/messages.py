"""Messages of a secure sum: four requests with their answers, each with bounds; bytes travel as base64 in JSON."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from nnunet_fedharm.errors import FederationError
from nnunet_fedharm.federation.messages import COUNT, PHASE, PLANS_HASH, SITE, Item, Schema
from nnunet_fedharm.privacy.secure_aggregation import Locked

_KIB, _MIB = 2**10, 2**20
KEY = Item(str, 200, pattern=r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*")
"""Name of what is summed, "<run>/<phase>/<round>" for instance."""
SESSION = Item(str, 32, pattern="[0-9a-f]{32}")
WEIGHT = Item(str, 32, pattern="[a-z]+")

SETUP = Schema("secure setup request", {"key": KEY, "terms": Item(dict, 8 * _MIB), "weight": WEIGHT})
SETUP_REPLY = Schema("secure setup reply", {"site": SITE, "advert": Item(dict, 4 * _KIB)})
SHARE = Schema("secure share request", {"session": SESSION, "adverts": Item(dict, 4 * _MIB)})
SHARE_REPLY = Schema("secure share reply", {"site": SITE, "sealed": Item(dict, 4 * _MIB)})
MASK = Schema("secure mask request", {"session": SESSION, "sealed": Item(dict, 4 * _MIB)})
MASK_REPLY = Schema("secure mask reply", {"site": SITE}, weights=True)
UNMASK = Schema("secure unmask request", {"session": SESSION, "answers": Item(dict, 1 * _MIB)})
UNMASK_REPLY = Schema("secure unmask reply", {"site": SITE, "shares": Item(dict, 4 * _MIB)})
TRAIN_REPLY = Schema(
    "secure train reply", {"site": SITE, "phase": PHASE, "round": COUNT, "plans_hash": PLANS_HASH}, weights=True
)
"""After local training: the update stays at the site, only its own rows of tables travel."""

MASKED = "masked"
"""The array of a masked vector, bytes."""


def to_text(parts: Mapping[str, bytes]) -> dict[str, str]:
    """Bytes by name as they travel."""
    return {name: base64.b64encode(data).decode() for name, data in parts.items()}


def to_bytes(parts: Any, *, source: str) -> dict[str, bytes]:
    """Inverse of `to_text`.

    Raises:
        FederationError: it is something else.
    """
    if not isinstance(parts, dict) or not all(isinstance(text, str) for text in parts.values()):
        raise FederationError(f"The bytes of a secure sum from {source} cannot be read.")
    try:
        return {str(name): base64.b64decode(text, validate=True) for name, text in parts.items()}
    except ValueError as error:
        raise FederationError(f"The bytes of a secure sum from {source} cannot be read.") from error


def shares_to_dict(locked: Locked) -> dict[str, dict[str, str]]:
    """As they travel."""
    own = {"shares": locked.shares, "piece": locked.piece}
    return {"own": to_text(own), "pieces": to_text(locked.pieces), "openers": to_text(locked.openers)}


def shares_from_dict(data: Mapping[str, Any], *, source: str) -> Locked:
    """Inverse of `shares_to_dict`.

    Raises:
        FederationError: it is something else.
    """
    if set(data) != {"own", "pieces", "openers"}:
        raise FederationError(f"The shares from {source} cannot be read.")
    own, pieces, openers = (to_bytes(data[name], source=source) for name in ("own", "pieces", "openers"))
    if set(own) != {"shares", "piece"}:
        raise FederationError(f"The shares from {source} cannot be read.")
    return Locked(own["shares"], own["piece"], pieces, openers)


def names_of(data: Mapping[str, Any], key: str) -> list[str]:
    """A list of sites out of a JSON object.

    Raises:
        FederationError: it is something else.
    """
    names = data.get(key)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FederationError(f"The request to unmask lacks the list {key!r}.")
    return list(names)
