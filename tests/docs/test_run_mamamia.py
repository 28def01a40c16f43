"""The page on MAMA-MIA, from the download to scores and harmonized volumes, on a small copy of the published layout."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.datasets.test_convert_mamamia import HEADER
from tests.datasets.volumes import write_volume
from tests.docs.pages import BLOCKS
from tests.docs.reading import follow, lines_with

MAMAMIA = "docs/how-to/mama-mia.md"
DATA = tuple(lines_with(MAMAMIA, "convert mamamia"))
SPLIT = lines_with(MAMAMIA, "sites split")[0]
RUN = (*DATA, SPLIT)
SHAPE = (16, 16, 16)
TUMOR = np.zeros(SHAPE, np.uint8)
TUMOR[4:12, 4:12, 4:12] = 1


@pytest.fixture
def mamamia(folder: Path) -> Path:
    """Seven patients each of two collections, two of them the authors' test patients, as they publish them, converted."""
    source, rows = folder / "MAMA-MIA", []
    patients = [f"{site}_{number:03d}" for site in ("DUKE", "NACT") for number in range(7)]
    for index, patient in enumerate(patients):
        rows.append(f"{patient},{patient[:4]},1,1.5,,GE,model\n")
        for phase in range(3):
            image = np.random.default_rng(index * 3 + phase).uniform(10, 20, SHAPE) * (1 + phase * TUMOR)
            write_volume(source / "images" / patient / f"{patient}_{phase:04d}.nii.gz", image.astype(np.float32))
        made = write_volume(source / "segmentations" / "expert" / f"{patient}.nii.gz", TUMOR)
        shutil.copytree(made.parent, source / "segmentations" / "automatic", dirs_exist_ok=True)
    (source / "clinical_and_imaging_info.csv").write_text(HEADER + "".join(rows))
    tested = [patient for patient in patients if patient.endswith(("0", "1"))]
    trained = [patient for patient in patients if patient not in tested]
    pairs = [f"{patient},{test}\n" for patient, test in zip(trained, [*tested, *[""] * 6], strict=True)]
    (source / "train_test_splits.csv").write_text("train_split,test_split\n" + "".join(pairs))
    follow(DATA)
    (script,) = [block.text for block in BLOCKS if block.page == MAMAMIA and block.language == "python"]
    exec(compile(script, MAMAMIA, "exec"), {})
    assert {path.name[:8] for path in (folder / "official").rglob("*.nii.gz")} == {*tested}
    assert all(path.is_file() and path.parent.name == path.name[:4] for path in (folder / "official").rglob("*.nii.gz"))
    return folder / "nnUNet_raw" / "Dataset201_MAMAMIA"


def test_mama_mia_in_its_published_form_and_the_script_that_gathers_its_official_test_set(
    mamamia: Path, folder: Path
) -> None:
    assert len(list((mamamia / "imagesTs").glob("*.nii.gz"))) == 4 * 3
    follow([SPLIT])
    sites = folder / "consortium" / "sites"
    assert list((sites / "DUKE" / "nnUNet_raw" / mamamia.name / "labelsTr").iterdir())
    assert not list((sites / "NACT" / "nnUNet_raw").rglob("labelsTr/*")), "labels of DUKE alone"
