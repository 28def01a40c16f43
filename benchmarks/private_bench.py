"""The parts of `private_dice.py`: recipes, arms, folders, plans and starts; each made once and kept in WORK.

What arms have in common is made under one lock (`PrivateBench.ready`). After that every arm has roots and ledgers of its own, so
that several processes can work in one WORK, and one that was ended leaves nothing that another one has to wait for.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from hippocampus_sites import NAME, prepare
from learned_training import SITES, Bench, Weights, claimed, predict_and_score
from private_shapes import write_dataset

from nnunet_fedharm.harmonizers.style import Style
from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.planning.preprocess import preprocess_site
from nnunet_fedharm.planning.section import Schedule, read_section, with_section
from nnunet_fedharm.privacy.ledger import Ledger
from nnunet_fedharm.privacy.options import PrivacyOptions
from nnunet_fedharm.sites.registry import SitesFile
from nnunet_fedharm.trainers.local_training import LocalTraining
from nnunet_fedharm.trainers.names import trainer_name_for
from nnunet_fedharm.trainers.results import initial_weights, write_results_folder

CONFIGURATION = "3d_fullres"
DELTA = 1e-3
REFERENCE_STEPS = 640


@dataclass(frozen=True)
class Recipe:
    """How a private training is set up.

    Attributes:
        start: "simulated", "public" (a model of A), or "" for random weights.
        kind: harmonizer in front.
        groups: of the segmenter that are trained; "" for all.
        steps: optimizer steps, the same at every site; with shared noise as many rounds.
        patients: expected in one step, over all sites together.
        patches: of a patient in a step.
        lr, clip, momentum: of the optimizer.
        judge_steps, judge_lr: of `polarity`'s judge in a federation, trained on A's private patients; 0 takes the start's, which
        is public. Centrally four times as many of A's patients are drawn in a step, so a quarter of the steps is as long.
    judge: which one.
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
    judge_steps: int = 0
    judge_lr: float = 2e-3
    judge: str = "network"

    @property
    def private(self) -> tuple[str, ...]:
        return SITES[1:] if self.start == "public" else SITES


RECIPES = {
    "simulated-all": Recipe("simulated", lr=0.6),
    "simulated-large-batch": Recipe("simulated", patients=64.0, lr=0.8),
    "simulated-long": Recipe("simulated", steps=96, patients=32.0, lr=0.3),
    "simulated-polarity": Recipe("simulated", "polarity", lr=0.6, judge_steps=32, judge="linear"),
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
    use: str = ""
    """Other than Dice; in front of the name, so that folders are apart."""

    @property
    def name(self) -> str:
        return f"{self.use}{self.recipe}_{self.mode}_eps{self.epsilon:g}_seed{self.seed}"


def schedule(steps: int, epochs: int, lr: float, momentum: float, **more: Any) -> Schedule:
    return Schedule(
        segmenter_epochs=epochs, iterations_per_epoch=steps // epochs, val_iterations_per_epoch=1, initial_lr=lr,
        momentum=momentum, augmentation=False, **more,
    )  # fmt: skip


class OnlyVolumes(Bench):
    """Sites with their own labels, in 3D alone and preprocessed in this process."""

    def own_root(self, site: str) -> NnunetRoot:
        root = NnunetRoot(self.work / "labels-all" / "sites" / site)
        with claimed(self.work / f"own_{site}.ready") as mine:
            if mine:
                description = self.description()
                preprocess_site(root, NAME, self.plans("3d"), CONFIGURATION, num_processes=1, dataset_json=description)
                SitesFile.load(root.raw / NAME / "sites.json").save(root.preprocessed / NAME / "sites.json")
        return root


class PrivateBench:
    """Folders, plans and starts.

    Args:
        data: raw Dataset910.
        work: everything that is written.
    """

    def __init__(self, data: Path, work: Path) -> None:
        self.bench = OnlyVolumes(data, work, processes=1)
        self.paired = Bench(data, work / "paired")
        self.work = work

    def ready(self, starts: Iterable[str]) -> None:
        """Make what arms share, or wait until another process has.

        Args:
            starts: of the recipes that will be run.
        """
        with locked(self.work / "making.held") as mine:
            assert mine
            for lock in (
                found for depth in ("*.lock", "*/ready.lock", "*/*/ready.lock") for found in self.work.glob(depth)
            ):
                lock.unlink()  # of a process that was ended: this one is alone in here
            prepare(self.bench.data, self.work)
            for site in SITES:
                self.bench.own_root(site)
                self._pair(site)
            for start in starts:
                self.start(start)
                self.pooled(SITES[1:] if start == "public" else SITES)
            self.pooled(SITES)

    def world(self, name: str, places: Mapping[str, NnunetRoot]) -> dict[str, NnunetRoot]:
        """Roots of one arm with the same preprocessed cases, in which nothing was released yet.

        Args:
            name: of the arm.
            places: where the cases are.
        """
        found = {}
        for place, source in places.items():
            root = NnunetRoot(self.work / "worlds" / name / place)
            shutil.rmtree(root.path, ignore_errors=True)
            (root.create().preprocessed / NAME).symlink_to(source.preprocessed / NAME)
            found[place] = root
        return found

    def forget(self, name: str) -> None:
        """Remove everything of an arm but its result."""
        for folder in [*(self.work / part / name for part in ("worlds", "models", "predictions"))]:
            shutil.rmtree(folder, ignore_errors=True)
        for folder in (self.work / "states").glob(f"{name}*"):
            shutil.rmtree(folder, ignore_errors=True)

    def plans(
        self,
        kind: str,
        planned: Schedule,
        privacy: PrivacyOptions | None,
        styles: Mapping[str, Style],
        judge: str = "network",
    ) -> Any:
        plans = self.bench.plans("3d")
        section = read_section(plans["configurations"][CONFIGURATION])
        changed = replace(
            section, kind=kind, harmonizer={"judge": judge} if kind == "polarity" else {}, reference="A", schedule=planned,
            privacy=privacy,
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
            model = self.write_model(NnunetRoot(self.work / "models" / name / site), plans, kind, weights, site)
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


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a file's lock, which the system takes back when the process ends; False where another one has it and `wait` is off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def link(source: str, target: str) -> None:
    if not Path(target).exists():
        os.link(source, target)


def spent(root: NnunetRoot) -> float:
    return Ledger(root.path / "fedharm").spent(DELTA).epsilon
