"""Quality of the harmonizers on the travelling subjects, and pictures of them; part of `learned_harmonizers.py`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from learned_training import SITES, Bench, Harmonizer

from nnunet_fedharm.evaluation.fidelity import foreground_mask, zscore_inside
from nnunet_fedharm.evaluation.harmonize_folder import harmonize_folder
from nnunet_fedharm.evaluation.quality import Folders
from nnunet_fedharm.evaluation.quality_report import quality_report

SEEDS = (0, 1, 2)
SHOWN = (
    Harmonizer("nyul", "3d", "", 0),
    *(Harmonizer("curve", "3d", "central", seed) for seed in SEEDS),
    *(
        Harmonizer(kind, dims, mode, seed)
        for dims in ("3d", "2d")
        for kind in ("polarity", "cyclegan", "diffusion")
        for mode in ("central", "federated")
        for seed in SEEDS
    ),
)
"""Harmonizers that are measured; those without a model are left out. Nyul's has nothing that a seed could change."""


def travelling_folders(bench: Bench) -> tuple[Path, Path, Path, Path]:
    """Truths, scans, labels, and the file of pairs."""
    base = bench.work / "travelling"
    truth, scans, labels = base / "truth", base / "scans", base / "labels"
    pairs: dict[str, dict[str, str]] = {}
    for folder in (truth, scans, labels):
        folder.mkdir(parents=True, exist_ok=True)
    for path in sorted((bench.work / "test" / "A" / "images").glob("travelling_*_0000.nii.gz")):
        number = path.name.split("_")[1]
        shutil.copy(path, truth / f"A_{number}_0000.nii.gz")
        shutil.copy(bench.work / "test" / "A" / "labels" / f"travelling_{number}.nii.gz", labels / f"A_{number}.nii.gz")
        for site in SITES[1:]:
            shutil.copy(bench.work / "test" / site / "images" / path.name, scans / f"{site}_{number}_0000.nii.gz")
            pairs[f"{site}_{number}"] = {"reference": f"A_{number}", "site": site}
    (base / "pairs.json").write_text(json.dumps(pairs))
    return truth, scans, labels, base / "pairs.json"


def harmonized(bench: Bench, harmonizer: Harmonizer, scans: Path) -> Path | None:
    """Travelling subjects as the harmonizer maps them, each site by its own model; None without a model."""
    entry = bench.work / "metrics" / f"A_{harmonizer.name}.json"
    if not entry.exists():
        return None
    output = bench.work / "travelling" / harmonizer.name
    models = {site: Path(found["model"]) for site, found in json.loads(entry.read_text())["sites"].items()}
    for site in SITES[1:]:
        own = bench.work / "travelling" / "by-site" / site
        own.mkdir(parents=True, exist_ok=True)
        for path in scans.glob(f"{site}_*"):
            shutil.copy(path, own / path.name)
        output.mkdir(parents=True, exist_ok=True)
        harmonize_folder(models[site], own, output, progress=False)
    return output


def measure_quality(bench: Bench) -> None:
    """Write `quality/<harmonizer>.json` for every harmonizer of SHOWN that has a model and no file yet."""
    truth, scans, labels, pairs = travelling_folders(bench)
    for harmonizer in SHOWN:
        path = bench.work / "quality" / f"{harmonizer.name}.json"
        output = None if path.exists() else harmonized(bench, harmonizer, scans)
        if output is None:
            continue
        folders = Folders(reference=truth, before=scans, after=output, labels=labels)
        report = quality_report(folders, pairs_file=pairs, permutations=100, trees=50, progress=False)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(report))
        print(harmonizer.name, "measured", flush=True)
    draw(bench, truth, scans)


def draw(bench: Bench, truth: Path, scans: Path) -> None:
    """Input, harmonized, truth and difference of one subject: a block of rows per harmonizer, `pictures/*.png`."""
    number = sorted(truth.glob("A_*"))[0].name.split("_")[1]
    for harmonizer in SHOWN:
        folder = bench.work / "travelling" / harmonizer.name
        if not (folder / f"D_{number}_0000.nii.gz").exists():
            continue
        rows = [
            _row(truth / f"A_{number}_0000.nii.gz", scans, folder, f"{site}_{number}_0000.nii.gz") for site in SITES[1:]
        ]
        height, width = max(row.shape[0] for row in rows), max(row.shape[1] for row in rows)
        sheet = np.vstack([np.pad(row, ((0, height - row.shape[0]), (0, width - row.shape[1]))) for row in rows])
        path = bench.work / "pictures" / f"{harmonizer.name}.png"
        path.parent.mkdir(exist_ok=True)
        sitk.WriteImage(sitk.GetImageFromArray(np.kron(sheet, np.ones((3, 3), np.uint8))), str(path))


def _row(truth: Path, scans: Path, harmonized_folder: Path, name: str) -> npt.NDArray[np.uint8]:
    volumes: list[npt.NDArray[Any]] = [
        sitk.GetArrayFromImage(sitk.ReadImage(str(path))).astype(np.float64)
        for path in (scans / name, harmonized_folder / name, truth)
    ]
    mask = foreground_mask(volumes[2])
    scan, changed, real = (zscore_inside(volume, mask) for volume in volumes)
    middle = scan.shape[0] // 2
    grey = [np.clip((z[middle] + 2.5) / 5, 0, 1) for z in (scan, changed, real)]
    difference = np.clip(np.abs(changed - real)[middle] / 2.5, 0, 1)
    return np.asarray(255 * np.hstack([*grey, difference]), dtype=np.uint8)
