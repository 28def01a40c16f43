"""Radiomics agreement with the reference hospital after the private harmonizer phase of `simulated-polarity`, at each epsilon.

    python benchmarks/private_features.py run    --data Dataset910_HippocampusSites --work WORK
    python benchmarks/private_features.py report --work WORK

Beside `private_dice.py` and in its WORK. Every arm is what that benchmark does before the segmenter's turn comes
(`private_polarity.prepared`): noisy styles of all four hospitals, the linear judge trained on A's private patients, noisy votes,
in one budget with the segmenter, which is not trained here because `polarity` does not read it. The arm `exact` has no noise on
its styles. Concordance (CCC) of radiomics features of eight travelling subjects at B, C and D with the same subjects at A: median
over features, as scanned and harmonized. A line an arm goes to WORK/features.jsonl; what is there is not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from learned_training import SITES
from private_bench import RECIPES, Arm, PrivateBench
from private_dice import NO_NOISE
from private_dice_report import shown, table
from private_polarity import STYLE_NOISE, Prepared, prepared, votes_of

from nnunet_fedharm.evaluation.harmonize_folder import harmonize_folder
from nnunet_fedharm.evaluation.paired_files import find_pairs
from nnunet_fedharm.evaluation.quality import Folders, measure_pairs
from nnunet_fedharm.evaluation.quality_summary import summarize_features
from nnunet_fedharm.harmonizers.base import INVERTED_BELOW
from nnunet_fedharm.nnunet_root import NnunetRoot

RECIPE = "simulated-polarity"
EPSILONS = (8.0, 1.0, NO_NOISE, 3.0, 32.0)
MODES = ("central", "federated")
EXACT = "exact"
"""Name of the mode without noise on the styles, else central; one epsilon stands for all."""
OTHERS = SITES[1:]


def agreement(own: PrivateBench, arm: Arm, ready: Prepared, site: str) -> Mapping[str, float]:
    """Median CCC over features, as scanned and harmonized."""
    models = NnunetRoot(own.work / "models" / arm.name / site)
    model = own.write_model(models, ready.public, RECIPES[arm.recipe].kind, ready.weights, site)
    images, truths = (own.paired.work / "test" / name / "images" for name in (site, SITES[0]))
    output = own.work / "predictions" / arm.name / site
    harmonize_folder(model, images, output, site=site, progress=False)
    labels = own.paired.work / "test" / SITES[0] / "labels"
    folders = Folders(truths, images, output, labels)
    found = summarize_features(measure_pairs(find_pairs(images, truths), folders, progress=False), seed=0)
    if found is None:
        raise SystemExit("No features were measured.")
    (rows,) = found["sites"].values()
    return {state: float(rows["median"][state]["value"]) for state in ("before", "after")}


def measure(own: PrivateBench, mode: str, epsilon: float, seed: int) -> dict[str, Any]:
    """One arm."""
    exact = mode == EXACT
    arm = Arm(RECIPE, MODES[0] if exact else mode, epsilon, seed, use=f"features-{mode}-")
    began = time.process_time()
    ready = prepared(own, arm, style_noise=0.0 if exact else STYLE_NOISE)
    ccc = {site: dict(agreement(own, arm, ready, site)) for site in OTHERS}
    own.forget(arm.name)
    seconds = time.process_time() - began
    return {
        "mode": mode, "epsilon": epsilon, "seed": seed, "ccc": ccc, **votes_of(ready.weights), "cpu_s": round(seconds, 1),
    }  # fmt: skip


def run(own: PrivateBench, modes: Sequence[str], epsilons: Sequence[float], seeds: Sequence[int]) -> None:
    """All arms that WORK does not have."""
    own.ready([RECIPES[RECIPE].start])
    log, key = own.work / "features.jsonl", ("mode", "epsilon", "seed")
    arms = [(EXACT, NO_NOISE, 0)]
    arms += [(mode, epsilon, seed) for seed, epsilon, mode in itertools.product(seeds, epsilons, modes)]
    done = {tuple(entry[name] for name in key) for entry in entries(log)}
    for arm in (arm for arm in arms if arm not in done):
        entry = measure(own, *arm)
        with log.open("a") as stream:
            stream.write(json.dumps(entry) + "\n")
        print(time.strftime("%H:%M"), entry, flush=True)


def entries(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def report(work: Path) -> None:
    """A row an epsilon and mode: mean and range over seeds, and who was taken for inverted."""
    found = entries(work / "features.jsonl")
    rows = [["as scanned", "", "", *(f"{found[0]['ccc'][site]['before']:.2f}" for site in OTHERS), ""]]
    order = [(EXACT, NO_NOISE), *((mode, epsilon) for epsilon in sorted(EPSILONS, reverse=True) for mode in MODES)]
    for mode, epsilon in order:
        seeds = [entry for entry in found if (entry["mode"], entry["epsilon"]) == (mode, epsilon)]
        if seeds:
            turned = [
                " ".join(site for site in OTHERS if entry[f"vote_{site}"] < INVERTED_BELOW) or "none" for entry in seeds
            ]
            columns = [[entry["ccc"][site]["after"] for entry in seeds] for site in OTHERS]
            told = "exact styles, central" if mode == EXACT else mode
            rows.append([shown(epsilon), told, str(len(seeds)), *map(spread, columns), ", ".join(sorted(set(turned)))])
    print(table(["epsilon", "mode", "seeds", *OTHERS, "turned over"], rows))


def spread(values: Sequence[float]) -> str:
    mean = f"{np.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "report"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=MODES)
    parser.add_argument("--epsilons", nargs="*", type=float, default=list(EPSILONS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    if arguments.action == "report":
        report(arguments.work)
        return
    os.environ |= {"nnUNet_n_proc_DA": "0", "nnUNet_compile": "f"}
    torch.set_num_threads(1)
    run(PrivateBench(arguments.data, arguments.work.resolve()), arguments.modes, arguments.epsilons, arguments.seeds)


if __name__ == "__main__":
    main()
