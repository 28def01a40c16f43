"""Dice against epsilon under differential privacy by patient, centralized and federated, on the four hippocampus hospitals.

    python benchmarks/private_dice.py run    --data Dataset910_HippocampusSites --work WORK [--arms NAME ...]
    python benchmarks/private_dice.py report --work WORK --page docs/benchmarks/privacy.md

Two situations. `simulated`: nothing of these patients is public; A, B, C and D are private, and the training starts from a
model of simulated bodies (`private_shapes.py`); `random`: from random weights. `public`: site A is a public data set with labels;
B, C and D are private, and the training starts from a model of A. Centralized: `LocalTraining` on the pooled cases, which is
what `nnUNetv2_train` runs. Federated: rounds of `LocalTraining` at each site in this process and their mean by cases, which is
what Flower carries (tests/federation hold that); every site has a ledger and noise of its own. Delta is .001: of 32 patients a
site, 1 / N is .03. Each arm's result is a file in WORK, so an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hippocampus_sites import NAME
from learned_training import SITES, Bench, Weights, claimed, predict_and_score
from nnunetv2.training.logging.nnunet_logger import MetaLogger
from private_shapes import write_dataset

from nnunet_fedharm.harmonizers.style import Style
from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.planning.preprocess import preprocess_site
from nnunet_fedharm.planning.section import Schedule, read_section, with_section
from nnunet_fedharm.planning.style import site_style
from nnunet_fedharm.privacy.ledger import Ledger
from nnunet_fedharm.privacy.options import PrivacyOptions
from nnunet_fedharm.sites.registry import SitesFile
from nnunet_fedharm.trainers.local_training import LocalTraining
from nnunet_fedharm.trainers.names import trainer_name_for
from nnunet_fedharm.trainers.results import initial_weights, write_results_folder

CONFIGURATION = "3d_fullres"
DELTA = 1e-3
NO_NOISE = 1000.0
"""Stands for epsilon infinity: clipping, and noise of a tenth of the clipping norm a step."""
SEEDS = (0, 1, 2)
ROUNDS = 3
REFERENCE_STEPS = 640
MODES = ("central", "federated")


@dataclass(frozen=True)
class Recipe:
    """How a private training is set up.

    Attributes:
        start: "simulated", "public" (a model of A), or "" for random weights.
        kind: harmonizer in front.
        groups: of the segmenter that are trained; "" for all.
        steps: optimizer steps, the same at every site.
        patients: expected in one step, over all sites together.
        patches: of a patient in a step.
        lr, clip, momentum: of the optimizer.
    """

    start: str
    kind: str = "none"
    groups: str = ""
    steps: int = 24
    patients: float = 16.0
    patches: int = 2
    lr: float = 0.2
    clip: float = 0.1
    momentum: float = 0.9

    @property
    def private(self) -> tuple[str, ...]:
        return SITES[1:] if self.start == "public" else SITES


RECIPES = {
    "simulated-all": Recipe("simulated", lr=0.6),
    "simulated-large-batch": Recipe("simulated", patients=64.0, lr=0.8),
    "simulated-norm-heads": Recipe("simulated", groups="norm,heads", lr=1.5),
    "random-all": Recipe("", lr=0.6),
    "public-all": Recipe("public", "polarity", lr=0.1),
    "public-norm-heads": Recipe("public", "polarity", groups="norm,heads", lr=0.3),
}
LR_FACTOR = {3.0: 0.5, 1.0: 0.25}
"""The more noise, the smaller the steps: share of a recipe's rate at small epsilons."""


@dataclass(frozen=True)
class Arm:
    recipe: str
    mode: str
    epsilon: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.recipe}_{self.mode}_eps{self.epsilon:g}_seed{self.seed}"


def schedule(steps: int, epochs: int, lr: float, momentum: float, **more: Any) -> Schedule:
    return Schedule(
        segmenter_epochs=epochs, iterations_per_epoch=steps // epochs, val_iterations_per_epoch=1, initial_lr=lr,
        momentum=momentum, augmentation=False, **more,
    )  # fmt: skip


