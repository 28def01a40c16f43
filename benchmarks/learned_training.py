"""The parts of `learned_harmonizers.py`: data, plans, harmonizers, segmenters, predictions; each made once and kept in WORK.

A harmonizer does not see a label and a segmenter's start does not depend on the harmonizer, so both are trained apart and put
together. With labels at the reference alone the segmenter is the same one for every harmonizer, bit by bit, as the reference's
gate is shut (tests/trainers hold that); with labels elsewhere every harmonizer gets a segmenter of its own.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from hippocampus_sites import NAME, mean_over_labels, pool, prepare

from nnunet_fedharm import trainers
from nnunet_fedharm.evaluation.segmentation import score_cases
from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.planning.central import CentralOptions, plan_central
from nnunet_fedharm.planning.planner import PlanOptions
from nnunet_fedharm.planning.preprocess import preprocess_site
from nnunet_fedharm.planning.section import Schedule, read_section, with_section
from nnunet_fedharm.sites.registry import SitesFile
from nnunet_fedharm.trainers.local_training import LocalTraining
from nnunet_fedharm.trainers.names import trainer_name_for
from nnunet_fedharm.trainers.results import initial_weights, write_results_folder

Weights = dict[str, npt.NDArray[Any]]
SITES = ("A", "B", "C", "D")
LABELLED = {"A": "A", **{f"not-{site}": " ".join(other for other in SITES if other != site) for site in SITES}}
"""Scenario -> sites with labels: A alone, or all but one."""


@dataclass(frozen=True)
class Size:
    """Lengths and sizes of one configuration; 16 epochs of 40 steps, learning rate 0.1, momentum 0.9 for every segmenter."""

    configuration: str
    patch: tuple[int, ...]
    batch: int
    epochs: int = 16
    steps: int = 40

    def schedule(self, harmonizer_epochs: int) -> Schedule:
        return Schedule(
            harmonizer_epochs=harmonizer_epochs,
            segmenter_epochs=self.epochs,
            iterations_per_epoch=self.steps,
            val_iterations_per_epoch=2,
            initial_lr=0.1,
            momentum=0.9,
            harmonizer_lr=2e-3,
        )


SIZES = {"3d": Size("3d_fullres", (32, 40, 32), 2), "2d": Size("2d", (40, 32), 16)}
PLANNED = tuple(SIZES)
SIZES |= {f"{dims}-long": replace(SIZES[dims], epochs=80) for dims in PLANNED}
"""The long ones train the segmenter five times as long, on the same plans."""
HARMONIZER_EPOCHS = {"none": 0, "augment": 0, "nyul": 0, "curve": 6, "polarity": 10, "cyclegan": 10, "diffusion": 10}
"""Epochs of `Size.steps` steps."""
SIZES_OF = {"diffusion": {"width": 16, "depth": 3}, "cyclegan": {"width": 16, "dilations": [1, 2, 4]}}
"""The package's own defaults; a federation would choose by the limits of cost."""


@dataclass(frozen=True)
class Harmonizer:
    """A trained (or untrained) harmonizer.

    Attributes:
        kind: of the package; "inverse" is the diffusion harmonizer's start alone: polarity and quantile map, no network.
        mode: central, federated, or "" where nothing is trained.
        reference: site that is mapped to.
    """

    kind: str
    dims: str = "3d"
    mode: str = ""
    seed: int = 0
    reference: str = "A"

    @property
    def built(self) -> str:
        return "diffusion" if self.kind == "inverse" else self.kind

    @property
    def name(self) -> str:
        return "_".join(filter(None, [self.kind, self.dims, self.mode, f"seed{self.seed}", f"to{self.reference}"]))


