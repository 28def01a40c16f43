"""Three simulated hospitals with real brain anatomy, as nnU-Net raw datasets in the consortium's layout.

    ROOT/sites/<SITE>/nnUNet_raw/Dataset901_DemoBrain/{imagesTr,labelsTr,imagesUnlabelled,imagesTs,labelsTs}

Each hospital has its own subjects and its own scanner; the ranges of the scanners' tone curves do not overlap. `cedar`
has images but no training labels; its held-out labels exist for evaluation only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from nnunet_fedharm.datasets.anatomy import LABELS, Subject, make_subject
from nnunet_fedharm.datasets.site_effects import ScannerRange, draw_scanner, scan
from nnunet_fedharm.errors import DataError

DATASET_ID = 901
DATASET_NAME = f"Dataset{DATASET_ID}_DemoBrain"
UNLABELLED_SITE = "cedar"


@dataclass(frozen=True, kw_only=True)
class Hospital:
    """A simulated site.

    Attributes:
        scanner: ranges of its site effects.
        labelled: whether its training cases have labels.
        vendor, field, sequence: as sites.json states them.
    """

    scanner: ScannerRange
    labelled: bool
    vendor: str
    field: float
    sequence: str


HOSPITALS: dict[str, Hospital] = {
    "alder": Hospital(
        scanner=ScannerRange(
            tone=(-0.3, 0.3), bias=(0.02, 0.08), point_spread_mm=(0.0, 0.5), noise=(0.01, 0.02), scale=(900.0, 1100.0)
        ),
        labelled=True,
        vendor="simulated 1",
        field=3.0,
        sequence="T1w, near the template's contrast",
    ),
    "birch": Hospital(
        scanner=ScannerRange(
            tone=(-2.6, -2.0), bias=(0.1, 0.2), point_spread_mm=(2.0, 3.0), noise=(0.02, 0.03), scale=(250.0, 350.0)
        ),
        labelled=True,
        vendor="simulated 2",
        field=1.5,
        sequence="T1w, dark grey matter",
    ),
    "cedar": Hospital(
        scanner=ScannerRange(
            tone=(5.0, 6.0), bias=(0.05, 0.1), point_spread_mm=(0.5, 1.5), noise=(0.01, 0.02), scale=(2500.0, 3500.0)
        ),
        labelled=False,
        vendor="simulated 3",
        field=1.5,
        sequence="T1w, saturated bright tissue",
    ),
}


@dataclass(frozen=True, kw_only=True)
class DemoSize:
    """How much data to make."""

    training: int = 6
    """Training cases per hospital."""
    held_out: int = 3
    """Held-out cases per hospital, in imagesTs and labelsTs."""
    spacing_mm: float = 2.5
    """Isotropic voxel size."""

    def __post_init__(self) -> None:
        if self.training < 2 or self.held_out < 1 or not 1.0 <= self.spacing_mm <= 5.0:
            raise DataError(
                "A demo hospital needs at least 2 training and 1 held-out cases and voxels of 1 to 5 mm, "
                f"got {self.training}, {self.held_out} and {self.spacing_mm} mm."
            )


def write_demo(root: Path, *, size: DemoSize | None = None, seed: int = 0, progress: bool = True) -> Path:
    """Write the three hospitals below `root`/sites.

    Args:
        root: folder of the consortium; made where missing.
        size: how much; the default trains in minutes on two cores.
        seed: a subject depends on (seed, hospital, number) only.
        progress: show a bar.

    Returns:
        `root`.

    Raises:
        DataError: a file cannot be written.
        SetupError: nilearn is missing.
    """
    size = size or DemoSize()
    jobs = [(site, number) for site in HOSPITALS for number in range(size.training + size.held_out)]
    try:
        for site, number in tqdm(jobs, "subjects", disable=not progress):
            _write_case(_raw_dataset(root, site), site, number, size, seed)
        for site in HOSPITALS:
            _write_descriptions(_raw_dataset(root, site), site, size)
    except OSError as error:
        raise DataError(f"Cannot write the demo data below {root}: {error}. Choose another folder with -o.") from error
    return root


def case_name(site: str, number: int) -> str:
    """Case identifier of a hospital's subject."""
    return f"{site}_{number:03d}"


def make_case(site: str, number: int, *, spacing_mm: float, seed: int) -> tuple[Subject, npt.NDArray[np.int16]]:
    """A subject and its scan, as pure numbers."""
    generator = np.random.default_rng([seed, list(HOSPITALS).index(site), number])
    subject = make_subject(generator, spacing_mm=spacing_mm)
    draw = draw_scanner(HOSPITALS[site].scanner, generator)
    return subject, scan(subject.signal, subject.brain, subject.spacing_mm, draw, generator)


def _raw_dataset(root: Path, site: str) -> Path:
    return root / "sites" / site / "nnUNet_raw" / DATASET_NAME


def _write_case(raw: Path, site: str, number: int, size: DemoSize, seed: int) -> None:
    subject, image = make_case(site, number, spacing_mm=size.spacing_mm, seed=seed)
    image_folder, label_folder = _folders(HOSPITALS[site], held_out=number >= size.training)
    name = case_name(site, number)
    _save(raw / image_folder / f"{name}_0000.nii.gz", image, subject.spacing_mm)
    if label_folder:
        _save(raw / label_folder / f"{name}.nii.gz", subject.labels, subject.spacing_mm)


def _folders(hospital: Hospital, *, held_out: bool) -> tuple[str, str | None]:
    if held_out:
        return "imagesTs", "labelsTs"
    return ("imagesTr", "labelsTr") if hospital.labelled else ("imagesUnlabelled", None)


def _save(path: Path, array: npt.NDArray[np.generic], spacing_mm: tuple[float, float, float]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = -np.asarray(spacing_mm) * (np.asarray(array.shape) - 1) / 2
    nib.save(nib.Nifti1Image(array, affine), path)


def _write_descriptions(raw: Path, site: str, size: DemoSize) -> None:
    hospital = HOSPITALS[site]
    dataset = {
        "channel_names": {"0": "MR"},
        "labels": LABELS,
        "numTraining": size.training if hospital.labelled else 0,
        "file_ending": ".nii.gz",
        "description": "MNI152 anatomy (nilearn), simulated subjects and scanners",
    }
    sites = {
        "sites": {site: {"vendor": hospital.vendor, "field": hospital.field, "sequence": hospital.sequence}},
        "cases": dict(_cases(site, size)),
    }
    (raw / "dataset.json").write_text(json.dumps(dataset, indent=1) + "\n")
    (raw / "sites.json").write_text(json.dumps(sites, indent=1) + "\n")


def _cases(site: str, size: DemoSize) -> Iterator[tuple[str, str]]:
    return ((case_name(site, number), site) for number in range(size.training + size.held_out))
