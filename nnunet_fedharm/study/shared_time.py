"""Seconds of planning and preprocessing that cells of a study share, and that each of them would need if it were alone.

data/clock.json

| key | took |
|---|---|
| pooled_s | fingerprint, plans and preprocessing of the pooled cases, for every central cell |
| own_s | site -> preprocessing of its cases with its own labels, for its local cells |
| federated_s | from the start of the first federated cell that preprocessed to its first round |
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from nnunet_fedharm.federation.durable import file_lock
from nnunet_fedharm.sites.files import read_json, write_json

CLOCK_FILE = "clock.json"


def write_prepared(data: Path, *, pooled_s: float, own_s: Mapping[str, float]) -> None:
    """Of `study prepare`, in the folder of a study's data."""
    write_json({"pooled_s": pooled_s, "own_s": dict(own_s)}, data / CLOCK_FILE)


def central_seconds(data: Path, site: str) -> float | None:
    """What was made before a central cell, or the local one of a site; None where an earlier release did not write it down."""
    known = _read(data)
    seconds = known.get("own_s", {}).get(site) if site else known.get("pooled_s")
    return None if seconds is None else float(seconds)


def federated_seconds(data: Path, prepared_s: float) -> float:
    """What a federated cell was spared; the first one tells what there is to spare.

    Args:
        prepared_s: of this cell, as `seconds_before_rounds` counts it.
    """
    with file_lock(data / f"{CLOCK_FILE}.lock"):
        known = _read(data)
        if "federated_s" not in known:
            write_json({**known, "federated_s": prepared_s}, data / CLOCK_FILE)
    return max(0.0, float(known.get("federated_s", prepared_s)) - prepared_s)


def seconds_before_rounds(events: Iterable[Mapping[str, Any]]) -> float:
    """From a run's start to its first round, without the time in which a stopped run stood still."""
    total, began, last = 0.0, None, None
    for event in events:
        now = datetime.fromisoformat(event["time"])
        if event["event"] == "started":
            total += (last - began).total_seconds() if began and last else 0.0
            began = now
        if event["event"] == "round_start":
            return total + ((now - began).total_seconds() if began else 0.0)
        last = now
    return total


def _read(data: Path) -> dict[str, Any]:
    file = data / CLOCK_FILE
    return read_json(file, what="The clock of the study's data") if file.is_file() else {}
