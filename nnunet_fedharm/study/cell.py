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
from nnunet_fedharm.study.cell_files import COST_FILE, ENVIRONMENT_FILE, METRICS_FILE, cell_folder
from nnunet_fedharm.study.data import StudyData
from nnunet_fedharm.study.energy import Energy, measured
from nnunet_fedharm.study.matrix import Cell
from nnunet_fedharm.study.new_site import ADAPTED, adapt_seconds, adapt_to_held_out, adapted_sites
from nnunet_fedharm.study.quality import keeps_harmonized, measure_quality, predict
from nnunet_fedharm.study.settings import check_settings, settings_of
from nnunet_fedharm.study.study_file import STUDY_FILE, StudyFile
from nnunet_fedharm.study.trained import TRAINED_FILE, Trained, read_trained, write_trained
from nnunet_fedharm.study.training import train

CLOCK_FILE = "clock.json"
TOOLS = ("versions", "git", "python", "machine", "device")
"""Keys of environment.json that tell with what a cell was computed."""
PACKAGES = ("nnunet_fedharm", "nnunetv2", "torch", "flwr", "opacus", "diffusers", "numpy")


def run_cell(study: StudyFile, cell: Cell, *, device: str, show: Callable[[str], None]) -> Path:
    """Train, adapt to held-out sites, predict every test case, harmonize (first seed), score.

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
    check_settings(study, cell)
    write_json(_environment(study, cell, device), folder / ENVIRONMENT_FILE)
    if not (folder / STUDY_FILE).is_file():  # as the cell was begun
        shutil.copyfile(study.folder / STUDY_FILE, folder / STUDY_FILE)
    show("train")
    trained, spent = _trained(data, cell, folder, device)
    if adapted_sites(study, cell.arm):
        show("adapt")
        trained = adapt_to_held_out(data, cell, folder, trained, device=device)
    show("predict")
    per_volume = _predict(data, trained, folder, device)
    if keeps_harmonized(study, cell):
        show("harmonize")
        _harmonize(data, trained, folder, device)
        measure_quality(data, cell, device=device)
    show("score")
    metrics = _score(data, trained, folder, cell.seed)
    cost = {
        **spent,
        "shared_s": trained.shared_s,
        "adapt_s": adapt_seconds(study, cell.arm, folder),
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
    if not (folder / TRAINED_FILE).is_file():
        shutil.rmtree(folder / ADAPTED, ignore_errors=True)  # of a former model
        trained = _train_on_the_clock(data, cell, folder, device)
        write_trained(folder, trained, read_json(folder / CLOCK_FILE, what="The cell's clock"))
    return read_trained(folder)


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
    """Each site's test cases with its own model and style; seconds per volume."""
    seconds, count = 0.0, 0
    for site, model in _tested(data, trained).items():
        images, output = data.test(site) / "images", folder / "predictions" / site
        seconds += predict(data, model, trained.styles[site], images, output, device=device)
        count += len(list((data.test(site) / "labels").iterdir()))
    return seconds / max(1, count)


def _tested(data: StudyData, trained: Trained) -> dict[str, str]:
    """Site -> model, of the sites that have a labelled case to test on: a hospital may take part with images alone."""
    return {site: model for site, model in trained.models.items() if any((data.test(site) / "labels").iterdir())}


def _harmonize(data: StudyData, trained: Trained, folder: Path, device: str) -> None:
    """Every site's test cases as its model harmonizes them."""
    from nnunet_fedharm.evaluation.harmonize_folder import harmonize_folder

    for site, model in _tested(data, trained).items():
        style = trained.styles[site]
        harmonize_folder(
            Path(model),
            data.test(site) / "images",
            folder / "harmonized" / site,
            site=None if style == "stored" else style,
            device=device,
            progress=False,
        )


def _score(data: StudyData, trained: Trained, folder: Path, seed: int) -> dict[str, Any]:
    description = read_dataset_json(data.study.raw_dataset, site="study")
    scores: dict[str, Any] = {}
    site_of: dict[str, str] = {}
    for site in _tested(data, trained):
        found = score_cases(folder / "predictions" / site, data.test(site) / "labels", description, progress=False)
        scores |= dict(found)
        site_of |= dict.fromkeys(found, site)
    return metrics_of(scores, site_of, Targets.from_dataset_json(description), seed=seed)


def _environment(study: StudyFile, cell: Cell, device: str) -> Mapping[str, Any]:
    """What a reader needs to repeat the cell; [report] and the settings as they stood when the cell was first begun.

    Versions, commit and machine are those of the training. Where it went on, or was predicted and scored, in another
    environment, that one is in `earlier` or `scored`.
    """
    folder = cell_folder(study, cell)
    file = folder / ENVIRONMENT_FILE
    before = read_json(file, what="The environment of a cell") if file.is_file() else {}
    former, now = {name: before[name] for name in TOOLS if name in before}, _tools(device)
    known: dict[str, Any] = {
        "cell": cell.name,
        "arm": asdict(cell.arm),
        "seed": cell.seed,
        "report": before.get("report", asdict(study.report)),
        "settings": before.get("settings", settings_of(study, cell.arm)),
        "started": before.get("started", datetime.now(UTC).isoformat(timespec="seconds")),
    }
    earlier = list(before.get("earlier", []))
    if former and (folder / TRAINED_FILE).is_file():
        return {**known, **former, "earlier": earlier, **({"scored": now} if now != former else {})}
    return {**known, **now, "earlier": [*earlier, former] if former and now != former else earlier}


def _tools(device: str) -> dict[str, Any]:
    """What this process computes with."""
    return {
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
