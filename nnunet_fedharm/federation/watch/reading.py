"""From the server's folder to a `RunView`: events, the state's history, and whether the server's process is there."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from nnunet_fedharm.errors import FederationError
from nnunet_fedharm.federation.events import EVENTS_FILE, read_events
from nnunet_fedharm.federation.watch.sites import site_view
from nnunet_fedharm.federation.watch.story import Event, RoundStory, Story, finish_round, numbers, whole
from nnunet_fedharm.federation.watch.view import (
    FAILED,
    FINISHED,
    RUNNING,
    STALLED,
    STOPPED,
    RoundView,
    RunView,
    SiteRound,
)

STALLED_AFTER_S = 300.0
"""A server that waits says so every 15 s; planning, preprocessing checks and writing a model take longer, but not this long."""
_LAST = 5
"""Rounds that the expected end is estimated from."""


def server_root(root: Path | None, server: Path | None) -> Path:
    """The server's folder, from ROOT or as it is given; the folder of `server init` is understood too.

    Raises:
        FederationError: there is no event log.
    """
    given = server if server is not None else (root or Path()) / "server"
    given = given.expanduser()
    for folder in (given, given / "server"):
        if (folder / "fedharm" / EVENTS_FILE).is_file():
            return folder
    raise FederationError(
        f"There is no event log {given / 'fedharm' / EVENTS_FILE}: no run has begun there. Give --root the folder with sites/ "
        "and server/ in it, or --server-root the server's own folder."
    )


@dataclass
class Reading:
    """What was read of a log before; a look at a run of weeks then costs the lines that have come since."""

    events: list[Event] = field(default_factory=list)
    offset: int = 0
    first: bytes = b""
    """Beginning of the file: another one means that the log was started anew."""

    def read(self, path: Path) -> list[Event]:
        """All events."""
        with path.open("rb") as stream:
            first = stream.read(256)
        if path.stat().st_size < self.offset or not first.startswith(self.first):
            self.events, self.offset = [], 0
        self.first = first
        more, self.offset = read_events(path, self.offset)
        self.events += more
        return self.events


def read_run(
    folder: Path,
    *,
    stalled_after_s: float = STALLED_AFTER_S,
    now: datetime | None = None,
    before: Reading | None = None,
) -> RunView:
    """The newest run of a server.

    Args:
        folder: the server's folder.
        before: of an earlier look at the same server, for the next ones.
        stalled_after_s: seconds without an event after which a run counts as stalled.
        now: for tests.

    Raises:
        FederationError: the log has no run.
    """
    now = now or datetime.now(UTC)
    path = folder / "fedharm" / EVENTS_FILE
    try:
        events = (before or Reading()).read(path) if path.exists() else []
    except OSError as error:
        raise FederationError(
            f"Cannot read {path}: {error.strerror}. Ask whoever runs the server for the right."
        ) from error
    chosen = last_run(events)
    if not chosen:
        raise FederationError(f"{path} has no run in it yet.")
    story = Story()
    for event in chosen:
        story.tell(event)
    kept = _kept(folder / "fedharm" / story.run_id / "state.json")
    _add_history(story, kept.history)
    alive = is_locked(folder / "fedharm" / "server.lock")
    return _view(story, kept, alive, now, stalled_after_s)


def last_run(events: Sequence[Event]) -> list[Event]:
    """The events of the newest run, from its first start on; what other runs did in between is left out."""
    segments: list[tuple[str, list[Event]]] = [("", [])]
    for event in events:
        if event["event"] in ("started", "report_started"):
            segments.append((str(event.get("run_id", "")), []))
        segments[-1][1].append(event)
    newest = segments[-1][0]
    return [event for run_id, part in segments if run_id == newest for event in part]


@dataclass(frozen=True)
class _Kept:
    """What the server's state adds to the events: configuration, and rounds whose last event a crash swallowed."""

    config: Mapping[str, Any]
    history: Sequence[Event]


def _kept(path: Path) -> _Kept:
    try:
        content = json.loads(path.read_bytes())["content"]
        return _Kept(dict(content["config"]), [dict(entry) for entry in content["history"]])
    except (OSError, ValueError, KeyError, TypeError):
        return _Kept({}, [])  # a copied log without its state, or a site report: the events alone have to do


def _add_history(story: Story, history: Sequence[Event]) -> None:
    for values in history:
        entry = story.round_of(values)
        if entry.seconds is None:
            finish_round(entry, values)
            entry.ended = entry.ended or story.last
            if story.current == (values.get("phase"), values.get("round")):
                story.current = None


