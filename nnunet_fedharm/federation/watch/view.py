"""What is shown of a run: plain data, made by `reading.read_run`. Sites and rounds only, never cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

RUNNING, FINISHED, FAILED, STOPPED, STALLED = "running", "finished", "failed", "stopped", "stalled"
BAD_STATES = (FAILED, STOPPED, STALLED)
"""failed: it said why; stopped: its process is gone without a last word; stalled: no event for too long."""

LATE, AWAY, SET_ASIDE, TRAINING, TRAINED = "late", "away", "set aside", "training", "took part"
ALARMING = (LATE, AWAY, SET_ASIDE)


@dataclass(frozen=True, kw_only=True)
class SiteRound:
    """What one site did in one round; `metrics` are empty where the server sees sums only."""

    seconds: float | None
    bytes_down: int
    bytes_up: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class RoundView:
    """One round.

    Attributes:
        phase, number: number from 1.
        ended: None while it runs.
        seconds: None while it runs.
        metrics: of the mean over sites.
        sites: those that took part, or have answered so far.
        set_aside: site -> reason.
        repeated: times that it was begun again for want of replies.
    """

    phase: str
    number: int
    started: datetime | None
    ended: datetime | None
    seconds: float | None
    metrics: Mapping[str, float]
    sites: Mapping[str, SiteRound]
    set_aside: Mapping[str, str]
    bytes_down: int
    bytes_up: int
    best: bool
    repeated: int

    def worst_site(self) -> tuple[str, float] | None:
        """Site with the lowest Dice, and that Dice; None where no site's Dice is known."""
        known = {site: done.metrics["dice"] for site, done in self.sites.items() if "dice" in done.metrics}
        return min(known.items(), key=lambda item: item[1]) if known else None


@dataclass(frozen=True, kw_only=True)
class SiteView:
    """One site now.

    Attributes:
        state: one of the words above, or what it does before and after the rounds.
        detail: reason or explanation; may be empty.
        last_seen: last time that something came from it.
        rounds, set_aside: how many rounds it took part in, and was set aside in.
        usual_s: median seconds of its rounds.
        metrics: of its last round.
        epsilon: spent so far, where the training is private and the site says so.
    """

    site: str
    state: str
    detail: str
    last_seen: datetime | None
    rounds: int
    set_aside: int
    usual_s: float | None
    bytes_down: int
    bytes_up: int
    metrics: Mapping[str, float]
    epsilon: float | None


@dataclass(frozen=True, kw_only=True)
class RunView:
    """A run.

    Attributes:
        state: running, finished, failed, stopped or stalled.
        reason: one sentence for a state that is not good; empty otherwise.
        step: what it does outside of rounds, such as "prepare".
        phase, number, total: the round at hand, or the last one; empty and 0 before the first.
        expected_end: None where there is no ground for a guess.
        epsilon_budget: 0 where the training is not private.
        secure: whether the server sees sums only, so that no site has numbers of its own here.
        results: folder, once finished.
    """

    run_id: str
    state: str
    reason: str
    step: str
    phase: str
    number: int
    total: int
    started: datetime | None
    last_event: datetime | None
    expected_end: datetime | None
    now: datetime
    rounds: Sequence[RoundView]
    sites: Sequence[SiteView]
    bytes_down: int
    bytes_up: int
    epsilon_budget: float
    secure: bool
    warnings: Sequence[str]
    results: str

    def is_bad(self) -> bool:
        """Whether somebody should look after it."""
        return self.state in BAD_STATES

    def where(self) -> str:
        """ "segmenter round 3 of 20", or the step before the rounds."""
        if self.phase:
            return f"{self.phase} round {self.number} of {self.total}" if self.total else f"{self.phase} {self.number}"
        return self.step or "start"

    def latest(self, phase: str) -> RoundView | None:
        """The last complete round of a phase."""
        done = [entry for entry in self.rounds if entry.phase == phase and entry.ended]
        return done[-1] if done else None
