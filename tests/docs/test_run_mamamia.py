"""The page on MAMA-MIA, from the download to scores and harmonized volumes, on a small copy of the published layout."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.datasets.test_convert_mamamia import HEADER
from tests.datasets.volumes import write_volume
from tests.docs.pages import BLOCKS
from tests.docs.reading import follow, images, lines_with, same, shell

MAMAMIA = "docs/how-to/mama-mia.md"
DATA = tuple(lines_with(MAMAMIA, "convert mamamia"))
SITES = tuple(lines_with(MAMAMIA, "sites report"))
CENTRAL = tuple(lines_with(MAMAMIA, "nnUNetv2_train"))
SPLIT, FEDERATION = lines_with(MAMAMIA, "sites split")
(HELD_OUT,) = lines_with(MAMAMIA, "labelsTs -o")
(OFFICIAL,) = lines_with(MAMAMIA, "RAW=")
(VOLUME,) = lines_with(MAMAMIA, "predictions-central")
(HARMONIZED,) = lines_with(MAMAMIA, "-o harmonized")
RUN = (*DATA, *SITES, *CENTRAL, SPLIT, FEDERATION, HELD_OUT, OFFICIAL, VOLUME, HARMONIZED)
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


@pytest.mark.long
def test_mama_mia_s_sites_are_compared_phase_by_phase(mamamia: Path, folder: Path) -> None:
    pytest.importorskip("radiomics", reason="pyradiomics is not installed")
    follow(SITES)
    with (folder / "mamamia-sites" / "differences.csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert {row["channel"] for row in rows} == {"pre-contrast", "post-contrast 1", "post-contrast 2"}
    assert {"median DUKE", "median NACT"} <= rows[0].keys()


@pytest.mark.long
def test_mama_mia_in_one_place_predicts_the_official_test_set(
    mamamia: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAW", str(mamamia))  # as the block above it on the page does
    follow([*CENTRAL, VOLUME])
    assert {*images(folder / "predictions-central")} == {path.name for path in (mamamia / "labelsTs").iterdir()}


@pytest.mark.long
def test_mama_mia_across_sites_scores_held_out_and_official_patients(mamamia: Path, folder: Path) -> None:
    """Labels of DUKE alone; the blocks of the page one after another in one shell, whose last site is NACT."""
    follow([SPLIT, FEDERATION])
    shell("\n".join([HELD_OUT, OFFICIAL, HARMONIZED]))
    for site in ("DUKE", "NACT"):
        scored = json.loads((folder / f"metrics-{site}.json").read_text())["cases"]
        held_out = folder / "consortium" / "sites" / site / "nnUNet_raw" / mamamia.name / "labelsTs"
        assert {f"{case}.nii.gz" for case in scored} == {path.name for path in held_out.glob("*.nii.gz")}
    cases = json.loads((folder / "metrics-official.json").read_text())["cases"]
    assert {case: item["site"] for case, item in cases.items()} == {
        f"{site}_00{number}": site for site in ("DUKE", "NACT") for number in range(2)
    }
    scans, harmonized = images(folder / "official" / "NACT"), images(folder / "harmonized")
    assert scans.keys() == harmonized.keys()
    assert not same(scans, harmonized), "NACT is not the reference"
