"""Which replies of a site tell something about its patients, entered in the site's ledger before they leave it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, RecordDict

from nnunet_fedharm.federation import messages
from nnunet_fedharm.privacy.ledger import Ledger
from nnunet_fedharm.privacy.releases import ANNOUNCED, NONE, Release

_NOT_CONTENT = ("seconds", "status", "plans_hash", "run_id")
"""Keys of replies that say nothing about patients and change from one sending to the next."""

FACTS = "facts: numbers of cases, labels, versions"
"""Public by agreement: every epsilon here is of data sets with the same numbers, one patient's data replaced by nothing."""

RELEASES: dict[str, Callable[[Mapping[str, Any]], str] | None] = {
    messages.PREFLIGHT.name: lambda request: FACTS,
    messages.SUMMARIZE.name: lambda request: "fingerprint summary",
    messages.PREPARE.name: lambda request: "style",
    messages.TRAIN.name: lambda request: (
        f"weights and metrics{' and control variate' * request.get('scaffold', False)}, "
        f"{request['phase']} round {request['round'] + 1}"
    ),
    messages.STORE_PLANS.name: None,
    messages.FINISH.name: None,
}
"""Request -> name of what the reply releases without noise; None where the reply tells nothing about a patient. A handler that
is not listed here enters its releases itself."""


def enter_release(folder: Path, request: str, values: Mapping[str, Any], content: RecordDict) -> None:
    """Enter a reply; the same content once more (asked again after a crash, by a rejoining node) is not entered twice.

    Args:
        folder: the site's own folder.
        request: name of the request's schema.
        values: of the request.
        content: of the reply, which must not be sent where this raises.

    Raises:
        PrivacyError: the ledger is damaged or cannot be written.
    """
    name = RELEASES.get(request)
    if name is None:
        return
    what = name(values)
    mechanism = ANNOUNCED if what == FACTS else NONE
    release = Release(what=what, mechanism=mechanism, run_id=values.get("run_id", ""), digest=digest_of(content))
    Ledger(folder).record(release)


def begin_ledger(folder: Path, run_id: str) -> None:
    """The entry of the facts, where a site has none of any run: its folder was cleared within this one, which told them.

    Raises:
        PrivacyError: the ledger is damaged, or is missing where others of the site's files are left.
    """
    ledger = Ledger(folder)
    if not ledger.releases():
        ledger.record(Release(what=FACTS, mechanism=ANNOUNCED, run_id=run_id))


def digest_of(content: RecordDict) -> str:
    """SHA-256 of what a reply says about patients."""
    total = hashlib.sha256()
    for config in content.config_records.values():
        told = {key: _told(key, config[key]) for key in sorted(config) if key not in _NOT_CONTENT}
        total.update(json.dumps(told, default=repr).encode())
    for arrays in content.array_records.values():
        _add_arrays(total, arrays)
    return total.hexdigest()


def _told(key: str, value: Any) -> Any:
    """A value; of metrics, which travel as JSON, all but how long they took."""
    if key != "metrics" or not isinstance(value, str):
        return value
    return {name: number for name, number in json.loads(value).items() if name not in _NOT_CONTENT}


def _add_arrays(total: Any, arrays: ArrayRecord) -> None:
    for name in sorted(arrays):
        total.update(name.encode())
        total.update(arrays[name].data)
