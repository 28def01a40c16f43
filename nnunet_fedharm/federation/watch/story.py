"""The events of one run, told one after the other; what is known at its end is what is shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from nnunet_fedharm.federation.events import ends_run

Event = Mapping[str, Any]
RoundKey = tuple[str, int]


@dataclass
class RoundStory:
    """One round so far."""

    started: datetime | None = None
    ended: datetime | None = None
    seconds: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    took_part: tuple[str, ...] = ()
    replies: dict[str, Event] = field(default_factory=dict)
    set_aside: dict[str, str] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0
    best: bool = False
    repeated: int = 0


@dataclass
class Story:
    """Everything that the events of a run said.

    Attributes:
        labelled: site -> number of labelled cases, as the site said it.
        there: sites with a node now.
        in_rounds: whether a round has begun since the server's last start.
        seen: site -> last time that something came from it.
        aside: site -> where and why it was set aside last; gone once it takes part again.
        ready: site -> preparation steps that it has done.
        end: the last event that ended the run, if none began it again.
    """

    run_id: str = ""
    started: datetime | None = None
    last: datetime | None = None
    step: str = ""
    expected: tuple[str, ...] = ()
    labelled: dict[str, int] = field(default_factory=dict)
    there: set[str] = field(default_factory=set)
    seen: dict[str, datetime] = field(default_factory=dict)
    aside: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    ready: dict[str, list[str]] = field(default_factory=dict)
    rounds: dict[RoundKey, RoundStory] = field(default_factory=dict)
    totals: dict[str, int] = field(default_factory=dict)
    current: RoundKey | None = None
    in_rounds: bool = False
    holds_model: set[str] = field(default_factory=set)
    warnings: list[str] = field(default_factory=list)
    end: Event | None = None

    def tell(self, event: Event) -> None:
        """Take in one event; those of later releases change nothing but the time."""
        time = time_of(event)
        self.last = time or self.last
        site = event.get("site")
        if isinstance(site, str) and event["event"] in _FROM_A_SITE and time:
            self.seen[site] = time
        writer = _TELLERS.get(event["event"])
        if writer is not None:
            writer(self, event)

    def round_of(self, event: Event) -> RoundStory:
        """The story of the round that an event belongs to."""
        return self.rounds.setdefault((str(event.get("phase")), whole(event.get("round"))), RoundStory())


def time_of(event: Event) -> datetime | None:
    """When an event was written."""
    try:
        time = datetime.fromisoformat(str(event.get("time")))
    except ValueError:
        return None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def numbers(values: object) -> dict[str, float]:
    """The entries that are numbers."""
    pairs = values.items() if isinstance(values, Mapping) else ()
    return {str(name): float(value) for name, value in pairs if _is_number(value)}


def names(values: object) -> tuple[str, ...]:
    """A list of names as a tuple."""
    return tuple(str(name) for name in values) if isinstance(values, Sequence) and not isinstance(values, str) else ()


def whole(value: object) -> int:
    """A whole number; 0 where there is none."""
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _started(story: Story, event: Event) -> None:
    story.run_id = str(event.get("run_id", ""))
    story.started = story.started or time_of(event)
    story.end, story.current, story.step, story.in_rounds = None, None, "", False
    # A restarted server asks everybody anew who they are.
    story.there.clear()
    story.refused.clear()
    story.warnings.clear()


def _report_started(story: Story, event: Event) -> None:
    _started(story, event)
    story.step, story.expected = "site report", names(event.get("sites"))


def _joined(story: Story, event: Event) -> None:
    site = str(event.get("site"))
    story.there.add(site)
    story.labelled[site] = whole(event.get("labelled"))


def _step(story: Story, event: Event) -> None:
    report = "site report: " if story.step.startswith("site report") else ""
    story.step = report + str(event.get("step", ""))


def _ready(story: Story, event: Event) -> None:
    story.ready.setdefault(str(event.get("site")), []).append(str(event.get("step", "")))


def _sites_known(story: Story, event: Event) -> None:
    story.expected = names(event.get("sites")) or story.expected


def _round_start(story: Story, event: Event) -> None:
    key = (str(event.get("phase")), whole(event.get("round")))
    story.rounds[key] = RoundStory(started=time_of(event))
    story.totals[key[0]] = whole(event.get("rounds"))
    story.current, story.step, story.in_rounds = key, "", True


def _site_trained(story: Story, event: Event) -> None:
    site, entry = str(event.get("site")), story.round_of(event)
    entry.replies[site] = event
    entry.set_aside.pop(site, None)
    story.aside.pop(site, None)
    story.there.add(site)


def _set_aside(story: Story, event: Event) -> None:
    site, reason = str(event.get("site")), str(event.get("reason", ""))
    where = f"{event.get('phase')} round {event['round']}" if event.get("round") else str(event.get("phase", ""))
    story.aside[site] = f"{where}: {reason}"
    if event.get("round"):
        entry = story.round_of(event)
        entry.replies.pop(site, None)  # read, and set aside afterwards: its change was out of proportion
        entry.set_aside[site] = reason


def _repeated(story: Story, event: Event) -> None:
    entry = story.round_of(event)
    entry.repeated = whole(event.get("attempt"))
    entry.replies.clear()


def _round_end(story: Story, event: Event) -> None:
    entry = story.round_of(event)
    entry.ended = time_of(event)
    finish_round(entry, event)
    story.current = None


def finish_round(entry: RoundStory, values: Event) -> None:
    """What is known at the end of a round, from its last event or from the server's state."""
    entry.seconds = numbers(values).get("seconds")
    entry.metrics = {name: value for name, value in numbers(values).items() if name in METRICS}
    entry.took_part = names(values.get("sites"))
    entry.bytes_down, entry.bytes_up = whole(values.get("bytes_down")), whole(values.get("bytes_up"))
    entry.best = bool(values.get("best"))


def _lost(story: Story, event: Event) -> None:
    story.there.discard(str(event.get("site")))


def _refused(story: Story, event: Event) -> None:
    story.refused[str(event.get("site"))] = str(event.get("reason", ""))


def _warned(story: Story, event: Event) -> None:
    story.warnings.append(str(event.get("text", "")))


def _holds(story: Story, event: Event) -> None:
    story.holds_model.add(str(event.get("site")))


def _ended(story: Story, event: Event) -> None:
    if ends_run(event):
        story.end, story.current = event, None


METRICS = ("train_loss", "val_loss", "dice")
_FROM_A_SITE = ("site_joined", "site_ready", "site_trained", "site_finished", "site_refused")
_TELLERS: dict[str, Callable[[Story, Event], None]] = {
    "started": _started,
    "report_started": _report_started,
    "site_joined": _joined,
    "site_lost": _lost,
    "site_refused": _refused,
    "preflight_passed": _sites_known,
    "style_bank": _sites_known,
    "step": _step,
    "site_ready": _ready,
    "round_start": _round_start,
    "site_trained": _site_trained,
    "site_set_aside": _set_aside,
    "round_repeated": _repeated,
    "round_end": _round_end,
    "site_finished": _holds,
    "warning": _warned,
    "finished": _ended,
    "reported": _ended,
    "failed": _ended,
}
