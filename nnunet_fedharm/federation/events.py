"""The server's event log: one JSON object a line, for the terminal, for tests and for later reading.

Events name sites and rounds, never cases.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

_logger = logging.getLogger(__name__)

EVENTS_FILE = "events.jsonl"
GOOD_ENDS = ("finished", "reported")
_TO_SECONDS = len("2026-01-31T23:59:59")
_STARTS = ("started", "report_started")
_ENDS = (*GOOD_ENDS, "failed")


class EventLog:
    """Appends events to a file; the file is opened for each one, so it may be moved away at any time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, event: str, **details: Any) -> None:
        """Append one event; numbers that are not finite become null."""
        entry = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event}
        entry |= {key: _plain(value) for key, value in details.items()}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+") as stream:
                # A crash or a full disk may have left half a line: it must not swallow this one.
                start = b"" if _ends_whole(stream) else b"\n"
                stream.write(start + json.dumps(entry, allow_nan=False).encode() + b"\n")
        except OSError as error:
            # A full disk must not hide the error that is being reported.
            _logger.error("Cannot write the event %r to %s: %s", event, self.path, error.strerror)


def ends_run(event: Mapping[str, Any]) -> bool:
    """Whether an event is the last one of the run that goes on.

    A run that was turned away because another one goes on in the same folder writes `failed` with `other_run`: the end of
    itself alone.
    """
    return event["event"] in _ENDS and not is_turned_away(event)


def is_turned_away(event: Mapping[str, Any]) -> bool:
    """Whether an event says that a run could not begin, because another one goes on in the same folder."""
    return bool(event.get("other_run"))


def read_events(path: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Complete lines from a byte offset on, and the offset to go on from; a half-written line is left for later.

    Lines that are no event, left by a crash or a full disk, are skipped.
    """
    if not path.exists():
        return [], offset
    with path.open("rb") as stream:
        stream.seek(offset)
        data = stream.read()
    complete = data[: data.rfind(b"\n") + 1]
    return list(_parse(complete)), offset + len(complete)


def last_start(path: Path, *, since: str) -> int:
    """Byte offset of the last run's or report's beginning; the file's end where nothing has begun yet.

    Args:
        since: when the run was submitted, UTC, ISO 8601; what began before is another run's.
    """
    data = path.read_bytes() if path.exists() else b""
    place, position = len(data), 0
    for line in data.splitlines(keepends=True):
        begun = [event for event in _parse(line) if event["event"] in _STARTS]
        if begun and str(begun[0].get("time"))[:_TO_SECONDS] >= since[:_TO_SECONDS]:
            place = position
        position += len(line)
    return place


def _parse(data: bytes) -> Iterator[dict[str, Any]]:
    for line in data.split(b"\n"):
        try:
            event = json.loads(line)
        except ValueError:  # also the empty text after the last line
            continue
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            yield event


def _ends_whole(stream: BinaryIO) -> bool:
    if not stream.seek(0, os.SEEK_END):
        return True
    stream.seek(-1, os.SEEK_END)
    return stream.read(1) == b"\n"


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