class PrivateBench:
    """Folders, plans and starts.

    Args:
        data: raw Dataset910.
        work: everything that is written.
    """

    def __init__(self, data: Path, work: Path) -> None:
        self.bench = Bench(data, work)
        self.paired = Bench(data, work / "paired")
        self.work = work

    def plans(self, kind: str, planned: Schedule, privacy: PrivacyOptions | None, styles: Mapping[str, Style]) -> Any:
        plans = self.bench.plans("3d")
        section = read_section(plans["configurations"][CONFIGURATION])
        changed = replace(
            section, kind=kind, harmonizer={}, reference="A", schedule=planned, privacy=privacy,
            styles={**section.styles, **styles},
        )  # fmt: skip
        return with_section(plans, changed, (CONFIGURATION,))

    def training(self, plans: Any, root: NnunetRoot, kind: str, site: str, state: str, seed: int) -> LocalTraining:
        folder = self.work / "states" / state
        shutil.rmtree(folder, ignore_errors=True)
        return LocalTraining(
            root=root, dataset_name=NAME, plans=plans, dataset_json=self.bench.description(), configuration=CONFIGURATION,
            fold="all", site=site, trainer_name=trainer_name_for(kind), state_folder=folder, seed=seed, device="cpu",
        )  # fmt: skip

    def pooled(self, sites: Sequence[str]) -> NnunetRoot:
        """Preprocessed cases of some sites in one root."""
        root = NnunetRoot(self.work / f"pooled-{''.join(sites)}")
        with claimed(root.path / "ready") as mine:
            for site in sites if mine else ():
                source = self.bench.own_root(site).preprocessed / NAME
                shutil.copytree(source, root.create().preprocessed / NAME, dirs_exist_ok=True, copy_function=link)
            if mine:
                registry = SitesFile.load(self.work / "raw" / NAME / "sites.json")
                registry.save(root.preprocessed / NAME / "sites.json")
        return root

    @cache  # noqa: B019 - lives as long as the process
    def start(self, name: str) -> str:
        """Results folder of the model that recipes start from, one for all seeds as if it were published; "" for none."""
        if not name:
            return ""
        root, kind = NnunetRoot(self.work / "starts" / name), "polarity" if name == "public" else "none"
        planned = schedule(REFERENCE_STEPS, 16, 0.1, 0.9, harmonizer_epochs=10 if kind == "polarity" else 0)
        plans = self.plans(kind, planned, None, {})
        with claimed(root.path / "ready") as mine:
            if mine:
                cases = self._simulated() if name == "simulated" else self.bench.own_root("A")
                training = self.training(plans, cases, kind, "A", f"start-{name}", 0)
                weights = initial_weights(plans, self.bench.description(), CONFIGURATION, training.trainer_name, 0)
                began = time.process_time()
                for phase, epochs in (
                    ("harmonizer", planned.harmonizer_epochs),
                    ("segmenter", planned.segmenter_epochs),
                ):
                    if epochs:
                        weights = training.run(
                            phase=phase,
                            round_index=0,
                            first_epoch=0,
                            epochs=epochs,
                            weights=weights,  # type: ignore[arg-type]
                        ).weights
                print(f"start {name}: {time.process_time() - began:.0f} CPU s", flush=True)
                self.write_model(root, plans, kind, weights, "A")
        (fold,) = root.results.rglob("fold_all")
        return str(fold.parent)

    def write_model(self, root: NnunetRoot, plans: Any, kind: str, weights: Weights, site: str) -> Path:
        fold = write_results_folder(
            root, NAME, plans, self.bench.description(), {}, CONFIGURATION, "all", trainer_name_for(kind), weights,
            epoch=0, which=("final",), site=site,
        )  # fmt: skip
        return fold.parent

    def evaluate(self, plans: Any, kind: str, weights: Weights, name: str, sites: Sequence[str]) -> dict[str, Any]:
        """Site -> case -> scores of the stock predictor with that site's results folder, on the subjects that travelled."""
        found = {}
        for site in sites:
            self._pair(site)
            model = self.write_model(NnunetRoot(self.work / "models" / site), plans, kind, weights, site)
            found[site], _ = predict_and_score(self.paired, model, site, self.work / "predictions" / name / site)
        return found

    def _pair(self, site: str) -> None:
        """The travelling subjects alone: eight people, the same at every site, so that sites differ by their scanner only."""
        for part in ("images", "labels"):
            folder = self.paired.work / "test" / site / part
            folder.mkdir(parents=True, exist_ok=True)
            for path in (self.work / "test" / site / part).glob("travelling_*"):
                link(str(path), str(folder / path.name))
        description = self.paired.work / "raw" / NAME / "dataset.json"
        description.parent.mkdir(parents=True, exist_ok=True)
        link(str(self.work / "raw" / NAME / "dataset.json"), str(description))

    def _simulated(self) -> NnunetRoot:
        root = NnunetRoot(self.work / "simulated").create()
        with claimed(root.path / "ready") as mine:
            if mine:
                description = {**self.bench.description(), "numTraining": 200}
                write_dataset(root.raw / NAME, description, cases=200, seed=0)
                (root.raw / NAME / "dataset.json").write_text(json.dumps(description))
                plans = self.bench.plans("3d")
                preprocess_site(root, NAME, plans, CONFIGURATION, num_processes=1, dataset_json=description)
        return root


