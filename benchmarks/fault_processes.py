"""SIGKILL to real processes: a SuperLink, SuperNodes and their workers on loopback; `benchmarks/faults.py` calls this."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from fault_tries import Results, Try, configuration, last_event, make_sites, verdict

from nnunet_fedharm.federation.progress import describe
from tests.federation.deployment import Deployment
from tests.federation.power_cuts import rounds_lost

TARGETS = ("the server", "a node", "the server and a node")
_SERVER = ("superlink", "flwr-run")


class Killer:
    """A deployment of which something dies again and again.

    Args:
        longest_s: kills come after a uniformly random part of this time with the run going on.
    """

    def __init__(self, root: Path, seed: int, longest_s: float) -> None:
        self.root, self.generator, self.longest_s = make_sites(root), np.random.default_rng(seed), longest_s
        self.config = configuration(root, deadline_s=100.0, join_wait_s=120.0, max_retries=10)
        self.deployment = Deployment(root)
        self.kills: list[tuple[str, str, float]] = []

    def start(self) -> None:
        self.deployment.start_superlink()
        for site in "ABC":
            self.deployment.start_site(site)
        self.deployment.run(self.config)
        self._wait(("round_start",), 0, 240.0)

    def kill(self, target: str) -> bool:
        """Kill at a random moment and start again; False where the run has ended before."""
        time.sleep(float(self.generator.uniform(0, self.longest_s)))
        if self.deployment.events()[-1]["event"] == "finished":
            return False
        moment, before, site = (
            last_event(self.root),
            len(self.deployment.events()),
            str(self.generator.choice(list("ABC"))),
        )
        killed = [*(_SERVER if "server" in target else ()), *((site,) if "node" in target else ())]
        for name in killed:
            self.deployment.kill(name)
        since = time.monotonic()
        if "server" in target:
            self.deployment.start_superlink()
        if "node" in target:
            self.deployment.start_site(site)
        if "server" in target:
            self.deployment.run(self.config)
        self._wait(("round_end", "finished"), before, 240.0)
        self.kills.append(
            (target, f"{moment} ({site if 'node' in target else 'server'})", round(time.monotonic() - since, 1))
        )
        return True

    def finish(self) -> None:
        self._wait(("finished",), 0, 300.0)

    def _wait(self, names: tuple[str, ...], after: int, seconds: float) -> dict[str, Any]:
        return self.deployment.wait_for(lambda event: event["event"] in names, after=after, seconds=seconds)


def process_kills(root: Path, expected: Results, seed: int, *, kills: int, longest_s: float) -> list[Try]:
    """One run of many rounds in which nodes, the server, or both are killed in turn."""
    killer = Killer(root, seed, longest_s)
    order = [TARGETS[index % len(TARGETS)] for index in range(kills)]
    try:
        killer.start()
        for target in order:
            if not killer.kill(target):
                break
        killer.finish()
        outcome = verdict(expected, killer.config)
    except AssertionError as error:
        outcome = f"{error}; before it: {[describe(event) for event in killer.deployment.events()[-15:]]}"
    finally:
        killer.deployment.stop()
    lost = rounds_lost(killer.config) if (root / "server" / "fedharm" / "events.jsonl").exists() else 0
    return [
        Try(
            f"SIGKILL to the processes of {target}, any moment of a round",
            len(found := [kill for kill in killer.kills if kill[0] == target]),
            outcome,
            lost,
            [seconds for _, _, seconds in found],
            [moment for _, moment, _ in found],
        )
        for target in TARGETS
        if any(kill[0] == target for kill in killer.kills)
    ] or [Try("SIGKILL to real processes", 0, outcome, lost)]
