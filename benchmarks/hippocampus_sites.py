"""Four hospitals, federated and pooled, with and without labels everywhere: Dice and HD95 per site.

    python benchmarks/hippocampus_sites.py run    --data DATA --work WORK
    python benchmarks/hippocampus_sites.py report --work WORK > docs/benchmarks/hippocampus-sites.md

DATA is the nnU-Net raw dataset `Dataset910_HippocampusSites` with its `imagesTravelling`. Every arm is trained by the
commands a user would type (`nnunet-fedharm federate`; `nnunet-fedharm plan` and nnU-Net's own training), predicted by the stock
predictor, and scored on cases held out before any training. Subjects that travelled are held out at their own
site too. An arm whose metrics exist is not run again, so an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_fedharm.evaluation.segmentation import METRICS, LabelScore, score_cases
from nnunet_fedharm.federation.events import read_events
from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.sites.registry import SitesFile

NAME = "Dataset910_HippocampusSites"
CONFIGURATION = "3d_fullres"
KINDS = ("none", "nyul", "curve")
LABELS = ("all", "A")
MODES = ("pooled", "federated", "federated-often")
"""The last averages four times as often over a quarter of the local steps: the same number of optimizer steps."""
# What `nnUNetv2_train D C all -tr T -p P -device cpu` does, without its final prediction of every training case.
TRAIN = """
import sys, torch
from nnunetv2.run.run_training import get_trainer_from_args
dataset, configuration, trainer, plans = sys.argv[1:]
torch.set_num_threads(2)
get_trainer_from_args(dataset, configuration, "all", trainer, plans, device=torch.device("cpu")).run_training()
"""
# The stock predictor on stock results folders in one process, without mirroring: all arms alike.
PREDICT = """
import json, sys, time, torch
from pathlib import Path
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
torch.set_num_threads(2)
for model, images, output in json.loads(sys.argv[1]):
    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(model, ("all",))
    predictor.predict_from_files_sequential(images, output, save_probabilities=False)
