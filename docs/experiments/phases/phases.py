"""Frozen, alternated or fine-tuned: in which order should harmonizer and segmenter train?

    python docs/experiments/phases/phases.py run    --data DATA --work WORK
    python docs/experiments/phases/phases.py report --work WORK

DATA is `Dataset910_HippocampusSites`, WORK the folder of `benchmarks/learned_harmonizers.py`, whose preprocessed data is used.
Labels at A, C and D; B has images only. Each arm is one central training by the trainer that `nnUNetv2_train` runs, with
`schedule.phases` of the plans set; the stock predictor segments the held-out cases of all four sites.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))

from hippocampus_sites import NAME
from learned_training import SITES, Bench, Harmonizer, predict_and_score

from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.planning.section import read_section, with_section
from nnunet_fedharm.trainers.names import trainer_name_for
from nnunet_fedharm.trainers.results import make_trainer, write_results_folder
from nnunet_fedharm.trainers.seeds import seed_everything
from nnunet_fedharm.trainers.weights import export_weights

PHASES = ("frozen", "alternate", "finetune")
KINDS = ("diffusion",)
UNLABELLED = "B"
SEEDS = (0, 1, 2)


def run(bench: Bench, kind: str, phases: str, seed: int) -> dict[str, Any]:
    """One arm: mean Dice of each site's held-out cases, and the CPU seconds of its training."""
    harmonizer = Harmonizer(kind, "2d", "central", seed)
    root, configuration, name = bench.root(f"not-{UNLABELLED}"), "2d", f"phases_{kind}_{phases}_{seed}"
    plans = bench.plans_for(harmonizer)
    section = read_section(plans["configurations"][configuration])
    section = replace(section, schedule=replace(section.schedule, phases=phases, alternate_every=4, seed=seed))
    plans = {**with_section(plans, section, (configuration,)), "plans_name": name}
    trainer_name = trainer_name_for(kind)
    began = time.process_time()
    with root.activate():
        seed_everything(seed, name)
        trainer = make_trainer(trainer_name, plans, configuration, "all", bench.description())
        trainer.run_training()
    seconds = time.process_time() - began
    weights = export_weights(trainer.network)
    dice = {}
    for site in SITES:
        fold = write_results_folder(
            NnunetRoot(bench.work / "models" / name / site), NAME, plans, bench.description(), {}, configuration, "all",
            trainer_name, weights, epoch=section.schedule.segmenter_epochs - 1, which=("final",), site=site,
        )  # fmt: skip
        scores, _ = predict_and_score(bench, fold.parent, site, bench.work / "predictions" / name / site)
        dice[site] = float(np.mean([case["dice"] for case in scores.values()]))
    return {"dice": dice, "cpu_s": seconds, "gate": weights["harmonizer.bank_gate"].tolist()}


def report(results: dict[str, Any]) -> None:
    print(
        "| harmonizer | phases | seeds | A | B (no labels) | C | D | training, CPU s |\n|---|---|---|---|---|---|---|---|"
    )
    for kind in KINDS:
        for phases in PHASES:
            arms = [arm for name, arm in results.items() if name.startswith(f"{kind} {phases} ")]
            if arms:
                cells = []
                for site in SITES:
                    dice = [arm["dice"][site] for arm in arms]
                    cells.append(f"{np.mean(dice):.3f} ({min(dice):.3f} to {max(dice):.3f})")
                cost = np.mean([arm["cpu_s"] for arm in arms])
                print(f"| {kind} | {phases} | {len(arms)} | {' | '.join(cells)} | {cost:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "report"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    arguments = parser.parse_args()
    path = arguments.work / "phases.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if arguments.action == "report":
        report(results)
        return
    os.environ.update(nnUNet_compile="f", nnUNet_n_proc_DA="0")
    torch.set_num_threads(1)
    bench = Bench(arguments.data, arguments.work.resolve())
    for seed in SEEDS:
        for kind in KINDS:
            for phases in PHASES:
                name = f"{kind} {phases} {seed}"
                if name not in results:
                    results[name] = run(bench, kind, phases, seed)
                    path.write_text(json.dumps(results, indent=1))
                    print(name, results[name], flush=True)


if __name__ == "__main__":
    main()
