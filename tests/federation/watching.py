"""Event logs of made-up runs, written by the real EventLog but for their times."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

START = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
DICE = {"A": 0.8, "B": 0.6, "C": 0.7}


class Log:
    """A server's folder whose events come at chosen seconds."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "server"
        self.path = self.folder / "fedharm" / "events.jsonl"
        self.path.parent.mkdir(parents=True)

    def write(self, second: float, event: str, **details: Any) -> None:
        time = (START + timedelta(seconds=second)).isoformat(timespec="milliseconds")
        with self.path.open("a") as stream:
            stream.write(json.dumps({"time": time, "event": event, **details}) + "\n")

    def begin(self, second: float = 0, *, run_id: str = "aa-1", sites: str = "ABC", done: int = 0) -> None:
        self.write(second, "started", run_id=run_id, resumed=done > 0, rounds_done={"harmonizer": 0, "segmenter": done})
        for site in sites:
            self.write(second + 1, "site_joined", site=site, labelled=2, unlabelled=0)
        if not done:
            self.write(second + 2, "preflight_passed", sites=list(sites), dataset="Dataset001_Blobs")

    def round_start(self, second: float, number: int, *, total: int = 10) -> None:
        self.write(second, "round_start", phase="segmenter", round=number, rounds=total)

    def trained(self, second: float, site: str, number: int, *, seconds: float = 10.0, **metrics: float) -> None:
        values = {"train_loss": 0.1, "val_loss": 0.2, "dice": DICE[site]} | metrics
        where = {"phase": "segmenter", "round": number, "seconds": seconds, "bytes_down": 1000, "bytes_up": 500}
        self.write(second, "site_trained", site=site, n_steps=1, metrics=values, **where)

    def round_end(self, second: float, number: int, *, sites: str = "ABC", total: int = 10) -> None:
        values = {"train_loss": 0.1, "val_loss": 0.2, "dice": 0.7, "seconds": 20.0, "left_out": []}
        traffic = {"bytes_down": 3000, "bytes_up": 1500}
        where = {"phase": "segmenter", "round": number, "rounds": total, "best": number == 1, "sites": list(sites)}
        self.write(second, "round_end", **where, **values, **traffic)

    def whole_round(self, second: float, number: int, *, sites: str = "ABC", **metrics: float) -> None:
        """A round of 20 s."""
        self.round_start(second, number)
        for site in sites:
            self.trained(second + 10, site, number, **metrics)
        self.round_end(second + 20, number, sites=sites)


def at(second: float) -> datetime:
    return START + timedelta(seconds=second)