"""


@dataclass(frozen=True)
class Size:
    """Length of a run; pooled and federated arms take the same number of optimizer steps."""

    rounds: int = 8
    local_epochs: int = 2
    iterations: int = 40
    harmonizer_rounds: int = 3
    base_features: int = 8
    max_features: int = 64
    batch_size: int = 2
    patch: tuple[int, ...] = (32, 40, 32)
    # nnU-Net's momentum of 0.99 is made for 250 000 steps; 0.9 at ten times the rate has the same effective step.
    initial_lr: float = 0.1
    momentum: float = 0.9

    def often(self) -> Size:
        """The same steps in four times as many rounds."""
        return replace(
            self,
            rounds=4 * self.rounds,
            harmonizer_rounds=4 * self.harmonizer_rounds,
            local_epochs=self.local_epochs // 2,
            iterations=self.iterations // 2,
        )

    @property
    def segmenter_epochs(self) -> int:
        return self.rounds * self.local_epochs

    @property
    def harmonizer_epochs(self) -> int:
        return self.harmonizer_rounds * self.local_epochs


@dataclass(frozen=True)
class Arm:
    mode: str
    labels: str
    kind: str

    @property
    def name(self) -> str:
        return f"{self.mode}_labels-{self.labels}_{self.kind}"


def run(command: Sequence[str | Path], log: Path, environment: Mapping[str, str] | None = None) -> float:
    """Run a command, keep what it prints, return its seconds; a failure stops the benchmark with the log's end."""
    print("$", *command, flush=True)
    start = time.perf_counter()
    with log.open("a") as stream:
        done = subprocess.run(
            [str(part) for part in command],
            env={**os.environ, "nnUNet_compile": "f", **(environment or {})},
            stdout=stream,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode:
        tail = "\n".join(log.read_text().splitlines()[-25:])
        raise SystemExit(f"{command[0]} failed with {done.returncode}; the end of {log}:\n{tail}")
    return time.perf_counter() - start


def environment_of(root: NnunetRoot, **more: str) -> dict[str, str]:
    folders = {"raw": root.raw, "preprocessed": root.preprocessed, "results": root.results}
    return {**{f"nnUNet_{name}": str(folder) for name, folder in folders.items()}, **more}


def prepare(data: Path, work: Path) -> None:
    """Hold out the travelling subjects, split into sites with and without labels, and gather the test images."""
    if (work / "ready").exists():
        return
    raw = work / "raw" / NAME
    shutil.copytree(data, raw, dirs_exist_ok=True)
    for folder in [raw, *raw.rglob("*")]:
        folder.chmod(folder.stat().st_mode | 0o200)
    registry = SitesFile.load(raw / "sites.json")
    travellers = sorted({path.name.split("_")[1] for path in (raw / "imagesTravelling").glob("*_0000.nii.gz")})
    test = work / "test"
    for site in registry.sites:
        for part in ("images", "labels"):
            (test / site / part).mkdir(parents=True, exist_ok=True)
    for path in (raw / "imagesTravelling").glob("*_0000.nii.gz"):
        site, number, _ = path.name.split("_")
        shutil.copy(path, test / site / "images" / f"travelling_{number}_0000.nii.gz")
        shutil.copy(
            raw / "labelsTravelling" / f"{site}_{number}.nii.gz", test / site / "labels" / f"travelling_{number}.nii.gz"
        )
    cases = dict(registry.cases)
    for number in travellers:
        shutil.move(
            raw / "imagesTr" / f"A_{number}_0000.nii.gz", test / "A" / "images" / f"travelling_{number}_0000.nii.gz"
        )
        shutil.move(raw / "labelsTr" / f"A_{number}.nii.gz", test / "A" / "labels" / f"travelling_{number}.nii.gz")
        del cases[f"A_{number}"]
    SitesFile(registry.sites, cases).save(raw / "sites.json")
    description = json.loads((raw / "dataset.json").read_text())
    description["numTraining"] = len(cases)
    (raw / "dataset.json").write_text(json.dumps(description))
    for labels in LABELS:
        more = ["--labelled-sites", "A"] if labels == "A" else []
        run(
            [
                "nnunet-fedharm",
                "sites",
                "split",
                "-d",
                raw,
                "-o",
                work / f"labels-{labels}",
                "--held-out-fraction",
                "0.2",
                *more,
            ],
            work / "split.log",
        )
        pool(work / f"labels-{labels}", registry)
    for site in registry.sites:
        source = work / "labels-all" / "sites" / site / "nnUNet_raw" / NAME
        for path in (source / "imagesTs").glob("*.nii.gz"):
            shutil.copy(path, test / site / "images" / path.name)
        for path in (source / "labelsTs").glob("*.nii.gz"):
            shutil.copy(path, test / site / "labels" / path.name)
    (work / "ready").touch()


def pool(consortium: Path, registry: SitesFile) -> None:
    """The same training cases in one nnU-Net root."""
    root = NnunetRoot(consortium / "pooled").create()
    target = root.raw / NAME
    cases: dict[str, str] = {}
    for site in registry.sites:
        source = consortium / "sites" / site / "nnUNet_raw" / NAME
        for part in ("imagesTr", "labelsTr", "imagesUnlabelled"):
            for path in (source / part).glob("*.nii.gz"):
                (target / part).mkdir(parents=True, exist_ok=True)
                os.link(path, target / part / path.name)
                if part != "labelsTr":
                    cases[path.name.removesuffix("_0000.nii.gz")] = site
    description = json.loads((source / "dataset.json").read_text())
    description["numTraining"] = len(list((target / "labelsTr").glob("*.nii.gz")))
    (target / "dataset.json").write_text(json.dumps(description))
    SitesFile(registry.sites, cases).save(target / "sites.json")


def train(arm: Arm, work: Path, size: Size, parallel_sites: int) -> dict[str, Any]:
    """Train one arm; returns the results folder of each site and the seconds taken."""
    size = size.often() if arm.mode == "federated-often" else size
    consortium, log = work / f"labels-{arm.labels}", work / "logs" / f"{arm.name}.log"
    log.parent.mkdir(exist_ok=True)
    shared = [
        "--harmonizer", arm.kind, "--reference", "A" if arm.labels == "A" else "consensus",
        "--base-features", size.base_features, "--max-features", size.max_features, "--batch-size", size.batch_size,
        "--iterations-per-epoch", size.iterations, "--initial-lr", size.initial_lr, "--momentum", size.momentum,
    ]  # fmt: skip
    results = f"nnUNetTrainerFedHarm{arm.kind.capitalize()}__plans_{arm.kind}__{CONFIGURATION}"
    harmonizer_rounds = size.harmonizer_rounds if arm.kind == "curve" else 0
    if arm.mode == "pooled":
        root = NnunetRoot(consortium / "pooled")
        epochs = [
            "--segmenter-epochs",
            size.segmenter_epochs,
            "--harmonizer-epochs",
            harmonizer_rounds * size.local_epochs,
        ]
        options = [
            *shared,
            *epochs,
            "--patch-size",
            *size.patch,
            "--val-iterations-per-epoch",
            "2",
            "-p",
            f"plans_{arm.kind}",
            "-np",
            "2",
            "--skip-check",
        ]
        seconds = run(
            strings("nnunet-fedharm", "plan", "-d", "910", "-c", CONFIGURATION, *options), log, environment_of(root)
        )
        command = [sys.executable, "-c", TRAIN, "910", CONFIGURATION, results.split("__")[0], f"plans_{arm.kind}"]
        seconds += run(command, log, environment_of(root, nnUNet_n_proc_DA="0"))
        return {"seconds": seconds, "folders": {site: str(root.results / NAME / results) for site in "ABCD"}}
    options = [
        *shared,
        "--patch-size",
        "x".join(map(str, size.patch)),
        "--harmonizer-rounds",
        harmonizer_rounds,
        "--segmenter-rounds",
        size.rounds,
    ]
    options += [
        "--local-epochs",
        size.local_epochs,
        "--val-iterations",
        "2",
        "--fold",
        "all",
        "--plans-name",
        f"plans_{arm.kind}",
    ]
    options += ["--weighting", "cases", "--parallel-sites", parallel_sites, "--restart"]
    server = consortium / arm.mode / arm.kind
    seconds = run(
        strings(
            "nnunet-fedharm",
            "federate",
            "--root",
            consortium,
            "--server-root",
            server,
            "-d",
            "910",
            "-c",
            CONFIGURATION,
            *options,
        ),
        log,
    )
    folders = {site: str(consortium / "sites" / site / "nnUNet_results" / NAME / results) for site in "ABCD"}
    return {"seconds": seconds, "folders": folders, "events": str(server / "fedharm" / "events.jsonl")}


def strings(*parts: Any) -> list[str]:
    return [str(part) for part in parts]


def evaluate(arm: Arm, work: Path, trained: Mapping[str, Any]) -> dict[str, Any]:
    """Predict each site's test images with its own results folder by the stock predictor, and score them."""
    jobs = []
    for site, folder in trained["folders"].items():
        output = work / "predictions" / arm.name / site
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
        jobs.append([str(folder), str(work / "test" / site / "images"), str(output)])
    run([sys.executable, "-c", PREDICT, json.dumps(jobs)], work / "logs" / f"{arm.name}.log")
    sites: dict[str, Any] = {}
    for site, (folder, _, output) in zip(trained["folders"], jobs, strict=True):
        description = json.loads((Path(folder) / "dataset.json").read_text())
        scores = score_cases(
            Path(output), work / "test" / site / "labels", description, num_processes=2, progress=False
        )
        sites[site] = {"cases": {case: mean_over_labels(found) for case, found in scores.items()}}
    return sites


def mean_over_labels(scores: Mapping[str, LabelScore]) -> dict[str, float]:
    """Mean Dice and mean HD95 of one case."""
    return {name: float(np.mean([getattr(score, name) for score in scores.values()])) for name in METRICS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "report"))
    parser.add_argument("--data", type=Path, help=f"folder of {NAME}")
    parser.add_argument("--work", type=Path, required=True, help="folder for everything that is written")
    parser.add_argument("--arms", nargs="*", default=[], help="names of arms; default all")
    parser.add_argument("--parallel-sites", type=int, default=2)
    for field in fields(Size):
        kind, several = (int, "+") if field.name == "patch" else (type(field.default), None)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, nargs=several, default=field.default)
    arguments = parser.parse_args()
    size = Size(**{field.name: getattr(arguments, field.name) for field in fields(Size)})
    # With labels at one site nothing is averaged in the segmenter phase, so how often does not matter.
    several = [Arm("federated-often", "all", kind) for kind in KINDS]
    arms = [Arm(mode, labels, kind) for labels in LABELS for mode in MODES[:2] for kind in KINDS] + several
    if arguments.action == "report":
        from hippocampus_report import report

        report(arguments.work, [arm.name for arm in arms])
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    arguments.work = arguments.work.resolve()
    prepare(arguments.data, arguments.work)
    for arm in arms:
        target = arguments.work / "metrics" / f"{arm.name}.json"
        if target.exists() or (arguments.arms and arm.name not in arguments.arms):
            continue
        record = arguments.work / "trained" / f"{arm.name}.json"
        if not record.exists():
            record.parent.mkdir(exist_ok=True)
            record.write_text(json.dumps(train(arm, arguments.work, size, arguments.parallel_sites)))
        trained = json.loads(record.read_text())
        entry = {
            "arm": vars(arm),
            "size": vars(size),
            "trained": trained,
            "sites": evaluate(arm, arguments.work, trained),
        }
        entry["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
        if "events" in trained:
            entry["events"] = read_events(Path(trained["events"]))[0]
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(entry, indent=1))
        print(
            arm.name,
            {
                site: round(sum(c["dice"] for c in s["cases"].values()) / len(s["cases"]), 4)
                for site, s in entry["sites"].items()
            },
            flush=True,
        )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
