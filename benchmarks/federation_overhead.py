"""What a round costs beyond the local epochs themselves, with and without warm workers, in a deployment and in simulation.

Run from the repository's root: `PYTHONPATH=. python benchmarks/federation_overhead.py --case consortium --steps 20`.
One case a call, so that each is short; every call appends a line to `--out`, and `--table` prints all of them as Markdown.

A round lasts from its `round_start` to the next one, so it holds the request, the sites' work, the aggregation, the checkpoint
and the results folder. Local training is what the slower site measured for its local epochs, set-up of trainer and loaders
included. The first round pays the start of the worker, so that medians are over the rounds after it. `at site` is the part
between the request and the slower site's reply, `at server` the rest: aggregation, checkpoint, results folder. `load` is the
machine's mean of five minutes at the end, this run included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from nnunet_fedharm.federation.config import FederateConfig
from nnunet_fedharm.federation.events import EVENTS_FILE, read_events
from nnunet_fedharm.federation.launch import federate
from tests.conftest import write_raw_dataset
from tests.federation.deploy.real import RealConsortium
from tests.federation.deployment import Deployment

SITES = ("A", "B")
CASES = ("consortium", "warm", "cold", "simulation")
"""`nnunet-fedharm server start` and `site start`; Flower's stock programs, with warm workers and without; `federate`."""
Event = dict[str, Any]


def configuration(root: Path, sites: tuple[str, ...], *, steps: int, rounds: int, features: int) -> FederateConfig:
    return FederateConfig(
        root=str(root),
        sites=",".join(sites),
        dataset="1",
        segmenter_rounds=rounds,
        iterations_per_epoch=steps,
        val_iterations=1,
        base_features=features,
        batch_size=4,
        patch_size="64x64",
        deadline_s=600.0,
        join_wait_s=120.0,
        parallel_sites=len(sites),
    )


def run(case: str, config: FederateConfig) -> list[Event]:
    """All events of one run."""
    root = Path(config.root)
    if case == "simulation":
        federate(config, show=lambda line: print(line, flush=True))
        return read_events(root / "server" / "fedharm" / "events.jsonl")[0]
    if case == "consortium":
        return run_consortium(config)
    deployment = Deployment(root)
    try:
        deployment.start_superlink()
        for site in config.site_names:
            deployment.start_site(site, also="warm-minutes=0" if case == "cold" else "")
        deployment.run(config)
        deployment.wait_for(lambda event: event["event"] == "finished", seconds=900.0)
        return deployment.events()
    finally:
        deployment.stop()


def run_consortium(config: FederateConfig) -> list[Event]:
    """All events of one run between hospitals: TLS, node keys, signed app, by the commands that people type."""
    made = RealConsortium(Path(config.root) / "sites", config.site_names, recorded=False)
    options = ("--segmenter-rounds", config.segmenter_rounds, "--iterations-per-epoch", config.iterations_per_epoch)
    options += ("--val-iterations", config.val_iterations, "--base-features", config.base_features)
    options += ("--batch-size", config.batch_size, "--patch-size", config.patch_size)
    options += ("--deadline-s", config.deadline_s, "--join-wait-s", config.join_wait_s)
    try:
        for site in config.site_names:
            made.register(made.join(site))
        made.open(config.site_names)
        words = ("server", "run", str(made.server.path), "-d", config.dataset, "--sites", config.sites)
        status, text = made.command(*words, *map(str, options), seconds=3600)
        if status:
            raise RuntimeError(text)
        return read_events(made.server.results / "fedharm" / EVENTS_FILE)[0]
    finally:
        made.close()


def rounds_of(events: list[Event]) -> list[tuple[float, float, float]]:
    """Seconds of every round that another one follows: all of it, to the last reply, the slower site's local training."""
    starts = [event for event in events if event["event"] == "round_start"]
    found = []
    for start, following in pairwise(starts):
        trained = [e for e in events if e["event"] == "site_trained" and e["round"] == start["round"]]
        local = max(event["metrics"]["seconds"] for event in trained)
        replied = max(_time(event) for event in trained)
        found.append((_between(start, following), (replied - _time(start)).total_seconds(), local))
    return found


def measure(case: str, n_sites: int, *, steps: int, rounds: int, features: int) -> Event:
    """One run, as a line of the results."""
    with tempfile.TemporaryDirectory() as folder:
        root, sites = Path(folder), SITES[:n_sites]
        for index, site in enumerate(sites):
            raw = root / "sites" / site / "nnUNet_raw"
            write_raw_dataset(raw, n_labelled=5, site=site, gain=1.0 + index, seed=index, shape=(24, 64, 64))
        events = run(case, configuration(root, sites, steps=steps, rounds=rounds, features=features))
    measured = rounds_of(events)
    rest = measured[1:] or measured
    sent = next(event for event in events if event["event"] == "round_end")
    return {
        "case": case,
        "sites": n_sites,
        "steps": steps,
        "MiB": round(sent["bytes_down"] / n_sites / 2**20, 1),
        "first": round(measured[0][0] - measured[0][2], 1),
        "local": round(statistics.median(local for _, _, local in rest), 1),
        "round": round(statistics.median(whole for whole, _, _ in rest), 1),
        "overhead": round(statistics.median(whole - local for whole, _, local in rest), 1),
        "at site": round(statistics.median(replied - local for _, replied, local in rest), 1),
        "at server": round(statistics.median(whole - replied for whole, replied, _ in rest), 1),
        "each": [tuple(round(value, 1) for value in values) for values in measured],
        "rounds": len(rest),
        "load": round(os.getloadavg()[1], 1),
    }


def table(lines: list[Event]) -> str:
    """Markdown."""
    keys = (
        "case",
        "sites",
        "steps",
        "MiB",
        "local",
        "round",
        "overhead",
        "at site",
        "at server",
        "first",
        "rounds",
        "load",
    )
    head = ["run", "sites", "steps", "MiB", "local training s", "round s", "overhead s", "at site s", "at server s"]
    head += ["first round's overhead s", "rounds", "load", "overhead"]
    rows = [head, ["---"] * len(head)]
    for line in lines:
        share = f"{100 * line['overhead'] / line['local']:.0f} %"
        rows.append([*(str(line.get(key, "")) for key in keys), share])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _between(one: Event, two: Event) -> float:
    return (_time(two) - _time(one)).total_seconds()


def _time(event: Event) -> datetime:
    return datetime.fromisoformat(event["time"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES)
    parser.add_argument(
        "--sites", type=int, choices=(1, 2), default=len(SITES), help="one leaves a core to all that is not training"
    )
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of a round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--features", type=int, default=32, help="of the network's first stage")
    parser.add_argument("--out", type=Path, default=Path("federation_overhead.jsonl"))
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.case:
        line = measure(
            options.case, options.sites, steps=options.steps, rounds=options.rounds, features=options.features
        )
        with options.out.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
    if options.table:
        lscpu = subprocess.run(["lscpu"], capture_output=True, text=True, check=False).stdout
        model = next(
            (row.split(":")[1].strip() for row in lscpu.splitlines() if "Model name" in row), platform.processor()
        )
        print(f"{model}, Python {platform.python_version()}")
        print(table([json.loads(line) for line in options.out.read_text().splitlines()]))


if __name__ == "__main__":
    main()
