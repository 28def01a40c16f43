"""What a site does now: took part, trains, is late, away, or set aside."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from datetime import datetime

from nnunet_fedharm.federation.watch.story import RoundStory, Story
from nnunet_fedharm.federation.watch.view import (
    AWAY,
    FINISHED,
    LATE,
    RUNNING,
    SET_ASIDE,
    TRAINED,
    TRAINING,
    RoundView,
    SiteView,
)

_LATE_FACTOR, _LATE_LEAST_S = 1.5, 30.0
"""A site is late after so many times its usual seconds, and not before these seconds."""


def site_view(site: str, story: Story, rounds: Sequence[RoundView], run_state: str, now: datetime) -> SiteView:
    """One site now."""
    done = [entry.sites[site] for entry in rounds if site in entry.sites and entry.ended]
    seconds = [entry.seconds for entry in done if entry.seconds is not None]
    told = [entry.metrics for entry in done if entry.metrics]
    epsilons = [entry.metrics["epsilon"] for entry in done if "epsilon" in entry.metrics]
    usual = statistics.median(seconds) if seconds else None
    state, detail = _state_of(site, story, rounds, run_state, now)
    return SiteView(
        site=site,
        state=state,
        detail=detail,
        last_seen=story.seen.get(site),
        rounds=len(done),
        set_aside=sum(site in entry.set_aside for entry in rounds),
        usual_s=usual,
        bytes_down=sum(entry.bytes_down for entry in done),
        bytes_up=sum(entry.bytes_up for entry in done),
        metrics=told[-1] if told else {},
        epsilon=max(epsilons) if epsilons else None,
    )


def _state_of(site: str, story: Story, rounds: Sequence[RoundView], run_state: str, now: datetime) -> tuple[str, str]:
    if site in story.refused:
        return "refused", story.refused[site]
    if run_state == FINISHED:
        return _at_the_end(site, story)
    if story.current is not None:
        return _in_a_round(site, story, story.rounds[story.current], rounds, run_state, now)
    if run_state == RUNNING and site not in story.there and not story.in_rounds:
        return "not there yet", "the server has just begun to ask who is there" if story.rounds else ""
    if run_state == RUNNING and site not in story.there:
        return AWAY, "no node of it is connected"
    if site in story.aside:
        return SET_ASIDE, story.aside[site]
    if story.rounds:
        last = rounds[-1]
        return (TRAINED, "") if site in last.sites else ("no part in the last round", "")
    if story.step and story.step not in story.ready.get(site, []):
        return f"works on {story.step}", ""
    return "ready", ""


def _at_the_end(site: str, story: Story) -> tuple[str, str]:
    without = story.end.get("sites_without_model", []) if story.end else []
    if site in without:
        return "without the final model", story.aside.get(
            site, "start its node, then the same command gives it the model"
        )
    return ("holds the final model" if site in story.holds_model else "done"), ""


def _in_a_round(
    site: str, story: Story, entry: RoundStory, rounds: Sequence[RoundView], run_state: str, now: datetime
) -> tuple[str, str]:
    phase = story.current[0] if story.current else ""
    if site in entry.replies:
        return TRAINED, ""
    if site in entry.set_aside:
        return SET_ASIDE, entry.set_aside[site]
    if phase == "segmenter" and site in story.labelled and not story.labelled[site]:
        return "rests", "has no labels, so the segmenter phase is without it"
    if site not in story.there:
        return AWAY, story.aside.get(site, "no node of it is connected")
    if run_state != RUNNING:
        return "did not answer", ""
    elapsed = (now - entry.started).total_seconds() if entry.started else 0.0
    past = [done.sites[site].seconds for done in rounds if done.phase == phase and done.ended and site in done.sites]
    others = [float(event.get("seconds") or 0.0) for event in entry.replies.values()]
    usual = statistics.median([s for s in past if s is not None] or [max(others, default=0.0)])
    if usual and elapsed > max(_LATE_LEAST_S, _LATE_FACTOR * usual):
        return LATE, f"{elapsed:.0f} s in this round, usually {usual:.0f} s"
    return TRAINING, f"for {elapsed:.0f} s"
