"""The pages on BraTS 2021 and MAMA-MIA up to the split into sites, on small copies of the published layouts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.datasets.test_convert_brats import CHALLENGE
from tests.datasets.test_convert_mamamia import HEADER
from tests.datasets.volumes import write_volume
from tests.docs.pages import BLOCKS
from tests.docs.reading import follow, lines_with

STUDY = "nnunet-fedharm study"
BRATS, MAMAMIA = ("docs/how-to/brats2021.md", "docs/how-to/mama-mia.md")
BRATS_DATA = tuple(lines_with(BRATS, "convert brats2021"))
BRATS_FIRST = (
    *lines_with(BRATS, "sites split")[:1],
    f"{STUDY} init brats-study -d $nnUNet_raw/Dataset137_BraTS2021 --reference site-01",
    f"{STUDY} slurm brats-study -A PROJECT -t 2-00:00:00 --at-once 8",
)
MAMAMIA_DATA = tuple(lines_with(MAMAMIA, "convert mamamia"))
MAMAMIA_FIRST = tuple(lines_with(MAMAMIA, "sites split")[:1])
RUN = (*BRATS_DATA, *BRATS_FIRST, *MAMAMIA_DATA, *MAMAMIA_FIRST)
SHAPE = (16, 16, 16)


def tumor(size: int, value: int = 1) -> np.ndarray:
    """A cube in the middle, and in it smaller ones of other values where there are more."""
    made = np.zeros(SHAPE, np.uint8)
    made[8 - size : 8 + size, 8 - size : 8 + size, 8 - size : 8 + size] = value
    return made


@pytest.fixture
def brats(folder: Path) -> Path:
    """Five cases each of two institutions, as the challenge publishes them, converted."""
    source, lines = folder / "BraTS2021_Training_Data", []
    regions = np.maximum(np.maximum(tumor(5, 2), np.where(tumor(3), 4, 0)), 0).astype(np.uint8)
    regions[tumor(2) == 1] = 1
    for number in range(10):
        case = f"BraTS2021_{number:05d}"
        for index, channel in enumerate(("t1", "t1ce", "t2", "flair")):
            image = np.random.default_rng(number * 4 + index).uniform(10, 20, SHAPE) * (1 + regions)
            write_volume(source / "data" / case / f"{case}_{channel}.nii.gz", image.astype(np.float32))
        write_volume(source / "data" / case / f"{case}_seg.nii.gz", regions)
        lines.append(f"{case},,UPENN-GBM,{1 if number < 5 else 18}\n")
    (source / "BraTS21-17_Mapping.csv").write_text(CHALLENGE + "".join(lines))
    follow(BRATS_DATA)
    return folder / "nnUNet_raw" / "Dataset137_BraTS2021"


def test_brats_in_its_published_form(brats: Path, folder: Path) -> None:
    raw = json.loads((brats / "dataset.json").read_text())
    assert list(raw["channel_names"].values()) == ["T1", "T1ce", "T2", "Flair"]
    assert len(raw["regions_class_order"]) == 3, "nnU-Net's overlapping regions"
    said = follow(BRATS_FIRST)
    assert sorted(path.name for path in (folder / "consortium" / "sites").iterdir()) == ["site-01", "site-18"]
    assert "#SBATCH --array=0-" in said


@pytest.fixture
def mamamia(folder: Path) -> Path:
    """Seven patients each of two collections, two of them the authors' test patients, as they publish them, converted."""
    source, rows = folder / "MAMA-MIA", []
    patients = [f"{site}_{number:03d}" for site in ("DUKE", "NACT") for number in range(7)]
    for index, patient in enumerate(patients):
        rows.append(f"{patient},{patient[:4]},1,1.5,,GE,model\n")
        for phase in range(3):
            image = np.random.default_rng(index * 3 + phase).uniform(10, 20, SHAPE) * (1 + phase * tumor(4))
            write_volume(source / "images" / patient / f"{patient}_{phase:04d}.nii.gz", image.astype(np.float32))
        made = write_volume(source / "segmentations" / "expert" / f"{patient}.nii.gz", tumor(4))
        shutil.copytree(made.parent, source / "segmentations" / "automatic", dirs_exist_ok=True)
    (source / "clinical_and_imaging_info.csv").write_text(HEADER + "".join(rows))
    tested = [patient for patient in patients if patient.endswith(("0", "1"))]
    trained = [patient for patient in patients if patient not in tested]
    pairs = [f"{patient},{test}\n" for patient, test in zip(trained, [*tested, *[""] * 6], strict=True)]
    (source / "train_test_splits.csv").write_text("train_split,test_split\n" + "".join(pairs))
    follow(MAMAMIA_DATA)
    (script,) = [block.text for block in BLOCKS if block.page == MAMAMIA and block.language == "python"]
    exec(compile(script, MAMAMIA, "exec"), {})
    assert {path.name[:8] for path in (folder / "official").rglob("*.nii.gz")} == {*tested}
    assert all(path.is_file() and path.parent.name == path.name[:4] for path in (folder / "official").rglob("*.nii.gz"))
    return folder / "nnUNet_raw" / "Dataset201_MAMAMIA"


def test_mama_mia_in_its_published_form_and_the_script_that_gathers_its_official_test_set(
    mamamia: Path, folder: Path
) -> None:
    assert len(list((mamamia / "imagesTs").glob("*.nii.gz"))) == 4 * 3
    follow(MAMAMIA_FIRST)
    sites = folder / "consortium" / "sites"
    assert list((sites / "DUKE" / "nnUNet_raw" / mamamia.name / "labelsTr").iterdir())
    assert not list((sites / "NACT" / "nnUNet_raw").rglob("labelsTr/*")), "labels of DUKE alone"
