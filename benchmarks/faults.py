"""How a federation survives: kills at random moments, bad replies, late sites, a full disk; one line of JSON a run, and a table.

Run from the repository's root, for example
`PYTHONPATH=. python benchmarks/faults.py sigkill --seeds 1 2 3 --out faults.jsonl`, then `… faults.py table --out faults.jsonl`.
Parts: sigkill, messages, replies, late, disk (needs the right to mount), processes (minutes), power (minutes), table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path

import fault_tries as tries
from fault_power import power_cuts
from fault_processes import process_kills
from fault_tries import SAME, Try

PARTS = ("sigkill", "messages", "replies", "late", "disk", "processes", "power", "table")


def play(part: str, seed: int, scratch: Path, options: argparse.Namespace, expected: tries.Results) -> list[Try]:
    """One part with one seed."""
    root = scratch / f"{part}-{seed}"
    root.mkdir()
    if part == "replies":
        return tries.bad_replies(root)
    if part == "late":
        return [tries.late_site(root)]
    if part == "sigkill":
        return [tries.sigkills(root, expected, seed, longest_s=options.longest_s)]
    if part == "messages":
        return [tries.message_deaths(root, expected, seed, most=options.kills)]
    if part == "disk":
        return [tries.full_disk(root, expected, seed, times=options.kills, longest_s=options.longest_s)]
    if part == "power":
        return [power_cuts(root, seed, kills=options.kills, longest_s=options.longest_s)]
    return process_kills(root, expected, seed, kills=options.kills, longest_s=options.longest_s)


def table(path: Path) -> str:
    """Markdown: each fault over all its runs."""
    runs = [Try(**json.loads(line)) for line in path.read_text().splitlines()]
    lines = ["| fault | tried | outcome | rounds lost | s to recover, median (most) |", "|---|---|---|---|---|"]
    for fault in dict.fromkeys(run.fault for run in runs):
        found = [run for run in runs if run.fault == fault]
        outcomes = ", ".join(sorted({run.outcome for run in found}))
        seconds = [value for run in found for value in run.recover_s]
        shown = f"{statistics.median(seconds):.1f} ({max(seconds):.1f})" if seconds else "-"
        lost = sum(run.rounds_lost for run in found)
        lines.append(f"| {fault} | {sum(run.times for run in found)} | {outcomes} | {lost} | {shown} |")
    return "\n".join(lines)


def main() -> None:
    """Play one part for each seed, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--kills", type=int, default=8, help="at most so many in one run")
    parser.add_argument("--longest-s", type=float, default=6.0, help="a kill comes after a random part of this time")
    parser.add_argument("--out", type=Path, default=Path("faults.jsonl"))
    options = parser.parse_args()
    if options.part == "table":
        print(table(options.out))
        return
    os.environ |= {"nnUNet_compile": "f", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        expected = {} if options.part in ("replies", "late", "power") else tries.uninterrupted(Path(scratch) / "whole")
        for seed in options.seeds:
            for done in play(options.part, seed, Path(scratch), options, expected):
                with options.out.open("a") as stream:
                    stream.write(json.dumps(asdict(done)) + "\n")
                good = done.outcome.startswith((SAME, "set aside", "got plans", "came back"))
                print(f"{'ok ' if good else 'BAD'} {json.dumps(asdict(done))}", flush=True)


if __name__ == "__main__":
    main()