def link(source: str, target: str) -> None:
    if not Path(target).exists():
        os.link(source, target)


def new_ledger(root: NnunetRoot) -> None:
    """Every arm is a world of its own, in which the site has released nothing yet."""
    for path in (root.path / "fedharm").glob("privacy-ledger*"):
        path.unlink()


def spent(root: NnunetRoot) -> float:
    return Ledger(root.path / "fedharm").spent(DELTA).epsilon


def run_private(own: PrivateBench, arm: Arm) -> tuple[Any, Weights, dict[str, Any]]:
    """Plans, weights and costs of one private training."""
    recipe = RECIPES[arm.recipe]
    federated = arm.mode == "federated"
    places = {site: own.bench.own_root(site) for site in recipe.private}
    privacy = PrivacyOptions(
        epsilon=arm.epsilon, delta=DELTA, clip=recipe.clip, patches_per_patient=recipe.patches,
        patients_per_step=recipe.patients / (len(places) if federated else 1),
        fingerprint_noise=-1.0 if federated else 0.0,
    )  # fmt: skip
    planned = schedule(
        recipe.steps, 2 * ROUNDS, recipe.lr * LR_FACTOR.get(arm.epsilon, 1.0), recipe.momentum, trained_groups=recipe.groups,
        harmonizer_epochs=1 if recipe.kind == "polarity" else 0,
    )  # fmt: skip
    for root in places.values():
        new_ledger(root)
    styles = private_styles(own, places, privacy) if recipe.kind == "polarity" else {}
    plans = own.plans(recipe.kind, planned, privacy, styles)
    start = own.start(recipe.start)
    trainer = trainer_name_for(recipe.kind)
    weights = initial_weights(plans, own.bench.description(), CONFIGURATION, trainer, arm.seed, start)
    if recipe.kind == "polarity":
        weights = vote(own, plans, arm, places, weights)
    if federated:
        weights, found = train_federated(own, plans, arm, places, weights)
    else:
        weights, found = train_central(own, plans, arm, weights)
    public = own.plans(recipe.kind, planned, None, styles)
    return public, weights, found


def private_styles(own: PrivateBench, places: Mapping[str, NnunetRoot], privacy: PrivacyOptions) -> dict[str, Style]:
    """Styles of the private sites with noise; those of the plans for the others."""
    plans, noise = own.bench.plans("3d"), privacy.style_noise
    return {site: site_style(root, NAME, plans, CONFIGURATION, noise_multiplier=noise) for site, root in places.items()}


def vote(own: PrivateBench, plans: Any, arm: Arm, places: Mapping[str, NnunetRoot], weights: Weights) -> Weights:
    """Each private site's own vote on its polarity, with noise, by a judge of public images."""
    polarity = weights["harmonizer.bank_polarity"].copy()
    for site, root in places.items():
        training = own.training(plans, root, "polarity", site, f"{arm.name}-vote-{site}", arm.seed)
        voted = training.run(phase="harmonizer", round_index=0, first_epoch=0, epochs=1, weights=weights).weights
        row = SITES.index(site)
        polarity[row] = voted["harmonizer.bank_polarity"][row]
    return {
        **weights,
        "harmonizer.bank_polarity": polarity,
        "harmonizer.gate": np.ones_like(weights["harmonizer.gate"]),
    }


def train_central(own: PrivateBench, plans: Any, arm: Arm, weights: Weights) -> tuple[Weights, dict[str, Any]]:
    recipe = RECIPES[arm.recipe]
    root = own.pooled(recipe.private)
    new_ledger(root)
    training = own.training(plans, root, recipe.kind, "pooled", arm.name, arm.seed)
    done = training.run(phase="segmenter", round_index=0, first_epoch=0, epochs=2 * ROUNDS, weights=weights)
    return done.weights, {"epsilon_spent": spent(root)}


