"""One cell of a study from the beginning to its metrics; every step that is done is not done again."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nnunet_fedharm.evaluation.labels import Targets
from nnunet_fedharm.evaluation.segmentation import metrics_of, score_cases, write_metrics
from nnunet_fedharm.sites.files import read_dataset_json, read_json, write_json
from nnunet_fedharm.study.data import TRAVELLING, StudyData
from nnunet_fedharm.study.energy import Energy, measured
from nnunet_fedharm.study.matrix import Cell
from nnunet_fedharm.study.results import COST_FILE, ENVIRONMENT_FILE, METRICS_FILE, QUALITY_FILE, cell_folder
from nnunet_fedharm.study.study_file import BASELINES, CONTROL, StudyFile
from nnunet_fedharm.study.training import Trained, link, train

TRAINED_FILE, CLOCK_FILE = "trained.json", "clock.json"
PACKAGES = ("nnunet_fedharm", "nnunetv2", "torch", "flwr", "opacus", "diffusers", "numpy")
PERMUTATIONS = 100
"""Of the site classifier's null in a cell's quality report."""


def run_cell(study: StudyFile, cell: Cell, *, device: str, show: Callable[[str], None]) -> Path:
    """Train, predict every test case, harmonize (first seed), score.

    Args:
        show: receives one line per step.

    Returns:
        The cell's folder.

    Raises:
        FedHarmError: a step failed; its sentence.
    """
    data, folder = StudyData(study), cell_folder(study, cell)
    folder.mkdir(parents=True, exist_ok=True)
    show("data")
    data.prepare()
    write_json(_environment(study, cell, device), folder / ENVIRONMENT_FILE)
    show("train")
    trained, spent = _trained(data, cell, folder, device)
    show("predict")
    per_volume = _predict(data, trained, folder, device)
    harmonizes = cell.arm.harmonizer not in (CONTROL, *BASELINES[:2])
    if harmonizes and cell.seed == study.subject.seeds[0]:
        show("harmonize")
        _harmonize(data, trained, folder, device)
        _measure_quality(data, folder)
    show("score")
    metrics = _score(data, trained, folder, cell.seed)
    cost = {
        **spent,
        "predict_s": per_volume,
        "bytes_up": trained.bytes_up,
        "bytes_down": trained.bytes_down,
        "epsilon": trained.epsilon,
        "delta": None if cell.arm.epsilon is None else study.private(cell.arm.epsilon).delta,
        "without_noise": list(trained.without_noise),
        "device": device,
    }
    write_json(cost, folder / COST_FILE)
    write_metrics(metrics, folder / METRICS_FILE)  # last: a cell with metrics is finished
    return folder


def _trained(data: StudyData, cell: Cell, folder: Path, device: str) -> tuple[Trained, dict[str, Any]]:
    """The models, and the seconds and joules that they took; over several starts if it was stopped."""
    record = folder / TRAINED_FILE
    if not record.is_file():
        trained = _train_on_the_clock(data, cell, folder, device)
        write_json({**read_json(folder / CLOCK_FILE, what="The cell's clock"), **asdict(trained)}, record)
    content = read_json(record, what="The record of a trained cell")
    spent = {name: content.pop(name) for name in ("train_s", "energy_j", "counters")}
    return Trained(**{**content, "without_noise": tuple(content["without_noise"])}), spent


def _train_on_the_clock(data: StudyData, cell: Cell, folder: Path, device: str) -> Trained:
    clock = folder / CLOCK_FILE
    before = read_json(clock, what="The cell's clock") if clock.is_file() else {"train_s": 0.0, "energy_j": 0.0}
    began, energy = time.monotonic(), Energy()
    try:
        with measured() as energy:
            return train(data, cell, folder, device=device)
    finally:
        joules = None if None in (before["energy_j"], energy.joules) else before["energy_j"] + (energy.joules or 0.0)
        spent = {
            "train_s": before["train_s"] + time.monotonic() - began,
            "energy_j": joules,
            "counters": list(energy.counters),
        }
        write_json(spent, clock)


def _predict(data: StudyData, trained: Trained, folder: Path, device: str) -> float:
    """Stock prediction of each site's test cases with its own model and style; seconds per volume."""
    import torch

    from nnunet_fedharm.trainers.predictor import FedHarmPredictor

    seconds, count = 0.0, 0
    for site, model in trained.models.items():
        output = folder / "predictions" / site
        output.mkdir(parents=True, exist_ok=True)
        predictor = FedHarmPredictor(
            style=trained.styles[site],
            use_mirroring=data.study.training.mirroring,
            perform_everything_on_device=device == "cuda",
            device=torch.device(device),
            allow_tqdm=False,
        )
        fold = data.study.subject.fold
        predictor.initialize_from_trained_model_folder(model, (fold if fold == "all" else int(fold),))
        began = time.monotonic()
        predictor.predict_from_files_sequential(
            str(data.test(site) / "images"), str(output), save_probabilities=False, overwrite=True
        )
        seconds += time.monotonic() - began
        count += len(list((data.test(site) / "labels").iterdir()))
    return seconds / max(1, count)