@dataclass(eq=False)
class Bench:
    """Folders and plans of one benchmark.

    Attributes:
        data: raw dataset with travelling subjects.
        work: everything that is written.
        processes: for planning and preprocessing.
    """

    data: Path
    work: Path
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    processes: int = 2

    def root(self, scenario: str) -> NnunetRoot:
        """Images of all sites in one nnU-Net root, with the scenario's labels, preprocessed for both configurations."""
        prepare(self.data, self.work)
        consortium = self.work / f"labels-{scenario}"
        root = NnunetRoot(consortium / "pooled")
        with claimed(consortium / "pooled.ready") as mine:
            if mine:
                if not (root.raw / NAME).exists():
                    registry = SitesFile.load(self.work / "raw" / NAME / "sites.json")
                    split(self.work, consortium, LABELLED[scenario].split())
                    pool(consortium, registry)
                for dims in PLANNED:
                    self._preprocess(root, dims)
        return root

    def own_root(self, site: str) -> NnunetRoot:
        """One site with its own labels: where the oracle trains."""
        root = NnunetRoot(self.work / "labels-all" / "sites" / site)
        with claimed(self.work / f"own_{site}.ready") as mine:
            if mine:
                for dims in PLANNED:
                    self._preprocess(root, dims)
                SitesFile.load(root.raw / NAME / "sites.json").save(root.preprocessed / NAME / "sites.json")
        return root

    @cache  # noqa: B019 - lives as long as the process
    def plans(self, dims: str) -> dict[str, Any]:
        """Plans and style bank, made from A's labelled cases and all images."""
        size, path = SIZES[dims], self.work / f"plans_{dims}.json"
        with claimed(path.with_suffix(".ready")) as mine:
            if mine:
                root = NnunetRoot(self.work / "labels-A" / "pooled")
                options = CentralOptions(
                    configurations=(size.configuration,),
                    kind="nyul",
                    reference="A",
                    schedule=size.schedule(0),
                    plan=PlanOptions(
                        base_features=8,
                        max_features=64,
                        batch_size=size.batch,
                        patch_size=size.patch,
                        plans_name=f"plans_{dims}",
                    ),
                    num_processes=self.processes,
                    check=False,
                )
                path.write_text(json.dumps(plan_central(root, "910", options)))
        content: dict[str, Any] = json.loads(path.read_text())
        return content

    def plans_for(self, harmonizer: Harmonizer) -> dict[str, Any]:
        size, plans = SIZES[harmonizer.dims], self.plans(harmonizer.dims.removesuffix("-long"))
        section = replace(
            read_section(plans["configurations"][size.configuration]),
            kind=harmonizer.built,
            harmonizer=self.options.get(harmonizer.built, {}),
            reference=harmonizer.reference,
            schedule=size.schedule(HARMONIZER_EPOCHS[harmonizer.built]),
        )
        return with_section(plans, section, (size.configuration,))

    def description(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.work / "raw" / NAME / "dataset.json").read_text())
        return content

    def training(
        self, harmonizer: Harmonizer, root: NnunetRoot, state: Path, trainer: str | None = None
    ) -> LocalTraining:
        return LocalTraining(
            root=root,
            dataset_name=NAME,
            plans=self.plans_for(harmonizer),
            dataset_json=self.description(),
            configuration=SIZES[harmonizer.dims].configuration,
            fold="all",
            site="pooled",
            trainer_name=trainer or trainer_name_for(harmonizer.built),
            state_folder=state,
            seed=harmonizer.seed,
            device="cpu",
        )

    def start(self, harmonizer: Harmonizer) -> Weights:
        size = SIZES[harmonizer.dims]
        return initial_weights(
            self.plans_for(harmonizer),
            self.description(),
            size.configuration,
            trainer_name_for(harmonizer.built),
            harmonizer.seed,
        )

    def _preprocess(self, root: NnunetRoot, dims: str) -> None:
        plans = self.plans(dims)
        preprocess_site(
            root, NAME, plans, SIZES[dims].configuration, num_processes=self.processes, dataset_json=self.description()
        )


