"""The page on BraTS 2021, from the download to scores and a study, on a small copy of the published layout."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.datasets.test_convert_brats import CHALLENGE
from tests.datasets.volumes import write_volume
from tests.docs.reading import TINY_STUDY, edit_study, follow, images, lines_with, run, shell

STUDY = "nnunet-fedharm study"
BRATS = "docs/how-to/brats2021.md"
BRATS_DATA = tuple(lines_with(BRATS, "convert brats2021"))
BRATS_SITES = tuple(lines_with(BRATS, "sites report"))
BRATS_CENTRAL = tuple(lines_with(BRATS, "nnUNetv2_train"))
BRATS_SPLIT, BRATS_FEDERATION = lines_with(BRATS, "sites split")
BRATS_STUDY = tuple(lines_with(BRATS, "study prepare"))
BRATS_SCORES = tuple(lines_with(BRATS, "MODEL="))
RUN = (
    *BRATS_DATA,
    *BRATS_SITES,
    *BRATS_CENTRAL,
    BRATS_SPLIT,
    BRATS_FEDERATION,
    *BRATS_STUDY,
    *BRATS_SCORES,
)
TWO_CELLS = {
    **TINY_STUDY,
    "site_report_cases": "0",
    "harmonizers": '["polarity"]',
    "modes": '["central"]',
    "baselines": "[]",
    "oracle": "false",
    "seeds": "[0]",
}
"""Values of the study's file for a cell of plain nnU-Net and one with a harmonizer."""
REGIONS = {"whole tumor", "tumor core", "enhancing tumor"}
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
    follow([BRATS_SPLIT])
    assert sorted(path.name for path in (folder / "consortium" / "sites").iterdir()) == ["site-01", "site-18"]


@pytest.mark.long
def test_brats_sites_are_compared_and_one_model_maps_their_four_channels(brats: Path, folder: Path) -> None:
    """IMAGES are two cases of the second institution."""
    pytest.importorskip("radiomics", reason="pyradiomics is not installed")
    follow(BRATS_SITES)
    with (folder / "brats-sites" / "differences.csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert {row["channel"] for row in rows} == {"T1", "T1ce", "T2", "Flair"}, "each channel by itself"
    assert {"median site-01", "median site-18"} <= rows[0].keys()
    (folder / "IMAGES").mkdir()
    for path in (brats / "imagesTr").glob("*_0000[89]_*"):
        shutil.copy(path, folder / "IMAGES")
    follow(BRATS_CENTRAL)
    assert {*images(folder / "PREDICTIONS")} == {"BraTS2021_00008.nii.gz", "BraTS2021_00009.nii.gz"}


@pytest.mark.long
def test_brats_is_federated_and_held_out_cases_are_scored_by_region(brats: Path, folder: Path) -> None:
    follow([BRATS_SPLIT, BRATS_FEDERATION])
    home = folder / "consortium" / "sites" / "site-01" / "nnUNet_raw" / brats.name
    for name, held_out in (("IMAGES", "imagesTs"), ("LABELS", "labelsTs")):
        (folder / name).symlink_to(home / held_out)
    said = shell("\n".join(BRATS_SCORES))
    assert all(f"{region} " in said for region in REGIONS), "Dice is told for each region"
    (case,) = json.loads((folder / "metrics.json").read_text())["cases"].values()
    assert {*case["labels"]} == REGIONS
    assert {*images(folder / "PREDICTIONS")} == {path.name for path in (folder / "LABELS").iterdir()}


@pytest.mark.long
def test_brats_as_a_study_whose_cells_a_cluster_runs(brats: Path, folder: Path) -> None:
    """Two cells, one after another as the tasks of the array begin them, without a cluster."""
    init, prepare, dry_run, slurm, report = BRATS_STUDY
    said = follow([init, prepare, dry_run, slurm], after={init: lambda: edit_study("brats-study", TWO_CELLS)})
    assert "#SBATCH --array=0-1%8" in said
    cells = shlex.split(re.findall(r"^all_cell=\((.*)\)$", said, flags=re.M)[0])
    for cell in cells:
        run(f"{STUDY} run brats-study --cell {cell}")
        metrics = json.loads((folder / "brats-study" / "cells" / cell / "metrics.json").read_text())
        assert all({*case["labels"]} == REGIONS for case in metrics["cases"].values())
    follow([report])
    with (folder / "brats-study" / "report" / "tables" / "cases.csv").open() as file:
        tested = {(row["arm"], row["site"]) for row in csv.DictReader(file)}
    assert len(tested) == 2 * 2, "both arms at both sites"