def _harmonize(data: StudyData, trained: Trained, folder: Path, device: str) -> None:
    """Every site's test cases as its model harmonizes them."""
    from nnunet_fedharm.evaluation.harmonize_folder import harmonize_folder

    for site, model in trained.models.items():
        style = trained.styles[site]
        harmonize_folder(
            Path(model),
            data.test(site) / "images",
            folder / "harmonized" / site,
            site=None if style == "stored" else style,
            device=device,
            progress=False,
        )


def _measure_quality(data: StudyData, folder: Path) -> None:
    """Harmonized travelling subjects against the truth, where the dataset has any."""
    from nnunet_fedharm.evaluation.quality import Folders
    from nnunet_fedharm.evaluation.quality_report import quality_report

    raw, reference = data.study.raw_dataset, data.study.subject.reference
    scans = sorted((raw / TRAVELLING[0]).glob("*_0000.nii.gz")) if (raw / TRAVELLING[0]).is_dir() else []
    if not scans:
        return
    work, pairs = folder / "travelling", {}
    for scan in scans:
        case = scan.name.removesuffix("_0000.nii.gz")
        site, subject = str(data.study.registry.site_of(case)), case.split("_", 1)[1]
        truth = f"{reference}_{subject}"
        pairs[case] = {"reference": truth, "site": site}
        for name, source in (
            (f"truth/{truth}_0000.nii.gz", data.test(reference) / "images" / f"{truth}_0000.nii.gz"),
            (f"labels/{truth}.nii.gz", data.test(reference) / "labels" / f"{truth}.nii.gz"),
            (f"scans/{scan.name}", scan),
            (f"harmonized/{scan.name}", folder / "harmonized" / site / scan.name),
        ):
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            link(source, work / name)
    write_json(pairs, work / "pairs.json")
    folders = Folders(
        reference=work / "truth", before=work / "scans", after=work / "harmonized", labels=work / "labels"
    )
    report = quality_report(folders, pairs_file=work / "pairs.json", permutations=PERMUTATIONS, progress=False)
    write_metrics(report, folder / QUALITY_FILE)
    shutil.rmtree(work)


def _score(data: StudyData, trained: Trained, folder: Path, seed: int) -> dict[str, Any]:
    description = read_dataset_json(data.study.raw_dataset, site="study")
    scores: dict[str, Any] = {}
    site_of: dict[str, str] = {}
    for site in trained.models:
        found = score_cases(folder / "predictions" / site, data.test(site) / "labels", description, progress=False)
        scores |= dict(found)
        site_of |= dict.fromkeys(found, site)
    return metrics_of(scores, site_of, Targets.from_dataset_json(description), seed=seed)


def _environment(study: StudyFile, cell: Cell, device: str) -> Mapping[str, Any]:
    """What a reader needs to repeat the cell; [report] as it stood when the cell was first begun."""
    file = cell_folder(study, cell) / ENVIRONMENT_FILE
    before = read_json(file, what="The environment of a cell") if file.is_file() else {}
    return {
        "cell": cell.name,
        "arm": asdict(cell.arm),
        "seed": cell.seed,
        "report": before.get("report", asdict(study.report)),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in PACKAGES},
        "git": _git_hash(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "device": device,
    }


def _git_hash() -> str | None:
    """Commit of the package, where it lies in a repository; with "+" where files are changed."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--exclude=*", "--abbrev=40"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except OSError:  # no git here: an installed package, whose version is stated
        return None
    return found.stdout.strip() or None
