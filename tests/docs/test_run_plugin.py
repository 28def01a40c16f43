"""One model, trained in one place as the README and the how-to of the plugin say, and what pages do with such a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest

from tests.conftest import BENCHMARK
from tests.docs.conftest import lay_out_some
from tests.docs.pages import BLOCKS
from tests.docs.reading import follow, images, lines_with, run, same, shell

pytestmark = pytest.mark.long

MODEL = f"nnUNet_results/{BENCHMARK}/nnUNetTrainerFedHarmPolarity__nnUNetFedHarmPlans__3d_fullres"
TRAINING = (
    "nnunet-fedharm plan -d 910 -c 3d_fullres --harmonizer polarity --reference A",
    "nnUNetv2_train 910 3d_fullres 0 -tr nnUNetTrainerFedHarmPolarity -p nnUNetFedHarmPlans",
)
USE = (
    "nnUNetv2_predict -d 910 -c 3d_fullres -f 0 -tr nnUNetTrainerFedHarmPolarity -p nnUNetFedHarmPlans -i IMAGES -o PREDICTIONS",
    "nnunet-fedharm evaluate -p PREDICTIONS -g LABELS --sites sites.json -o metrics.json",
    "nnUNetv2_predict -d 910 -c 3d_fullres -f 0 -tr nnUNetTrainerFedHarmPolarity -p nnUNetFedHarmPlans -i IMAGES -o OUT",
    "nnunet-fedharm harmonize -m RESULTS_FOLDER -i IMAGES -o OUT --site B",
)
REPORT = (f'nnunet-fedharm sites report -d 910 --model "$nnUNet_results/{MODEL.removeprefix("nnUNet_results/")}"',)
QUALITY = "docs/how-to/harmonization-quality.md"
TRAVELLERS = (*lines_with(QUALITY, "--before scans_B"), *lines_with(QUALITY, "--before scans --after"))
EXAMPLE = (*lines_with(QUALITY, "for site in"), *lines_with(QUALITY, "SEGMENTER"))
AUDIT = tuple(line for line in lines_with("docs/how-to/audit.md", "audit membership") if "--splits" in line)
RUN = (*TRAINING, *USE, *REPORT, *TRAVELLERS, *EXAMPLE, *AUDIT)


@pytest.fixture(scope="module")
def model(data: Path, desk: Path) -> Path:
    """The results folder, and what the pages call by other names."""
    follow(TRAINING)
    (desk / "RESULTS_FOLDER").symlink_to(desk / MODEL)
    lay_out_some(data, desk)
    return desk / MODEL


def test_the_plugin_predicts_scores_and_shows_what_it_saw(model: Path, desk: Path) -> None:
    assert (model.parents[2] / "nnUNet_preprocessed" / BENCHMARK / "nnUNetFedHarmPlans_explained.md").is_file()
    said = follow(USE)
    assert "HD95" in said
    cases = json.loads((desk / "metrics.json").read_text())["cases"]
    assert {case["site"] for case in cases.values()} == {"A", "B"}
    assert {"A_000.nii.gz", "B_100.nii.gz", "A_000_0000.nii.gz", "B_100_0000.nii.gz"} <= {*images(desk / "OUT")}
    assert same(
        images(desk / "PREDICTIONS"), {name: image for name, image in images(desk / "OUT").items() if len(name) < 14}
    )


def test_the_sites_are_compared_before_and_after(model: Path, desk: Path) -> None:
    follow(REPORT)
    report = desk / "nnUNet_results" / BENCHMARK / "site_report"
    assert {"report.html", "report.json", "differences.csv", "features.csv", "harmonized"} <= {
        path.name for path in report.iterdir()
    }
    assert len(json.loads((report / "report.json").read_text())["variants"]) == 2


def test_an_audit_asks_whether_the_fold_s_cases_were_in_the_training(model: Path, desk: Path) -> None:
    (desk / "MODEL").symlink_to(model)
    (desk / "DATASET").symlink_to(desk / "nnUNet_raw" / BENCHMARK)
    (desk / "nnUNet_preprocessed" / "DATASET").symlink_to(BENCHMARK)
    assert "AUC" in follow(AUDIT)
    assert {"report.html", "report.json"} <= {path.name for path in (desk / "audit" / "membership").iterdir()}


@pytest.fixture
def travellers(data: Path, desk: Path) -> Path:
    """Three subjects of A as B, C and D would show them, D upside down."""
    folder = data / "imagesTravelling"
    folder.mkdir(exist_ok=True)
    for number in range(3):
        source = nibabel.load(data / "imagesTr" / f"A_{number:03d}_0000.nii.gz")
        image = np.asanyarray(source.dataobj)
        for site, shown in {"B": np.sqrt(image), "C": image**2, "D": 300 - image}.items():
            nibabel.save(
                nibabel.Nifti1Image(shown.astype(np.float32), source.affine),
                folder / f"{site}_{number:03d}_0000.nii.gz",
            )
    return folder


def test_travelling_subjects_say_how_good_harmonization_is(model: Path, travellers: Path, desk: Path) -> None:
    """First with names that agree, then several sites in one folder and a pairs file, as the page shows it."""
    for name in ("imagesTr", "labelsTr"):
        (desk / name).symlink_to(travellers.parent / name)
    (desk / "scans_B").mkdir()
    for path in travellers.glob("B_*"):
        shutil.copy(path, desk / "scans_B" / path.name.replace("B_", "A_"))
    follow(TRAVELLERS[:2])
    assert json.loads((desk / "quality.json").read_text())["pairs"].keys() == {"A_000", "A_001", "A_002"}
    (text,) = [block.text for block in BLOCKS if block.page == QUALITY and block.language == "json"]
    (desk / "pairs.json").write_text(text.replace("_003", "_001"))  # there are three travellers here
    for case in ("B_001", "C_001"):
        for name, source in (("scans", travellers), ("harmonized", None)):
            (desk / name).mkdir(exist_ok=True)
            if source:
                shutil.copy(source / f"{case}_0000.nii.gz", desk / name)
        run(f"nnunet-fedharm harmonize -m RESULTS_FOLDER -i scans -o harmonized --site {case[0]}")
    follow(TRAVELLERS[2:])
    assert json.loads((desk / "quality.json").read_text())["pairs"].keys() == {"B_001", "C_001"}
    for name in ("scans_B", "harmonized", "imagesTr", "labelsTr"):
        path = desk / name
        path.unlink() if path.is_symlink() else shutil.rmtree(path)


def test_the_worked_example_of_the_quality_page(
    model: Path, travellers: Path, desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shell's loop and its Python as they stand. One model stands for both; as SEGMENTER with a fold called all."""
    (desk / BENCHMARK).symlink_to(travellers.parent)
    shutil.copytree(model, desk / "segmenter")
    (desk / "segmenter" / "fold_0").rename(desk / "segmenter" / "fold_all")
    monkeypatch.setenv("MODEL", str(model))
    monkeypatch.setenv("SEGMENTER", str(desk / "segmenter"))
    monkeypatch.setenv("data", BENCHMARK)  # the first block sets it in the same shell
    said = follow(EXAMPLE, instead={"data=": shell, "nnUNetv2": shell, "nnunet-fedharm quality": shell})
    assert "false lesions" in said
    cases = {f"{site}_{number:03d}" for site in "BCD" for number in range(3)}
    pairs = json.loads((desk / "quality.json").read_text())["pairs"]
    assert pairs.keys() == cases
    assert json.loads((desk / "lesions.json").read_text())["pairs"].keys() == cases
