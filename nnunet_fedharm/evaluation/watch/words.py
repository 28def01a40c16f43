"""What is known of a run in words, the same in the terminal and on the page."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta

from nnunet_fedharm.evaluation.words import DASH, number
from nnunet_fedharm.federation.progress import human_bytes
from nnunet_fedharm.federation.watch.view import RoundView, RunView, SiteView

SITE_HEAD = ("site", "now", "last seen", "rounds", "set aside", "usual time", "loss", "Dice", "epsilon", "down", "up")
ROUND_HEAD = ("round", "ended", "time", "loss", "Dice", "worst site", "took part", "set aside", "down", "up")


def duration(seconds: float | None) -> str:
    """ "12 s", "3 min", "2 h 05 min", "3 days 4 h"."""
    if seconds is None:
        return DASH
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} days {hours % 24} h"


def ago(time: datetime | None, now: datetime) -> str:
    """ "12 s ago"."""
    return DASH if time is None else f"{duration(max(0.0, (now - time).total_seconds()))} ago"


def clock(time: datetime | None, now: datetime) -> str:
    """Local time, with the day where it is another one."""
    if time is None:
        return DASH
    here, today = time.astimezone(), now.astimezone()
    return f"{here:%H:%M:%S}" if here.date() == today.date() else f"{here:%d %b %H:%M}"


def expected_end(run: RunView) -> str:
    """ "17:42:10, in 25 min"; where no phase has a first round yet, that."""
    if run.expected_end is None:
        return "known after the first round of each phase"
    left = max(timedelta(0), run.expected_end - run.now)
    return f"{clock(run.expected_end, run.now)}, in {duration(left.total_seconds())}"


def worst(entry: RoundView | None, *, secure: bool = False) -> str:
    """ "0.71 (B)"."""
    if entry is not None and entry.worst_site() is not None:
        site, dice = entry.worst_site() or ("", 0.0)
        return f"{dice:.3f} ({site})"
    return "hidden by secure sums" if secure else DASH


def loss_of(metrics: Mapping[str, float]) -> str:
    """Training loss, and validation loss where there is one."""
    shown = [number(metrics[name], 3) for name in ("train_loss", "val_loss") if name in metrics]
    return " / ".join(shown) or DASH


def epsilon(run: RunView) -> str:
    """Largest epsilon spent at a site, and the budget; empty where the training is not private."""
    spent = [site.epsilon for site in run.sites if site.epsilon is not None]
    if not run.epsilon_budget and not spent:
        return ""
    most = f"{max(spent):.3g}" if spent else "not told"
    return f"{most} of {run.epsilon_budget:.3g}" if run.epsilon_budget else most


def site_row(site: SiteView, run: RunView) -> list[str]:
    """One row of the table of sites, under `SITE_HEAD`."""
    now = f"{site.state}: {site.detail}" if site.detail else site.state
    return [
        site.site,
        now,
        ago(site.last_seen, run.now),
        str(site.rounds),
        str(site.set_aside),
        duration(site.usual_s),
        loss_of(site.metrics),
        number(site.metrics.get("dice"), 3),
        number(site.epsilon, 3),
        human_bytes(site.bytes_down),
        human_bytes(site.bytes_up),
    ]


def round_row(entry: RoundView, run: RunView) -> list[str]:
    """One row of the table of rounds, under `ROUND_HEAD`."""
    again = f" (begun {entry.repeated + 1} times)" if entry.repeated else ""
    best = ", best" if entry.best else ""
    return [
        f"{entry.phase} {entry.number}{best}",
        clock(entry.ended, run.now) if entry.ended else "running",
        duration(entry.seconds) + again,
        loss_of(entry.metrics),
        number(entry.metrics.get("dice"), 3),
        worst(entry) if entry.ended else DASH,
        ", ".join(entry.sites) or DASH,
        "; ".join(f"{site}: {reason}" for site, reason in entry.set_aside.items()) or DASH,
        human_bytes(entry.bytes_down),
        human_bytes(entry.bytes_up),
    ]


def facts(run: RunView) -> list[tuple[str, str]]:
    """(value, name): what stands above the tables."""
    latest = run.latest("segmenter")
    rows = [
        (run.state, f"run {run.run_id}"),
        (run.where(), "now" if run.state == "running" else "so far"),
        (ago(run.last_event, run.now), f"last event, at {clock(run.last_event, run.now)}"),
    ]
    if run.state == "running":
        rows.append((expected_end(run), "expected end"))
    if latest is not None:
        rows.append((number(latest.metrics.get("dice"), 3), f"mean Dice over sites, segmenter round {latest.number}"))
        rows.append((worst(latest, secure=run.secure), "worst site"))
    rows.append((f"{human_bytes(run.bytes_down)} / {human_bytes(run.bytes_up)}", "to the sites / from them"))
    if epsilon(run):
        rows.append((epsilon(run), "epsilon spent, of the budget" if run.epsilon_budget else "epsilon spent"))
    return rows
