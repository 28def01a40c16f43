"""A power cut over a whole consortium, over TLS: both commands and all that they started; `benchmarks/faults.py` calls this.

The run is kept (`server run --keep`): after the cut the commands of the systemd units are started, and nobody types another.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from fault_tries import Try

from nnunet_fedharm.federation.events import EVENTS_FILE, read_events
from tests.conftest import write_raw_dataset
from tests.federation.deploy.real import TINY, RealConsortium

SITES = ("north", "south")
_ROUNDS = 8


def power_cuts(root: Path, seed: int, *, kills: int, longest_s: float) -> Try:
    """Everything is killed at random moments after the first round, and the units' commands are started at once."""
    generator = np.random.default_rng(seed)
    for index, site in enumerate(SITES):
        write_raw_dataset(root / site / "nnUNet_raw", n_labelled=2, site=site, seed=index, shape=(12, 24, 24))
    real = RealConsortium(root, SITES, recorded=False)
    moments: list[str] = []
    seconds: list[float] = []
    try:
        for site in SITES:
            real.admit(site)
        real.open(SITES)
        words = ("-d", "1", *TINY, "--segmenter-rounds", str(_ROUNDS), "--keep", "--detach")
        status, text = real.command("server", "run", str(real.server.path), *words, seconds=300)
        assert status == 0, text
        for _ in range(kills):
            count = len(_events(real, "round_end"))
            _wait(real, "round_end", count + 1)
            time.sleep(float(generator.uniform(0, longest_s)))
            done = len(_events(real, "round_end"))
            real.cut_the_power()
            moments.append(f"after round {done}")
            booted = datetime.now(UTC)
            real.boot(SITES)
            _wait(real, "round_end", done + 1)
            end = datetime.fromisoformat(_events(real, "round_end")[done]["time"])
            seconds.append(round((end - booted).total_seconds(), 1))
        _wait(real, "finished", 1)
        without = _events(real, "finished")[-1]["sites_without_model"]
        outcome = f"{without} have no model" if without else "came back by itself; every site has the model"
    except AssertionError as error:
        outcome = str(error)[-400:]
    finally:
        real.close()
    rounds = [event["round"] for event in _events(real, "round_end")]
    what = "SIGKILL to a whole consortium with a kept run"
    return Try(what, len(moments), outcome, len(rounds) - len(set(rounds)), seconds, moments)


def _events(real: RealConsortium, name: str) -> list[dict[str, Any]]:
    return [event for event in read_events(real.server.results / "fedharm" / EVENTS_FILE)[0] if event["event"] == name]


def _wait(real: RealConsortium, name: str, count: int, *, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while len(_events(real, name)) < count:
        assert time.monotonic() < end, f"no {name} number {count}: {real.output('server')}"
        time.sleep(0.2)
