"""Which recipes of private training keep accuracy: one short training a line, on the pooled cases of `private_dice.py`.

    PYTHONPATH=benchmarks python docs/experiments/private-training/search.py --data DATA --work WORK --recipes recipes.jsonl

A line of `recipes.jsonl` is a JSON object with some of the keys of `DEFAULTS`; results go to WORK/search.jsonl. The step is
the product's (`PatientGradients`, `draw_patients`, noise for the whole budget), the loop around it is this file's, so that the
weights can be averaged over steps (`ema`). Trained weights are thrown away, and no ledger is kept: the data are public.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hippocampus_sites import NAME
from private_bench import CONFIGURATION, DELTA, REFERENCE_STEPS, PrivateBench, schedule

from nnunet_fedharm.privacy.noise import SecureNoise
from nnunet_fedharm.privacy.options import common_noise
from nnunet_fedharm.privacy.patient_gradients import PatientGradients, draw_patients
from nnunet_fedharm.trainers.groups import tensors_of
from nnunet_fedharm.trainers.names import trainer_name_for
from nnunet_fedharm.trainers.patient_loader import from_stock_loader
from nnunet_fedharm.trainers.results import initial_weights, make_trainer
from nnunet_fedharm.trainers.weights import Weights, export_weights, load_weights, unique_tensors

DEFAULTS: dict[str, Any] = {
    "start": "simulated", "kind": "none", "sites": "ABCD", "groups": "", "patients": 24.0, "steps": 24, "patches": 2,
    "lr": 0.2, "clip": 0.1, "momentum": 0.9, "epsilon": 8.0, "ema": 0.0,
}  # fmt: skip


def prepared(own: PrivateBench, recipe: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Plans, trainer with the start's weights, and its loader of training patches."""
    plans = own.plans(recipe["kind"], schedule(REFERENCE_STEPS, 16, recipe["lr"], 0.9), None, {})
    description, name = own.bench.description(), trainer_name_for(recipe["kind"])
    with own.pooled(tuple(recipe["sites"])).activate():
        trainer = make_trainer(name, plans, CONFIGURATION, "all", description)
        trainer.disable_checkpointing = True
        trainer.initialize()
        loader = trainer.get_dataloaders()[0].data_loader
    start = own.start(recipe["start"])
    load_weights(trainer.network, initial_weights(plans, description, CONFIGURATION, name, 0, start))
    return plans, trainer, loader


def train(trainer: Any, loader: Any, recipe: dict[str, Any]) -> tuple[dict[str, Weights], dict[str, float]]:
    """Weights after the last step, and their average if asked for; and numbers about the training."""
    chosen = tensors_of(trainer.network, recipe["groups"].split(",")) if recipe["groups"] else None
    trained = []
    for name, tensor in unique_tensors(trainer.network).items():
        if isinstance(tensor, torch.nn.Parameter):
            tensor.requires_grad_(name.startswith("segmenter.") and (chosen is None or name in chosen))
            trained += [tensor] if tensor.requires_grad else []
    patients = [(case,) for case in trainer.do_split()[0]]
    rate, steps = min(1.0, recipe["patients"] / len(patients)), recipe["steps"]
    noise = common_noise(recipe["epsilon"], DELTA, ((rate, steps),), ()) if recipe["epsilon"] else 0.0
    gradients = PatientGradients(
        trained,
        clip=recipe["clip"],
        noise_multiplier=noise,
        expected_patients=rate * len(patients),
        noise=SecureNoise(),
    )
    optimizer = torch.optim.SGD(trained, lr=recipe["lr"], momentum=recipe["momentum"], nesterov=True)
    load, average, norms = from_stock_loader(loader, recipe["patches"]), None, []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = recipe["lr"] * (1 - step / steps) ** 0.9
        for cases in draw_patients(patients, rate):
            batch = load(cases)
            trainer.tell_sites(batch)
            gradients.start_patient()
            trainer.loss(trainer.network(batch["data"]), batch["target"]).backward()
            norms.append(gradients.end_patient())
        gradients.release()
        optimizer.step()
        late = average is not None and step >= steps // 4
        share = 1 - recipe["ema"] if late else 1.0
        average = [w.detach().clone().lerp_(a, 1 - share) for w, a in zip(trained, average or trained, strict=True)]
    results = {"last": export_weights(trainer.network)}
    if recipe["ema"]:
        with torch.no_grad():
            for tensor, value in zip(trained, average or [], strict=True):
                tensor.copy_(value)
        results["average"] = export_weights(trainer.network)
    size = sum(tensor.numel() for tensor in trained)
    return results, {"weights": size, "noise": noise, "norm": float(np.median(norms)) if norms else 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--data", "--work", "--recipes"):
        parser.add_argument(name, type=Path, required=True)
    arguments = parser.parse_args()
    os.environ |= {"nnUNet_n_proc_DA": "0", "nnUNet_compile": "f"}
    torch.set_num_threads(1)
    own = PrivateBench(arguments.data, arguments.work.resolve())
    for line in arguments.recipes.read_text().splitlines():
        recipe = DEFAULTS | json.loads(line)
        plans, trainer, loader = prepared(own, recipe)
        began = time.process_time()
        results, numbers = train(trainer, loader, recipe)
        numbers["cpu_s"] = time.process_time() - began
        for which, weights in results.items():
            scores = own.evaluate(plans, recipe["kind"], weights, f"search-{which}-{os.getpid()}", "ABCD")
            dice = {site: float(np.mean([case["dice"] for case in cases.values()])) for site, cases in scores.items()}
            with (own.work / "search.jsonl").open("a") as stream:
                stream.write(json.dumps({**recipe, **numbers, "which": which, "dice": dice, "dataset": NAME}) + "\n")
            print(line, which, dice, flush=True)


if __name__ == "__main__":
    main()