def is_locked(path: Path) -> bool | None:
    """Whether the server's process holds its lock; None where that cannot be told (other machine, other system)."""
    if os.name != "posix" or not path.is_file():
        return None
    import fcntl  # not on every system

    try:
        with path.open("rb") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False
    except OSError:
        return None


def _view(story: Story, kept: _Kept, alive: bool | None, now: datetime, stalled_after_s: float) -> RunView:
    state, reason = _state(story, alive, now, stalled_after_s)
    rounds = [_round(key, entry) for key, entry in sorted(story.rounds.items(), key=_in_order)]
    phase, number = story.current or max(story.rounds, key=lambda key: (key[0] == "segmenter", key[1]), default=("", 0))
    totals = story.totals | {name: whole(kept.config.get(f"{name}_rounds")) for name in _PHASES if kept.config}
    config_sites = tuple(sorted(filter(None, str(kept.config.get("sites", "")).split(","))))
    expected = config_sites or story.expected or tuple(sorted({*story.seen, *story.there}))
    secure = str(kept.config.get("secure_aggregation", "off")) != "off"
    return RunView(
        run_id=story.run_id,
        state=state,
        reason=reason,
        step=story.step,
        phase=phase,
        number=number,
        total=totals.get(phase, 0),
        started=story.started,
        last_event=story.last,
        expected_end=_expected_end(story, rounds, totals, now) if state == RUNNING else None,
        now=now,
        rounds=rounds,
        sites=[site_view(site, story, rounds, state, now) for site in expected],
        bytes_down=sum(entry.bytes_down for entry in rounds),
        bytes_up=sum(entry.bytes_up for entry in rounds),
        epsilon_budget=numbers(kept.config).get("epsilon", 0.0),
        secure=secure,
        warnings=list(dict.fromkeys(story.warnings)),
        results=str(story.end.get("results", "")) if story.end else "",
    )


_PHASES = ("harmonizer", "segmenter")


def _in_order(item: tuple[tuple[str, int], RoundStory]) -> tuple[bool, int]:
    return item[0][0] == "segmenter", item[0][1]


def _state(story: Story, alive: bool | None, now: datetime, stalled_after_s: float) -> tuple[str, str]:
    if story.end is not None:
        if story.end["event"] == "failed":
            return FAILED, str(story.end.get("error", ""))
        return FINISHED, ""
    silent = (now - story.last).total_seconds() if story.last else 0.0
    if alive is False:
        text = (
            "The server's process is gone without a last word. Run the same command again: no complete round is lost."
        )
        return STOPPED, text
    if silent > stalled_after_s:
        there = "Its process is there; look into Flower's log." if alive else "Look whether its process is there."
        return STALLED, f"No event for {silent:.0f} s. {there}"
    return RUNNING, ""


def _round(key: tuple[str, int], entry: RoundStory) -> RoundView:
    sites = {
        site: SiteRound(
            seconds=numbers(event).get("seconds"),
            bytes_down=whole(event.get("bytes_down")),
            bytes_up=whole(event.get("bytes_up")),
            metrics=numbers(event.get("metrics")),
        )
        for site, event in sorted(entry.replies.items())
    }
    silent = SiteRound(seconds=None, bytes_down=0, bytes_up=0, metrics={})
    # Rounds whose events a crash swallowed: the state knows who took part. A secure sum is nobody's reply.
    named = {site: silent for site in entry.took_part if site not in sites and not entry.replies}
    return RoundView(
        phase=key[0],
        number=key[1],
        started=entry.started,
        ended=entry.ended,
        seconds=entry.seconds,
        metrics=entry.metrics,
        sites=sites | named,
        set_aside=dict(sorted(entry.set_aside.items())),
        bytes_down=entry.bytes_down,
        bytes_up=entry.bytes_up,
        best=entry.best,
        repeated=entry.repeated,
    )


def _expected_end(
    story: Story, rounds: Sequence[RoundView], totals: Mapping[str, int], now: datetime
) -> datetime | None:
    """Rounds that are left, times the median of the last ones; None while a phase with rounds left has none done."""
    left = 0.0
    running = story.rounds[story.current] if story.current else RoundStory()
    spent = (now - running.started).total_seconds() if running.started else 0.0
    for phase in _PHASES:
        done = [entry.seconds for entry in rounds if entry.phase == phase and entry.seconds is not None]
        remaining = totals.get(phase, 0) - len(done)
        if remaining <= 0:
            continue
        if not done:
            return None
        usual = statistics.median(done[-_LAST:])
        left += remaining * usual
        if story.current and story.current[0] == phase:
            left -= min(spent, usual)  # a late round is over at any moment; those after it take their time
    return now + timedelta(seconds=left) if left else None
