"""One clip over harmonizer and segmenter, or one each with composed accounting: which learns more where a step trains both?

    PYTHONPATH=benchmarks python docs/experiments/private-clip/clips.py --data DATA --work WORK

WORK is that of `private_dice.py`, or is made like it; results go to WORK/clips.jsonl, and what is there is not run again. The
steps are the product's (`PatientGradients`, `draw_patients`, the trainer's optimizer and loss under `phases` finetune), the loop
around them is this file's. A seed is of the harmonizer's first weights; noise and patients are drawn anew each time.

| symbol | here |
|---|---|
| sigma | noise multiplier of one joint clip C for the whole training |
| C_s, C_h | clips of segmenter and harmonizer |
| p | share of the harmonizer in the budget: sigma_h = sigma / sqrt(p), sigma_s = sigma / sqrt(1 - p) |

Both releases of a step have the same patients, so the pair (g_s / (C_s sigma_s), g_h / (C_h sigma_h)) is one Gaussian release of
multiplier sigma: 1 / sigma^2 = 1 / sigma_s^2 + 1 / sigma_h^2. That is the best accounting that two clips can have.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from private_bench import CONFIGURATION, DELTA, PrivateBench, schedule

from nnunet_fedharm.privacy.noise import SecureNoise
from nnunet_fedharm.privacy.options import common_noise
from nnunet_fedharm.privacy.patient_gradients import PatientGradients, draw_patients
from nnunet_fedharm.trainers.names import trainer_name_for
from nnunet_fedharm.trainers.patient_loader import from_stock_loader
from nnunet_fedharm.trainers.results import initial_weights, make_trainer
from nnunet_fedharm.trainers.weights import export_weights, load_weights

KIND, SITES, CLIP, EPSILON, STEPS, PATIENTS, PATCHES, LR = "curve", "ABCD", 0.1, 8.0, 24, 16.0, 2, 0.6
ARMS: dict[str, dict[str, float]] = {
    "joint": {},
    "two, half each": {"p": 0.5, "harmonizer_clip": CLIP},
    "two, a tenth, small clip": {"p": 0.1, "harmonizer_clip": CLIP / 10},
}


def prepared(own: PrivateBench, seed: int) -> tuple[Any, Any, Any]:
    """Plans, trainer with the start's segmenter behind an identity, and its loader of training patches."""
    planned = schedule(STEPS, 1, LR, 0.9, phases="finetune")
    plans, description, name = own.plans(KIND, planned, None, {}), own.bench.description(), trainer_name_for(KIND)
    with own.pooled(tuple(SITES)).activate():
        trainer = make_trainer(name, plans, CONFIGURATION, "all", description)
        trainer.disable_checkpointing = True
        trainer.initialize()
        loader = trainer.get_dataloaders()[0].data_loader
    start = initial_weights(plans, description, CONFIGURATION, name, seed, own.start("simulated"))
    load_weights(trainer.network, start)
    trainer.harmonizer.open_gate()
    return plans, trainer, loader


def collectors(trainer: Any, arm: dict[str, float], expected: float, sigma: float) -> list[PatientGradients]:
    """Of all that is trained together, or of segmenter and harmonizer."""
    segmenter, harmonizer = ([*group["params"]] for group in trainer.optimizer.param_groups)
    shares = {"expected_patients": expected, "noise": SecureNoise()}
    if not arm:
        return [PatientGradients([*segmenter, *harmonizer], clip=CLIP, noise_multiplier=sigma, **shares)]
    p = arm["p"]
    return [
        PatientGradients(segmenter, clip=CLIP, noise_multiplier=sigma / math.sqrt(1 - p), **shares),
        PatientGradients(harmonizer, clip=arm["harmonizer_clip"], noise_multiplier=sigma / math.sqrt(p), **shares),
    ]


def train(trainer: Any, loader: Any, arm: dict[str, float]) -> dict[str, float]:
    """One training; median norms of a patient's gradient, by part."""
    patients = [(case,) for case in trainer.do_split()[0]]
    rate = min(1.0, PATIENTS / len(patients))
    sigma = common_noise(EPSILON, DELTA, ((rate, STEPS),), ())
    found = collectors(trainer, arm, rate * len(patients), sigma)
    parts = {name: group["params"] for name, group in zip("sh", trainer.optimizer.param_groups, strict=True)}
    load, norms = from_stock_loader(loader, PATCHES), {"s": [0.0] * 0, "h": [0.0] * 0}
    for step in range(STEPS):
        for group in trainer.optimizer.param_groups:
            group["lr"] = LR * group["lr_factor"] * (1 - step / STEPS) ** 0.9
        for cases in draw_patients(patients, rate):
            batch = load(cases)
            trainer.tell_sites(batch)
            for collector in found:
                collector.start_patient()
            trainer.loss(trainer.network(batch["data"]), batch["target"]).backward()
            for name, group in parts.items():
                lengths = [parameter.grad.norm() for parameter in group if parameter.grad is not None]
                norms[name].append(float(torch.stack(lengths).norm()) if lengths else 0.0)
            for collector in found:
                collector.end_patient()
        for collector in found:
            collector.release()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)
    trainer.harmonizer.set_batch_styles(None)
    sizes = {f"weights_{name}": sum(value.numel() for value in group) for name, group in parts.items()}
    return {"sigma": sigma, **{f"norm_{name}": float(np.median(values)) for name, values in norms.items()}, **sizes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--data", "--work"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    os.environ |= {"nnUNet_n_proc_DA": "0", "nnUNet_compile": "f"}
    torch.set_num_threads(1)
    own = PrivateBench(arguments.data, arguments.work.resolve())
    own.ready(["simulated"])
    log = own.work / "clips.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    done = {(entry["arm"], entry["seed"]) for entry in map(json.loads, lines)}
    for seed in arguments.seeds:
        for name, arm in ARMS.items():
            if (name, seed) in done:
                continue
            plans, trainer, loader = prepared(own, seed)
            began = time.process_time()
            numbers = train(trainer, loader, arm)
            numbers["cpu_s"] = time.process_time() - began
            folder = f"clips-{os.getpid()}"
            scores = own.evaluate(plans, KIND, export_weights(trainer.network), folder, SITES)
            own.forget(folder)
            dice = {site: float(np.mean([case["dice"] for case in cases.values()])) for site, cases in scores.items()}
            line = json.dumps({"arm": name, "seed": seed, **numbers, "dice": dice})
            with log.open("a") as stream:
                stream.write(line + "\n")
            print(line, flush=True)


if __name__ == "__main__":
    main()