def train_federated(
    own: PrivateBench, plans: Any, arm: Arm, places: Mapping[str, NnunetRoot], weights: Weights
) -> tuple[Weights, dict[str, Any]]:
    """FedAvg by cases over rounds of two local epochs."""
    recipe = RECIPES[arm.recipe]
    sites = {
        site: own.training(plans, root, recipe.kind, site, f"{arm.name}-{site}", arm.seed)
        for site, root in places.items()
    }
    for index in range(ROUNDS):
        replies = [
            training.run(phase="segmenter", round_index=index, first_epoch=2 * index, epochs=2, weights=weights)
            for training in sites.values()
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
    return weights, {"epsilon_spent": max(spent(root) for root in places.values())}


def run_reference(own: PrivateBench, seed: int) -> tuple[Any, Weights]:
    """Without privacy: 640 stock steps on the labels of all sites together, from random weights."""
    planned = schedule(REFERENCE_STEPS, 16, 0.1, 0.9)
    plans = own.plans("none", planned, None, {})
    training = own.training(plans, own.pooled(SITES), "none", "pooled", f"reference-{seed}", seed)
    weights = initial_weights(plans, own.bench.description(), CONFIGURATION, training.trainer_name, seed)
    done = training.run(phase="segmenter", round_index=0, first_epoch=0, epochs=16, weights=weights)
    return plans, done.weights


def run_start(own: PrivateBench, recipe: Recipe, seed: int) -> tuple[Any, Weights]:
    """What a recipe starts from, with the votes of the private sites and nothing learnt from their labels."""
    arm = Arm("start", "start", 8.0, seed)
    planned = schedule(REFERENCE_STEPS, 16, 0.1, 0.9, harmonizer_epochs=1 if recipe.kind == "polarity" else 0)
    privacy = PrivacyOptions(epsilon=8.0, delta=DELTA, fingerprint_noise=0.0)
    places = {site: own.bench.own_root(site) for site in recipe.private}
    styles = private_styles(own, places, privacy) if recipe.kind == "polarity" else {}
    plans = own.plans(recipe.kind, planned, privacy, styles)
    start = own.start(recipe.start)
    weights = initial_weights(plans, own.bench.description(), CONFIGURATION, trainer_name_for(recipe.kind), seed, start)
    if recipe.kind == "polarity":
        for root in places.values():
            new_ledger(root)
        weights = vote(own, plans, arm, places, weights)
    return own.plans(recipe.kind, planned, None, styles), weights


def run_arm(own: PrivateBench, arm: Arm) -> None:
    target = own.work / "arms" / f"{arm.name}.json"
    if target.exists():
        return
    torch.set_num_threads(1)
    MetaLogger.plot_progress_png = lambda *_: None  # a picture after every epoch would be half of a round's time
    began, found, kind = time.process_time(), {}, "none"
    if arm.mode == "reference":
        plans, weights = run_reference(own, arm.seed)
    elif arm.mode == "start":
        kind = RECIPES[arm.recipe].kind
        plans, weights = run_start(own, RECIPES[arm.recipe], arm.seed)
    else:
        own.start(RECIPES[arm.recipe].start)  # not counted as this arm's time
        began, kind = time.process_time(), RECIPES[arm.recipe].kind
        plans, weights, found = run_private(own, arm)
    found["cpu_s"] = time.process_time() - began
    sites = own.evaluate(plans, kind, weights, arm.name, SITES)
    recipe = {} if arm.mode == "reference" else asdict(RECIPES[arm.recipe])
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"arm": asdict(arm), "recipe": recipe, **found, "sites": sites}))
    means = {site: round(float(np.mean([case["dice"] for case in cases.values()])), 4) for site, cases in sites.items()}
    print(time.strftime("%H:%M"), arm.name, means, {key: round(value, 1) for key, value in found.items()}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "report"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--page", type=Path, help="Markdown file whose tables are written anew")
    parser.add_argument("--arms", nargs="*", default=[], help="beginnings of names of arms; default all")
    arguments = parser.parse_args()
    if arguments.action == "report":
        from private_dice_report import report

        report(arguments.work, arguments.page)
        return
    own = PrivateBench(arguments.data, arguments.work.resolve())
    for arm in all_arms():
        if not arguments.arms or arm.name.startswith(tuple(arguments.arms)):
            run_arm(own, arm)


def all_arms() -> list[Arm]:
    """One seed of everything first, so that an interrupted run has whole curves."""
    arms = []
    for seed in SEEDS:
        several = [("public-all", 8.0), ("simulated-all", 8.0), ("simulated-all", 1.0), ("simulated-all", NO_NOISE)]
        several += [("public-all", 1.0), ("simulated-all", 3.0), ("simulated-norm-heads", 8.0), ("simulated-all", 32.0)]
        several += [("simulated-large-batch", 8.0), ("simulated-norm-heads", 1.0), ("public-norm-heads", 8.0)]
        arms += [Arm("", "reference", 0.0, seed)]
        arms += [Arm(name, "start", 0.0, seed) for name in ("public-all", "simulated-all") if seed == 0]
        arms += [Arm(name, mode, epsilon, seed) for name, epsilon in several for mode in MODES]
        arms += [Arm("random-all", "central", 8.0, seed)]
    return arms


if __name__ == "__main__":
    main()
