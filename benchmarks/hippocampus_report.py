"""Tables of `hippocampus_sites.py run` as Markdown on standard output."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_fedharm.evaluation.statistics import bootstrap_mean

SITES = "ABCD"
Entry = Mapping[str, Any]


def report(work: Path, names: Sequence[str]) -> None:
    """Print every table for the arms that have metrics; arms without are named."""
    entries = {
        name: json.loads(path.read_text()) for name in names if (path := work / "metrics" / f"{name}.json").exists()
    }
    missing = [name for name in names if name not in entries]
    for title, travelling in (
        ("cases held out before training", False),
        ("travelling subjects (held out at A too)", True),
    ):
        print(f"\n### Dice, {title}\n")
        print_table(entries, lambda entry, site, t=travelling: cell(values(entry, site, "dice", travelling=t), 3))
        print(f"\n### HD95 in mm, {title}\n")
        print_table(entries, lambda entry, site, t=travelling: cell(values(entry, site, "hd95_mm", travelling=t), 2))
    print("\n### Paired differences in Dice, all test images of a site\n")
    print("| comparison | " + " | ".join(SITES) + " |\n|---|" + "---|" * len(SITES))
    for first, second in pairs(entries):
        cells = [cell(difference(entries[first], entries[second], site), 3) for site in SITES]
        print(f"| {first} - {second} | " + " | ".join(cells) + " |")
    print("\n### Federation\n")
    print_federation(entries)
    if missing:
        print(f"\nNot run: {', '.join(missing)}.")


def print_table(entries: Mapping[str, Entry], content: Callable[[Entry, str], str]) -> None:
    print("| labels | mode | harmonizer | " + " | ".join(SITES) + " |\n|---|---|---|" + "---|" * len(SITES))
    for entry in entries.values():
        arm = entry["arm"]
        cells = [content(entry, site) for site in SITES]
        print(f"| {arm['labels']} | {arm['mode']} | {arm['kind']} | " + " | ".join(cells) + " |")


def scores(entry: Entry, site: str, metric: str, *, travelling: bool | None) -> dict[str, float]:
    """Case -> score; `travelling` None takes all test images."""
    cases = entry["sites"][site]["cases"].items()
    return {case: s[metric] for case, s in cases if travelling in (None, case.startswith("travelling_"))}


def values(entry: Entry, site: str, metric: str, *, travelling: bool) -> list[float]:
    return list(scores(entry, site, metric, travelling=travelling).values())


def difference(first: Entry, second: Entry, site: str) -> list[float]:
    one, other = (scores(entry, site, "dice", travelling=None) for entry in (first, second))
    return [one[case] - other[case] for case in one]


def cell(numbers: Sequence[float], digits: int) -> str:
    """Mean and 95% bootstrap interval over cases."""
    interval = bootstrap_mean(list(numbers), seed=0)
    return f"{interval.mean:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def pairs(entries: Mapping[str, Entry]) -> list[tuple[str, str]]:
    """Federated against pooled, and each harmonizer against none."""
    found = []
    for name in entries:
        mode, labels, kind = name.split("_")
        for other in (
            f"pooled_{labels}_{kind}" if mode != "pooled" else None,
            f"{mode}_{labels}_none" if kind != "none" else None,
        ):
            if other in entries:
                found.append((name, str(other)))
    return found


def print_federation(entries: Mapping[str, Entry]) -> None:
    print(
        "| arm | seconds of training | MB down / up in a segmenter round | MB down / up in a harmonizer round | overhead |"
    )
    print("|---|---|---|---|---|")
    for name, entry in entries.items():
        events = entry.get("events", [])
        cells = [megabytes(events, phase) for phase in ("segmenter", "harmonizer")]
        print(f"| {name} | {entry['trained']['seconds']:.0f} | {cells[0]} | {cells[1]} | {overhead(events)} |")


def megabytes(events: Sequence[Mapping[str, Any]], phase: str) -> str:
    ends = [event for event in events if event["event"] == "round_end" and event["phase"] == phase]
    if not ends:
        return "-"
    return " / ".join(f"{np.mean([end[key] for end in ends]) / 1e6:.2f}" for key in ("bytes_down", "bytes_up"))


def overhead(events: Sequence[Mapping[str, Any]]) -> str:
    """Wall time of the segmenter rounds over the sites' own training time in them, with what ran side by side counted."""
    ends = [event for event in events if event["event"] == "round_end" and event["phase"] == "segmenter"]
    if not ends:
        return "-"
    trained = [event for event in events if event["event"] == "site_trained" and event["phase"] == "segmenter"]
    local = sum(event["metrics"]["seconds"] for event in trained)
    return f"{sum(end['seconds'] for end in ends):.0f} s of rounds, {local:.0f} s of training summed over sites"
