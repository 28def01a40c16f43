"""Does the judge of `polarity` still find the inverted hospital when it is trained under differential privacy by patient?

    PYTHONPATH=benchmarks python docs/experiments/private-harmonizer/judge.py --data Dataset910_HippocampusSites --work WORK

WORK as of `benchmarks/private_dice.py`. Site A, the reference, trains the judge on its 42 patients (nothing is public, random
weights); B, C and D vote with noise. A line of JSON for each setting and seed goes to WORK/judge.jsonl; what is there is not
run again. A vote of -1 turns a site over, +1 leaves it; only D is inverted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from pathlib import Path

import torch
from learned_training import SITES
from private_bench import CONFIGURATION, DELTA, Arm, PrivateBench, schedule, spent
from private_dice import private_styles, vote

from nnunet_fedharm.planning.section import read_section
from nnunet_fedharm.privacy.options import PrivacyOptions
from nnunet_fedharm.trainers.results import initial_weights


def run(
    own: PrivateBench, judge: str, epsilon: float, steps: int, lr: float, patients: float, seed: int
) -> dict[str, object]:
    name = f"judge-{judge}-{epsilon:g}-{steps}-{lr:g}-{patients:g}-{seed}"
    places = own.world(name, {site: own.bench.own_root(site) for site in SITES})
    privacy = PrivacyOptions(
        epsilon=epsilon, delta=DELTA, clip=0.1, patients_per_step=patients, patches_per_patient=2, fingerprint_noise=0.0
    )
    planned = schedule(steps, 1, 0.1, 0.9, harmonizer_epochs=1, harmonizer_lr=lr)
    styles = private_styles(own, places, privacy)
    plans = own.plans("polarity", planned, privacy, styles, judge)
    assert read_section(plans["configurations"][CONFIGURATION]).privacy == privacy
    weights = initial_weights(
        plans, own.bench.description(), CONFIGURATION, "nnUNetTrainerFedHarmPolarity", seed, own.start("simulated")
    )
    began = time.process_time()
    training = own.training(plans, places["A"], "polarity", "A", f"{name}-A", seed)
    reply = training.run(phase="harmonizer", round_index=0, first_epoch=0, epochs=1, weights=weights)
    seconds = time.process_time() - began
    others = {site: root for site, root in places.items() if site != "A"}
    voted = vote(own, plans, Arm(name, "judge", epsilon, seed), others, reply.weights)
    found = {site: float(voted["harmonizer.bank_polarity"][SITES.index(site), 0]) for site in SITES}
    entry = {
        "judge": judge, "epsilon": epsilon, "steps": steps, "lr": lr, "patients": patients, "seed": seed, "votes": found,
        "spent": spent(places["A"]), "cpu_s": round(seconds, 1),
    }  # fmt: skip
    own.forget(name)
    return entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--judges", nargs="*", default=["network", "linear"], choices=("network", "linear"))
    parser.add_argument("--epsilons", nargs="*", type=float, default=[1000.0, 8.0, 3.0, 1.0])
    parser.add_argument("--steps", nargs="*", type=int, default=[120])
    parser.add_argument("--rates", nargs="*", type=float, default=[1e-3])
    parser.add_argument("--patients", nargs="*", type=float, default=[10.0])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    arguments = parser.parse_args()
    os.environ |= {"nnUNet_n_proc_DA": "0", "nnUNet_compile": "f"}
    torch.set_num_threads(1)
    own = PrivateBench(arguments.data, arguments.work.resolve())
    own.ready(["simulated"])
    log = own.work / "judge.jsonl"
    keys = ("judge", "epsilon", "steps", "lr", "patients", "seed")
    done = (
        {tuple(json.loads(line)[key] for key in keys) for line in log.read_text().splitlines()}
        if log.exists()
        else set()
    )
    for seed, *setting in itertools.product(
        arguments.seeds, arguments.judges, arguments.epsilons, arguments.steps, arguments.rates, arguments.patients
    ):
        if (*setting, seed) in done:
            continue
        entry = run(own, *setting, seed)
        print(entry, flush=True)
        with log.open("a") as stream:
            stream.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
