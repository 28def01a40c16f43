"""Kill a site in a round, then the server in a round, in a real deployment on loopback; print what happened and when.

Run from the repository's root: `PYTHONPATH=. python benchmarks/kill_and_resume.py`. Takes five to ten minutes on two cores,
because Flower starts a new process for every message. Prints a Markdown table, and the rounds with seconds, bytes and sites.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nnunet_fedharm.federation.config import FederateConfig
from tests.conftest import write_raw_dataset
from tests.federation.deployment import Deployment

SITES = ("A", "B", "C")
Event = dict[str, Any]


class Story:
    """What happened, with seconds since the start."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.rows: list[tuple[float, str]] = []

    def tell(self, text: str) -> None:
        self.rows.append((time.monotonic() - self.start, text))
        print(f"{self.rows[-1][0]:7.1f} s  {text}", flush=True)


def matching(name: str, **details: Any) -> Callable[[Event], bool]:
    return lambda event: event["event"] == name and all(event.get(key) == value for key, value in details.items())


def make_sites(root: Path) -> None:
    """Three sites with three labelled cases each: bright balls in noise, another gain at each site."""
    for index, site in enumerate(SITES):
        folder = root / "sites" / site / "nnUNet_raw"
        write_raw_dataset(folder, n_labelled=3, site=site, gain=1.0 + index, seed=index, shape=(12, 24, 24))


def configuration(root: Path, rounds: int) -> FederateConfig:
    return FederateConfig(
        root=str(root),
        sites=",".join(SITES),
        dataset="1",
        segmenter_rounds=rounds,
        iterations_per_epoch=2,
        val_iterations=1,
        base_features=4,
        max_features=8,
        batch_size=2,
        patch_size="24x24",
        deadline_s=90.0,
        join_wait_s=120.0,
    )


def play(deployment: Deployment, config: FederateConfig, story: Story) -> None:
    """The scenario: kill C in round 2, let it come back, kill the server in round 4, start it again."""
    deployment.start_superlink()
    for site in SITES:
        deployment.start_site(site)
    deployment.run(config)
    deployment.wait_for(matching("round_start", round=1), seconds=300)
    story.tell("preflight, fingerprint, plans and preprocessing done at 3 sites")
    deployment.wait_for(matching("round_start", round=2), seconds=300)
    time.sleep(5)
    deployment.kill("C")
    story.tell("round 2 runs; SIGKILL to site C's SuperNode and its training process")
    ended = deployment.wait_for(matching("round_end", round=2), seconds=300)
    story.tell(f"round 2 ended with {', '.join(ended['sites'])} after {ended['seconds']:.0f} s")
    deployment.start_site("C")
    story.tell("site C started again")
    back = deployment.wait_for(
        lambda event: event["event"] == "round_end" and "C" in event["sites"] and event["round"] > 2
    )
    story.tell(f"site C took part in round {back['round']}")
    number = back["round"] + 1
    deployment.wait_for(matching("round_start", round=number), seconds=300)
    time.sleep(5)
    before = len(deployment.events())
    deployment.kill("superlink")
    deployment.kill("flwr-run")
    story.tell(f"round {number} runs; SIGKILL to the SuperLink and the ServerApp")
    deployment.start_superlink()
    deployment.run(config)
    resumed = deployment.wait_for(matching("started"), after=before, seconds=300)
    story.tell(f"started again: {resumed['rounds_done']['segmenter']} rounds are kept, nothing is planned anew")
    again = deployment.wait_for(matching("round_end", round=number), after=before, seconds=300)
    story.tell(f"round {number} ended with {', '.join(again['sites'])}")
    finished = deployment.wait_for(matching("finished"), after=before, seconds=300)
    story.tell(f"finished; sites without the final model: {finished['sites_without_model'] or 'none'}")


def report(story: Story, events: list[Event]) -> str:
    """Markdown: the story and the rounds."""
    lines = [f"Machine: {platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}.", ""]
    lines += ["| s | what |", "|---|---|", *(f"| {seconds:.0f} | {text} |" for seconds, text in story.rows), ""]
    lines += ["| round | sites | s | bytes down | bytes up |", "|---|---|---|---|---|"]
    for event in events:
        if event["event"] == "round_end":
            numbers = f"{event['seconds']:.1f} | {event['bytes_down']} | {event['bytes_up']}"
            lines.append(f"| {event['round']} | {', '.join(event['sites'])} | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    """Play the scenario in a temporary folder, or in the one given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, help="empty folder to work in; default: a temporary one")
    parser.add_argument("--rounds", type=int, default=6)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = arguments.root or Path(scratch)
        make_sites(root)
        deployment, story = Deployment(root), Story()
        try:
            play(deployment, configuration(root, arguments.rounds), story)
        finally:
            deployment.stop()
        print("\n" + report(story, deployment.events()))


if __name__ == "__main__":
    main()
