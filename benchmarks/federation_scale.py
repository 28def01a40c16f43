"""How server memory and the time of a round grow with the number of sites, up to 100 on one machine.

Run from the repository's root, one case a call: `PYTHONPATH=. python benchmarks/federation_scale.py --case server --sites 100`.
Every call appends a line to `--out`; `--table` prints all of them as Markdown.

- `server`: the real round loop and strategies in a process of its own; sites are scripted and make their reply, a whole model,
  when it is asked for, so that only the server's work and memory are measured.
- `simulation`: `nnunet-fedharm federate` with real training on links of the same two small cases, two rounds. It resumes after a
  time limit, like any run: call it again with the same `--folder`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message

from nnunet_fedharm.federation.config import FederateConfig
from nnunet_fedharm.federation.daemon import descendants
from nnunet_fedharm.federation.events import read_events
from nnunet_fedharm.federation.launch import federate
from tests.conftest import write_raw_dataset
from tests.federation.local_grid import LocalGrid
from tests.federation.test_rounds import Bench, ScriptedSite

MIB = 2**20
TENSORS, TENSOR = 32, 2**18
"""Of the scripted model: 32 MiB in all."""
STRATEGIES = ("fedavg", "fedadam", "median", "multi-krum")
Line = dict[str, Any]


class LazyGrid(LocalGrid):
    """Nodes that answer when their reply is pulled, so that no reply lies in memory before."""

    def __init__(self, nodes: dict[int, Any]) -> None:
        super().__init__(nodes)
        self._asked: dict[str, tuple[int, Message]] = {}

    def _deliver(self, message: Message) -> str | None:
        if message.metadata.message_type != "train":
            return super()._deliver(message)
        name = f"asked-{len(self._asked)}-{time.monotonic_ns()}"
        self._asked[name] = (message.metadata.dst_node_id, message)
        return name

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        found = []
        for name in message_ids:
            if name not in self._asked:
                found += super().pull_messages([name])
                continue
            node, message = self._asked.pop(name)
            message.metadata.__dict__["_message_id"] = name
            reply = self.clients[node](message)
            assert reply is not None
            reply.metadata.__dict__["_reply_to_message_id"] = name
            found.append(reply)
        return found


def measure_server(strategy: str, n_sites: int) -> Line:
    """One round of a strategy in this process."""
    start = {f"segmenter.w{index:03d}": np.zeros(TENSOR, np.float32) for index in range(TENSORS)}
    nodes = [ScriptedSite(f"S{index:03d}", step=0.01 * index) for index in range(n_sites)]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), nodes, strategy=strategy, deadline_s=3000.0)
        grid = LazyGrid(dict(enumerate(nodes, start=1)))
        bench.loop = replace(bench.loop, roster=replace_grid(bench, grid))
        before = resident()
        began = time.monotonic()
        bench.run(weights=start)
        seconds = time.monotonic() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "case": f"server, {strategy}",
        "sites": n_sites,
        "model MiB": TENSORS * TENSOR * 4 // MIB,
        "before MiB": round(before / MIB),
        "peak MiB": round(peak / MIB),
        "s per round": round(seconds, 1),
    }


def replace_grid(bench: Bench, grid: LazyGrid) -> Any:
    """The bench's roster, with another grid."""
    bench.roster.grid = grid
    return bench.roster


def measure_simulation(n_sites: int, folder: Path) -> Line:
    """Two rounds of real training through Flower and Ray."""
    root = folder / f"consortium-{n_sites}"
    if not root.is_dir():
        make_links(root, n_sites)
    config = FederateConfig(
        root=str(root),
        dataset="1",
        segmenter_rounds=2,
        iterations_per_epoch=1,
        val_iterations=1,
        base_features=16,
        batch_size=2,
        patch_size="32x32",
        deadline_s=3000.0,
        quorum=n_sites,
    )
    with watched("flwr-simulation") as peak:
        federate(config, show=lambda line: print(line, flush=True))
    events = read_events(root / "server" / "fedharm" / "events.jsonl")[0]
    end = next(event for event in events if event["event"] == "round_end")
    done = [event["seconds"] for event in events if event["event"] == "round_end"]
    return {
        "case": "simulation, fedavg",
        "sites": n_sites,
        "model MiB": round(end["bytes_down"] / n_sites / MIB, 1),
        "before MiB": "",
        "peak MiB": round(peak[0] / MIB),
        "s per round": round(min(done), 1),
        "each": done,
        "load": round(os.getloadavg()[1], 1),
    }


def make_links(root: Path, n_sites: int) -> None:
    """Sites that all have the same two cases: hard links, one copy on the disk."""
    first = write_raw_dataset(root / "sites" / "S000" / "nnUNet_raw", n_labelled=2, shape=(8, 32, 32))
    for index in range(1, n_sites):
        for path in first.rglob("*.*"):
            target = root / "sites" / f"S{index:03d}" / "nnUNet_raw" / first.name / path.relative_to(first)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, target)


@contextmanager
def watched(name: str) -> Iterator[list[int]]:
    """Largest resident memory, in bytes, of our descendants with this word in their command; the kernel's own record."""
    peak, over = [0], threading.Event()

    def look() -> None:
        while not over.wait(1.0):
            for pid in descendants(os.getpid()):
                with suppress(OSError):  # it ended just now
                    if name in Path(f"/proc/{pid}/cmdline").read_text():
                        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
                        peak[0] = max(peak[0], int(found.group(1)) * 1024 if found else 0)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def table(lines: list[Line]) -> str:
    """Markdown."""
    head = ["case", "sites", "model MiB", "before MiB", "peak MiB", "s per round"]
    rows = [head, ["---"] * len(head), *([str(line[key]) for key in head] for line in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=("server", "simulation"))
    parser.add_argument("--strategy", choices=STRATEGIES, default="fedavg")
    parser.add_argument("--sites", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "federation_scale")
    parser.add_argument("--out", type=Path, default=Path("federation_scale.jsonl"))
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.case:
        server = options.case == "server"
        line = (
            measure_server(options.strategy, options.sites)
            if server
            else measure_simulation(options.sites, options.folder)
        )
        with options.out.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
    if options.table:
        print(table([json.loads(line) for line in options.out.read_text().splitlines()]))


if __name__ == "__main__":
    sys.exit(main())
