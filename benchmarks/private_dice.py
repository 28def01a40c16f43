"""Dice against epsilon under differential privacy by patient, centralized and federated, on the four hippocampus hospitals.

    python benchmarks/private_dice.py run    --data Dataset910_HippocampusSites --work WORK [--recipes ...] [--modes ...]
    python benchmarks/private_dice.py report --work WORK --page docs/benchmarks/privacy.md

Two situations. `simulated`: nothing of these patients is public; A, B, C and D are private, and the training starts from a
model of simulated bodies (`private_shapes.py`); `random`: from random weights. `public`: site A is a public data set with labels;
B, C and D are private, and the training starts from a model of A. Centralized: `LocalTraining` on the pooled cases, which is
what `nnUNetv2_train` runs. Federated: rounds of `LocalTraining` at each site in this process and their mean by cases, which is
what Flower carries (tests/federation hold that); every site has a ledger and noise of its own. Shared: `--patient-noise
distributed`, one step a round with one noise for all sites (`private_shared.py`). Delta is .001: of 32 patients a site, 1 / N is
.03. Each arm's result is a file in WORK: an interrupted benchmark goes on where it stopped, and several processes share one WORK.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from learned_training import SITES, Weights
from nnunetv2.training.logging.nnunet_logger import MetaLogger
from private_bench import (
    CONFIGURATION,
    DELTA,
    RECIPES,
    REFERENCE_STEPS,
    Arm,
    PrivateBench,
    Recipe,
    locked,
    schedule,
    spent,
)
from private_polarity import ROUNDS, Prepared, prepared, private_styles, vote, votes_of
from private_shared import train_shared

from nnunet_fedharm.privacy.options import PrivacyOptions
from nnunet_fedharm.trainers.names import trainer_name_for
from nnunet_fedharm.trainers.results import initial_weights

SEEDS = (0, 1, 2)
NO_NOISE = 1000.0
"""Stands for epsilon infinity: clipping, and noise of a tenth of the clipping norm a step."""
MODES = ("central", "federated", "shared")
EPSILONS = {
    "simulated-all": (8.0, 1.0, NO_NOISE, 3.0, 32.0),
    "public-all": (8.0, 1.0),
    "simulated-polarity": (8.0, 1.0, 3.0, NO_NOISE),
    "simulated-norm-heads": (8.0, 1.0),
    "simulated-large-batch": (8.0,),
    "simulated-long": (8.0,),
    "public-norm-heads": (8.0,),
}
"""Recipe -> epsilons, in the order in which they are run. `random-all` is run at 8, centralized."""


def run_private(own: PrivateBench, arm: Arm) -> tuple[Any, Weights, dict[str, Any]]:
    """Plans, weights and costs of one private training."""
    ready = prepared(own, arm)
    found: dict[str, Any] = {}
    if arm.mode == "shared":
        weights, found = train_shared(own, arm, ready)
    else:
        weights = train_central(ready) if arm.mode == "central" else train_federated(ready)
    spending = max(spent(root) for root in ready.roots.values())
    return ready.public, weights, {"epsilon_spent": spending, **found, **votes_of(weights)}


def train_central(ready: Prepared) -> Weights:
    """All epochs in one place."""
    (training,) = ready.trainings.values()
    done = training.run(phase="segmenter", round_index=0, first_epoch=0, epochs=2 * ROUNDS, weights=ready.weights)
    return done.weights


def train_federated(ready: Prepared) -> Weights:
    """FedAvg by cases over rounds of two local epochs."""
    weights = ready.weights
    for index in range(ROUNDS):
        replies = [
            training.run(phase="segmenter", round_index=index, first_epoch=2 * index, epochs=2, weights=weights)
            for training in ready.trainings.values()
        ]
        counts = [reply.n_cases for reply in replies]
        weights = {
            name: np.average(
                np.stack([reply.weights[name].astype(np.float64) for reply in replies]), axis=0, weights=counts
            ).astype(value.dtype)
            if np.issubdtype(value.dtype, np.floating)
            else value
            for name, value in weights.items()
        }
    return weights


def run_reference(own: PrivateBench, seed: int) -> tuple[Any, Weights]:
    """Without privacy: 640 stock steps on the labels of all sites together, from random weights."""
    planned = schedule(REFERENCE_STEPS, 16, 0.1, 0.9)
    plans, name = own.plans("none", planned, None, {}), Arm("", "reference", 0.0, seed).name
    (root,) = own.world(name, {"pooled": own.pooled(SITES)}).values()
    training = own.training(plans, root, "none", "pooled", name, seed)
    weights = initial_weights(plans, own.bench.description(), CONFIGURATION, training.trainer_name, seed)
    done = training.run(phase="segmenter", round_index=0, first_epoch=0, epochs=16, weights=weights)
    return plans, done.weights


def run_start(own: PrivateBench, recipe: Recipe, seed: int) -> tuple[Any, Weights]:
    """What a recipe starts from, with the votes of the private sites and nothing learnt from their labels."""
    arm = Arm(recipe.start, "start", 0.0, seed)
    planned = schedule(REFERENCE_STEPS, 16, 0.1, 0.9, harmonizer_epochs=1 if recipe.kind == "polarity" else 0)
    privacy = PrivacyOptions(epsilon=8.0, delta=DELTA, fingerprint_noise=0.0)
    places = own.world(arm.name, {site: own.bench.own_root(site) for site in recipe.private})
    styles = private_styles(own, places, privacy) if recipe.kind == "polarity" else {}
    plans = own.plans(recipe.kind, planned, privacy, styles, recipe.judge)
    start = own.start(recipe.start)
    weights = initial_weights(plans, own.bench.description(), CONFIGURATION, trainer_name_for(recipe.kind), seed, start)
    if recipe.kind == "polarity":
        weights = vote(own, plans, arm, places, weights)
    return own.plans(recipe.kind, planned, None, styles, recipe.judge), weights


def run_arm(own: PrivateBench, arm: Arm) -> None:
    """Train, predict and score, unless the result is there or another process is at it."""
    target = own.work / "arms" / f"{arm.name}.json"
    with locked(target.with_suffix(".held"), wait=False) as mine:
        if not mine or target.exists():
            return
        torch.set_num_threads(1)
        MetaLogger.plot_progress_png = lambda *_: None  # a picture after every epoch would be half of a round's time
        found: dict[str, Any] = {}
        recipe = RECIPES.get(arm.recipe)
        kind = "none" if recipe is None else recipe.kind
        began = time.process_time()
        if recipe is None:
            plans, weights = run_reference(own, arm.seed)
        elif arm.mode == "start":
            plans, weights = run_start(own, recipe, arm.seed)
        else:
            plans, weights, found = run_private(own, arm)
        found["cpu_s"] = time.process_time() - began
        sites = own.evaluate(plans, kind, weights, arm.name, SITES)
        entry = {"arm": asdict(arm), "recipe": {} if recipe is None else asdict(recipe), **found, "sites": sites}
        writing = target.with_suffix(".writing")
        writing.write_text(json.dumps(entry))
        writing.replace(target)
        own.forget(arm.name)
    means = {site: round(float(np.mean([case["dice"] for case in cases.values()])), 4) for site, cases in sites.items()}
    print(time.strftime("%H:%M"), arm.name, means, {key: round(value, 1) for key, value in found.items()}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "report"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--page", type=Path, help="Markdown file whose tables are written anew")
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=MODES)
    parser.add_argument("--epsilons", nargs="*", type=float, default=[], help="default: those of EPSILONS")
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    arguments = parser.parse_args()
    if arguments.action == "report":
        from private_dice_report import report

        report(arguments.work, arguments.page)
        return
    if arguments.modes == ["shared"] and not any(map(sharable, arguments.recipes)):
        raise SystemExit(
            "None of the recipes has the mode shared: votes by a judge of public images are in no budget of shared noise."
        )
    os.environ |= {"nnUNet_n_proc_DA": "0", "nnUNet_compile": "f"}
    own = PrivateBench(arguments.data, arguments.work.resolve())
    own.ready(sorted({RECIPES[recipe].start for recipe in arguments.recipes}))
    for arm in all_arms(arguments.recipes, arguments.modes, arguments.epsilons, arguments.seeds):
        run_arm(own, arm)


def sharable(recipe: str) -> bool:
    """Whether its harmonizer, if it has one, learns in rounds of its own, as a federation's does, or nobody votes."""
    return RECIPES[recipe].kind == "none" or RECIPES[recipe].judge_steps > 0


def all_arms(
    recipes: Sequence[str], modes: Sequence[str], epsilons: Sequence[float], seeds: Sequence[int]
) -> list[Arm]:
    """One seed of everything first, so that an interrupted run has whole curves; references and starts always."""
    arms = []
    for seed in seeds:
        arms += [Arm("", "reference", 0.0, seed)]
        # Recipes that begin with the same word have the same start, which is one for all seeds.
        firsts = {recipe.split("-")[0]: recipe for recipe in reversed(recipes) if RECIPES[recipe].start}
        arms += [Arm(recipe, "start", 0.0, seed) for recipe in sorted(firsts.values()) if seed == seeds[0]]
        for recipe in recipes:
            for epsilon in epsilons or EPSILONS.get(recipe, ()):
                arms += [Arm(recipe, mode, epsilon, seed) for mode in modes if mode != "shared" or sharable(recipe)]
            if recipe == "random-all" and "central" in modes:
                arms += [Arm(recipe, "central", 8.0, seed)]
    return arms


if __name__ == "__main__":
    main()