def split(work: Path, consortium: Path, labelled: list[str]) -> None:
    """`nnunet-fedharm sites split` with labels at some sites; the held-out cases are those of every other scenario."""
    raw = str(work / "raw" / NAME)
    command = ["nnunet-fedharm", "sites", "split", "-d", raw, "-o", str(consortium), "--held-out-fraction", "0.2"]
    subprocess.run([*command, "--labelled-sites", *labelled], check=True, stdout=subprocess.DEVNULL)


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """True for the first process that wants `path`; the others wait until it exists, and get False."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(path.name + ".lock")
    if path.exists():
        yield False
        return
    try:
        lock.open("x").close()
    except FileExistsError:
        while not path.exists():
            time.sleep(2)
        yield False
        return
    try:
        yield True
        if not path.exists():
            path.touch()
    finally:
        lock.unlink()


def once(path: Path, make: Callable[[], Mapping[str, npt.NDArray[Any]]]) -> Weights:
    """Weights kept in a file; made by whoever asks first."""
    with claimed(path) as mine:
        if mine:
            temporary = path.with_suffix(".writing.npz")
            np.savez(temporary, **make())
            temporary.replace(path)
    with np.load(path) as stored:
        return {name: stored[name] for name in stored.files}


def harmonizer_weights(bench: Bench, harmonizer: Harmonizer) -> Weights:
    """Tensors of a trained harmonizer, `harmonizer.*`, gate open."""
    path = bench.work / "harmonizers" / f"{harmonizer.name}.npz"
    if harmonizer.kind == "inverse":
        trained = harmonizer_weights(bench, replace(harmonizer, kind="diffusion"))
        start = bench.start(harmonizer)
        network = ("harmonizer.network.", "harmonizer.style_code.")
        return {name: start[name] if name.startswith(network) else value for name, value in trained.items()}
    return once(path, lambda: _train_harmonizer(bench, harmonizer))


def _train_harmonizer(bench: Bench, harmonizer: Harmonizer) -> Weights:
    epochs = HARMONIZER_EPOCHS[harmonizer.built]
    if not epochs:
        weights = bench.start(harmonizer)
    elif harmonizer.mode == "federated":
        weights = federated_weights(bench, harmonizer)
    else:
        root, state = bench.root("A"), bench.work / "states" / harmonizer.name
        began = time.process_time()
        result = bench.training(harmonizer, root, state).run(
            phase="harmonizer", round_index=0, first_epoch=0, epochs=epochs, weights=bench.start(harmonizer)
        )
        weights = result.weights
        note(bench, f"harmonizer {harmonizer.name}", {"cpu_s": time.process_time() - began, **result.metrics})
    weights["harmonizer.gate"] = np.ones_like(weights["harmonizer.gate"])
    return {name: value for name, value in weights.items() if name.startswith("harmonizer.")}


def federated_weights(bench: Bench, harmonizer: Harmonizer, scenario: str = "A", segmenter_rounds: int = 1) -> Weights:
    """`nnunet-fedharm federate` over the four sites; all tensors of its last checkpoint.

    Args:
        scenario: who has labels.
        segmenter_rounds: of half an epoch at each labelled site; 1 where the harmonizer alone is wanted.
    """
    size, consortium = SIZES[harmonizer.dims], bench.work / f"labels-{scenario}"
    name = harmonizer.name if segmenter_rounds == 1 else f"{scenario}_{harmonizer.name}"
    server = bench.work / "servers" / name
    bench.root(scenario)
    patch = "x".join(map(str, size.patch))
    command = ["nnunet-fedharm", "federate", "--root", consortium, "--server-root", server, "-d", "910"]
    command += ["-c", size.configuration, "--harmonizer", harmonizer.built, "--reference", harmonizer.reference]
    command += ["--harmonizer-rounds", 2 * HARMONIZER_EPOCHS[harmonizer.built], "--segmenter-rounds", segmenter_rounds]
    command += [
        "--local-epochs",
        1,
        "--iterations-per-epoch",
        size.steps // 2,
        "--val-iterations",
        1,
        "--seed",
        harmonizer.seed,
    ]
    command += ["--base-features", 8, "--max-features", 64, "--batch-size", size.batch, "--patch-size", patch]
    command += ["--harmonizer-lr", 2e-3, "--initial-lr", 0.1, "--momentum", 0.9, "--fold", "all"]
    command += ["--plans-name", f"fed_{name}", "--parallel-sites", 1, "--weighting", "sites"]
    sizes = {**SIZES_OF.get(harmonizer.built, {}), **bench.options.get(harmonizer.built, {})}
    command += ["--harmonizer-options", json.dumps(sizes)]  # as centralized, not by the rules
    log = bench.work / "logs" / f"{name}.log"
    log.parent.mkdir(exist_ok=True)
    began = time.monotonic()
    with log.open("w") as stream:
        subprocess.run([str(part) for part in command], check=True, stdout=stream, stderr=subprocess.STDOUT)
    what = f"harmonizer {name}" if segmenter_rounds == 1 else f"both {name}"
    note(bench, what, {"wall_s": time.monotonic() - began, "log": str(log)})
    (checkpoint,) = NnunetRoot(server).results.rglob("checkpoint_final.pth")
    state = torch.load(checkpoint, map_location="cpu", weights_only=False)["network_weights"]
    return {name: state[name].numpy() for name in bench.start(harmonizer)}


def trained_weights(bench: Bench, harmonizer: Harmonizer, scenario: str, *, augmentation: bool = True) -> Weights:
    """Tensors of harmonizer and segmenter, gate open.

    Both come from one federated run where the harmonizer is federated and labels are at several sites.
    """
    if harmonizer.mode == "federated" and scenario.startswith("not-"):
        rounds = 2 * SIZES[harmonizer.dims].epochs
        path = bench.work / "segmenters" / f"{scenario}_{harmonizer.name}.npz"
        weights = once(path, lambda: federated_weights(bench, harmonizer, scenario, rounds))
        return {**weights, "harmonizer.gate": np.ones_like(weights["harmonizer.gate"])}
    segmenter = segmenter_weights(bench, harmonizer, scenario, augmentation=augmentation)
    return {**harmonizer_weights(bench, harmonizer), **segmenter}


def segmenter_weights(bench: Bench, harmonizer: Harmonizer, scenario: str, *, augmentation: bool = True) -> Weights:
    """Tensors of a segmenter, `segmenter.*`, trained behind a frozen harmonizer.

    Args:
        scenario: of LABELLED, or "own-SITE": that site's labelled cases alone.
        augmentation: nnU-Net's own.
    """
    if scenario == f"{harmonizer.reference}" and harmonizer.kind not in ("none", "augment"):
        # The reference's gate is shut: the same images, the same draws, the same weights.
        plain = Harmonizer("none", harmonizer.dims, "", harmonizer.seed)
        return segmenter_weights(bench, plain, scenario, augmentation=augmentation)
    plain = "" if augmentation else "_no-augmentation"
    path = bench.work / "segmenters" / f"{scenario}_{harmonizer.name}{plain}.npz"

    def make() -> Weights:
        root = bench.own_root(scenario[-1]) if scenario.startswith("own-") else bench.root(scenario)
        weights = {**bench.start(harmonizer), **harmonizer_weights(bench, harmonizer)}
        training = bench.training(
            harmonizer, root, bench.work / "states" / path.stem, None if augmentation else without_augmentation()
        )
        began = time.process_time()
        epochs = SIZES[harmonizer.dims].epochs
        result = training.run(phase="segmenter", round_index=0, first_epoch=0, epochs=epochs, weights=weights)
        note(bench, f"segmenter {path.stem}", {"cpu_s": time.process_time() - began, **result.metrics})
        return {name: value for name, value in result.weights.items() if name.startswith("segmenter.")}

    return once(path, make)


def without_augmentation() -> str:
    """Name of a trainer whose training patches are cut and nothing else."""

    base = trainers.nnUNetTrainerFedHarmNone

    class nnUNetTrainerFedHarmNoneWithoutAugmentation(base):  # type: ignore[misc, valid-type]  # noqa: N801
        """As nnU-Net's `nnUNetTrainerNoDA`."""

        @staticmethod
        def get_training_transforms(*args: Any, **more: Any) -> Any:
            scales = more.get("deep_supervision_scales", args[2] if len(args) > 2 else None)
            names = ("is_cascaded", "foreground_labels", "regions", "ignore_label")
            return base.get_validation_transforms(scales, **{name: more[name] for name in names if name in more})

        def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> Any:
            rotation, dummy, _, _ = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
            self.inference_allowed_mirroring_axes = None
            return rotation, dummy, self.configuration_manager.patch_size, None

    trainers.nnUNetTrainerFedHarmNoneWithoutAugmentation = nnUNetTrainerFedHarmNoneWithoutAugmentation  # type: ignore[attr-defined]
    return "nnUNetTrainerFedHarmNoneWithoutAugmentation"


