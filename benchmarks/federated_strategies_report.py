"""Tables of `federated_strategies.py` as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

SITES = ("A", "B", "C", "D")


def report(folder: Path) -> str:
    """All arms that are done; the honest ones, then each defence under each attack."""
    entries = [json.loads(path.read_text()) for path in sorted(folder.glob("*/metrics.json"))]
    if not entries:
        return "No arm is done yet.\n"
    sizes = {json.dumps(entry["size"]) for entry in entries}
    honest = [entry for entry in entries if entry["attack"] is None]
    attacked = [entry for entry in entries if entry["attack"] is not None]
    lines = ["# Strategies of a federation", "", *(f"Length of the runs: `{size}`." for size in sorted(sizes)), ""]
    if honest:
        lines += ["## All sites honest", "", *_table(honest), ""]
    if attacked:
        lines += ["## One of four sites (B) sends poisoned updates", "", *_table(attacked), ""]
    return "\n".join(lines)


def _table(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    heads = ["strategy", "attack", *(f"Dice {site}" for site in SITES), "mean", "worst", "MB up a round", "set aside"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for entry in sorted(entries, key=lambda item: (item["attack"] or "", -_mean(item))):
        dice = _dice(entry)
        aside = ", ".join(f"{site} {count}" for site, count in entry["trained"]["set_aside"].items())
        cells = [entry["arm"], entry["attack"] or "none", *(f"{dice[site]:.3f}" for site in SITES)]
        cells += [f"{_mean(entry):.3f}", f"{min(dice.values()):.3f}"]
        cells += [f"{np.mean(entry['trained']['bytes_up']) / 1e6:.1f}", aside or "nobody"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _dice(entry: Mapping[str, Any]) -> dict[str, float]:
    return {site: float(np.mean([case["dice"] for case in entry["sites"][site].values()])) for site in SITES}


def _mean(entry: Mapping[str, Any]) -> float:
    return float(np.mean(list(_dice(entry).values())))