def model_folder(bench: Bench, harmonizer: Harmonizer, weights: Weights, folder: Path, site: str) -> Path:
    """A standard results folder that serves one site; returns TRAINER__PLANS__CONFIGURATION."""
    fold = write_results_folder(
        NnunetRoot(folder),
        NAME,
        bench.plans_for(harmonizer),
        bench.description(),
        {},
        SIZES[harmonizer.dims].configuration,
        "all",
        trainer_name_for(harmonizer.built),
        weights,
        epoch=SIZES[harmonizer.dims].epochs - 1,
        which=("final",),
        site=site,
    )
    return fold.parent


def predict_and_score(bench: Bench, model: Path, site: str, output: Path) -> tuple[dict[str, Any], float]:
    """Scores of the stock predictor on a site's test images (case -> Dice and HD95 in mm), and CPU seconds per volume."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    images, labels = bench.work / "test" / site / "images", bench.work / "test" / site / "labels"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), ("all",))
    began = time.process_time()
    predictor.predict_from_files_sequential(str(images), str(output), save_probabilities=False)
    seconds = (time.process_time() - began) / len(list(labels.glob("*.nii.gz")))
    scores = score_cases(output, labels, bench.description(), num_processes=1, progress=False)
    return {case: mean_over_labels(found) for case, found in scores.items()}, seconds


def note(bench: Bench, what: str, values: Mapping[str, Any]) -> None:
    """One line of what was trained and how long it took."""
    with (bench.work / "trained.jsonl").open("a") as stream:
        stream.write(json.dumps({"what": what, **values}) + "\n")
    print(
        what, {key: round(value, 3) if isinstance(value, float) else value for key, value in values.items()}, flush=True
    )
    sys.stdout.flush()
