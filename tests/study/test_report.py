"""The report's folder: a page that needs nothing else, numbers, tables, methods, pictures, PDF."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest

from nnunet_fedharm.errors import DataError
from nnunet_fedharm.study.report import build
from nnunet_fedharm.study.report.build import write_report
from nnunet_fedharm.study.report.charts import band_chart, epsilon_chart, paired_chart
from nnunet_fedharm.study.report.dot_plot import Column, Row, dot_plot
from nnunet_fedharm.study.report.figures import epsilon_figure
from nnunet_fedharm.study.report.page import limits
from nnunet_fedharm.study.report.pdf import BROWSERS, print_pdf
from nnunet_fedharm.study.report.pictures import label_names
from nnunet_fedharm.study.report.references import ENTRIES
from nnunet_fedharm.study.statistics import analyse
from nnunet_fedharm.study.study_file import STUDY_FILE
from tests.evaluation.test_site_report_page import Checked
from tests.study.cells import CASES, Study

METRIC = {
    "before": {"value": 1.2},
    "after": {"value": 0.3},
    "change": {"value": -0.9, "low": -1.0, "high": -0.8},
    "n": 8,
}
AGREEMENT = {"median": METRIC}
QUALITY = {
    "sites": {"B": {"0000": {"nrmse": METRIC, "ssim": METRIC, "edges_kept": METRIC, "cnr_over_truth": METRIC}}},
    "features": {"sites": {"B": AGREEMENT}, "icc": AGREEMENT},
    "site_classifier": {
        state: {"balanced_accuracy": {"value": 0.8, "low": 0.7, "high": 0.9}, "null_high": 0.5} for state in ("before", "after")
    },
    "lesions": {"B": {"n_lesions": 9, "lesion_recall": METRIC, "false_lesions": METRIC, "false_lesions_on_lesion_free": METRIC}},
}  # fmt: skip


def whole_study(folder: Path) -> Study:
    study = Study(folder, simulated=True)
    study.arm("central_none", {"A": 0.85, "B": 0.5})
    study.arm("central_augment", {"A": 0.84, "B": 0.6})
    study.arm("central_polarity", {"A": 0.85, "B": 0.74}, quality=QUALITY)
    study.arm("federated_polarity", {"A": 0.85, "B": 0.739}, quality=QUALITY)
    study.arm("local_B_none", {"B": 0.8})
    study.arm("central_none_epsilon-8", {"A": 0.8, "B": 0.42})
    study.arm("central_polarity_epsilon-8", {"A": 0.8, "B": 0.7}, quality=QUALITY)
    return study


def write_images(study: Study) -> None:
    """Every test case of B, and what the first trainings made of it."""
    generator = np.random.default_rng(0)
    label = np.zeros((20, 24, 12), dtype=np.uint8)
    label[8:14, 6:12, 4:8] = 1
    cells = [study.folder / "cells" / f"{name}_seed-0" for name in ("central_none", "central_polarity")]
    test = study.folder / "data" / "test" / "B"
    for index in range(CASES):
        image = generator.normal(100, 10, label.shape).astype(np.float32) + 60 * label
        files = {
            test / "images" / f"B_case{index}_0000.nii.gz": image,
            cells[1] / "harmonized" / "B" / f"B_case{index}_0000.nii.gz": image,
            test / "labels" / f"B_case{index}.nii.gz": label,
            cells[0] / "predictions" / "B" / f"B_case{index}.nii.gz": label,
            cells[1] / "predictions" / "B" / f"B_case{index}.nii.gz": label,
        }
        for path, array in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    study = whole_study(tmp_path_factory.mktemp("report"))
    write_images(study)
    return write_report(study.results(), study.folder / "report", pdf=False).parent


def test_the_page_is_whole_needs_no_network_and_escapes_names(report: Path) -> None:
    page = (report / "report.html").read_text()
    Checked(page)
    assert "<script" not in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    assert not re.findall(r"url\(|@import", page)
    assert "&lt;Blobs&gt;" in page
    assert "<Blobs>" not in page
    for question in (
        "How different are the sites?",
        "How close does federated training come?",
        "What does privacy cost?",
    ):
        assert page.index(question) < page.index('id="dice"')
    for section in (
        "gap",
        "federated",
        "privacy",
        "pictures",
        "quality",
        "lesions",
        "controls",
        "cost",
        "methods",
        "limits",
    ):
        assert f'id="{section}"' in page


def test_dice_and_radiomics_are_drawn_against_epsilon(report: Path) -> None:
    page = (report / "report.html").read_text()
    assert page.count('aria-label="Dice over the target sites against epsilon') == 2
    assert page.count('aria-label="Median ICC of radiomics features against epsilon') == 1


def test_two_private_harmonizers_of_one_mode_are_told_apart(tmp_path: Path) -> None:
    study = Study(tmp_path)
    file = study.folder / STUDY_FILE
    file.write_text(file.read_text().replace('["none", "polarity"]', '["none", "polarity", "diffusion"]'))
    study.arm("central_none", {"A": 0.85, "B": 0.5})
    for name in ("none", "polarity", "diffusion"):
        study.arm(f"central_{name}_epsilon-8", {"A": 0.8, "B": 0.5})
    shown = str(epsilon_figure(analyse(study.results(), resamples=50)))
    styles = {name: set(re.findall(rf'class="([^"]*)"></i>{name}', shown)) for name in ("polarity", "diffusion")}
    assert styles == {"polarity": {"series-2 dashes-0"}, "diffusion": {"series-2 dashes-1"}}
    assert 'class="line thin series-2 dashes-1"' in shown


def test_every_finished_cell_gets_a_model_card(report: Path) -> None:
    cells = report.parent / "cells"
    card = (cells / "central_none_epsilon-8_seed-1" / "MODEL_CARD.md").read_text()
    assert "epsilon 8, delta 1e-5; unit: patient; spent 7.90" in card
    assert "facts" in card
    assert "| A | GE, 3 T, T1w | images and labels |" in card
    assert "| B | not stated (simulated) | images |" in card
    own = json.loads((cells / "local_B_none_seed-0" / "model_card.json").read_text())
    assert [site["name"] for site in own["sites"]] == ["B"]


def test_pictures_are_of_the_median_case_and_sites_without_are_named(report: Path) -> None:
    page = (report / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5
    assert "No pictures of A" in page


def test_all_numbers_are_in_json_and_tables(report: Path) -> None:
    content = json.loads((report / "study.json").read_text())
    assert [item["question"][:3] for item in content["answers"]] == ["How", "Wha", "How", "Wha"]
    assert len(content["arms"]) == 7
    rows = list(csv.DictReader((report / "tables" / "cases.csv").open()))
    assert len(rows) == 3 * (6 * 2 * CASES + CASES)
    comparisons = list(csv.DictReader((report / "tables" / "comparisons.csv").open()))
    assert {row["family"] for row in comparisons} >= {
        "arms against the control",
        "federated against central",
        "own labels against the control, site by site",
        "private against the same without privacy, where labels were used",
    }
    page = (report / "report.html").read_text()
    assert "<summary>Own labels against the control, site by site</summary>" in page
    assert "<summary>With differential privacy against without, where labels were used</summary>" in page
    costs = {row["arm"]: row for row in csv.DictReader((report / "tables" / "costs.csv").open())}
    assert costs["central_none_epsilon-8"]["epsilon"] == "7.9"
    controls = list(csv.DictReader((report / "tables" / "controls.csv").open()))
    assert ("known inverse", "passed") in {(row["control"], row["result"]) for row in controls}
    assert (report / "tables" / "arms.csv").is_file()


def test_every_citation_of_the_methods_has_its_entry(report: Path) -> None:
    written, references = (report / "methods.md").read_text(), (report / "references.bib").read_text()
    cited = set(re.findall(r"@(\w+)\]", written))
    assert cited
    assert cited <= set(re.findall(r"@\w+\{(\w+),", references)) & {*ENTRIES}
    assert "nnunetv2 2.8.1" in written
    assert cited == set(re.findall(r"@(?!software)\w+\{(\w+),", references))
    assert "DP-SGD" in written
    assert "simulated" in written
    for entry in ENTRIES.values():
        assert entry.count("{") == entry.count("}")


def test_methods_tell_how_the_shown_quality_and_energy_were_measured_and_what_was_trained(
    report: Path, tmp_path: Path
) -> None:
    written = (report / "methods.md").read_text()
    for key in ("wang2004ssim", "vangriethuysen2017radiomics", "lin1989ccc", "shrout1979icc", "breiman2001forests"):
        assert f"[@{key}]" in written
    assert "a lesion is found where it covers 10% or more of it" in written
    study = whole_study(tmp_path / "counted")
    for cell in study.folder.glob("cells/*polarity*/cost.json"):
        cell.write_text(json.dumps({**json.loads(cell.read_text()), "energy_j": 7200.0, "counters": ["RAPL"]}))
    write_report(study.results(), tmp_path / "counted" / "report", pdf=False)
    assert "Energy of the trainings was read from RAPL" in (tmp_path / "counted" / "report" / "methods.md").read_text()
    few = Study(tmp_path / "few")
    few.arm("central_none", {"A": 0.85, "B": 0.5})
    few.arm("central_polarity", {"A": 0.85, "B": 0.7}, seeds=[0])
    write_report(few.results(), tmp_path / "few" / "report", pdf=False)
    written = (tmp_path / "few" / "report" / "methods.md").read_text()
    assert "Each arm was to be trained 3 times, with seeds 0, 1 and 2; 4 of 42 trainings were finished" in written
    assert "Fewer than planned: polarity, central (1)." in written
    assert "None: plain nnU-Net, federated;" in written
    assert "Harmonization quality" not in written
    assert "Energy" not in written


def test_methods_name_the_commits_of_training_and_of_scoring(tmp_path: Path) -> None:
    study = Study(tmp_path)
    study.arm("central_none", {"A": 0.85, "B": 0.5})
    file = study.folder / "cells" / "central_none_seed-0" / "environment.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "scored": {"git": "def"}, "earlier": [{"git": "000"}]}))
    write_report(study.results(), tmp_path / "report", pdf=False)
    assert "Commit `abc`, `000` and `def`." in (tmp_path / "report" / "methods.md").read_text()


def test_no_pdf_of_a_former_report_stands_beside_a_new_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study(tmp_path)
    study.arm("central_none", {"A": 0.85, "B": 0.5})
    folder = tmp_path / "report"
    folder.mkdir()
    (folder / "report.pdf").write_bytes(b"%PDF of old numbers")
    monkeypatch.setattr(build, "print_pdf", lambda *_: "No browser.")
    said: list[str] = []
    write_report(study.results(), folder, show=said.append)
    assert said == ["No browser."]
    assert not (folder / "report.pdf").exists()


def test_the_colour_key_names_regions_by_the_smallest_that_holds_a_value(tmp_path: Path) -> None:
    study = Study(tmp_path)
    study.arm("central_none", {"A": 0.85, "B": 0.5})
    description = tmp_path / "Dataset001_Blobs" / "dataset.json"
    for labels, names in (
        ({"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": [3], "ignore": 4}, ["whole", "core", "enhancing"]),
        ({"background": 0, "b": 2, "a": 1}, ["a", "b"]),
        ({"background": 0, "a": 1, "c": 3}, ["a", "2", "c"]),
        ({"background": 0, **{f"l{value}": value for value in range(1, 8)}}, ["l1", "l2", "l3", "l4"]),
    ):  # fmt: skip
        description.write_text(json.dumps({**json.loads(description.read_text()), "labels": labels}))
        assert label_names(study.results()) == names


def test_the_report_is_refused_without_the_control_and_made_of_it_alone(tmp_path: Path) -> None:
    study = Study(tmp_path)
    study.arm("central_polarity", {"A": 0.85, "B": 0.74})
    with pytest.raises(DataError, match="central_none"):
        write_report(study.results(), tmp_path / "report", pdf=False)
    study.arm("central_none", {"A": 0.85, "B": 0.5}, seeds=[0])
    page = write_report(study.results(), tmp_path / "report", pdf=False).read_text()
    assert "Exploratory, 1 training of each arm" in page
    assert page.count("not measured in this study") >= 2
    assert "Federated beside central training has no result yet" in page


def test_a_site_report_in_the_studys_folder_answers_the_first_question(tmp_path: Path) -> None:
    study = Study(tmp_path)
    study.arm("central_none", {"A": 0.85, "B": 0.5})
    empty: dict[str, list[str]] = {name: [] for name in ("sites", "variants", "failures", "shared")}
    content = {"dataset": "D", "created": "2026-01-01", "mode": "pooled", "settings": {}, **empty}
    (study.folder / "site-report").mkdir()
    (study.folder / "site-report" / "report.json").write_text(json.dumps(content))
    assert "Nothing was measured." in write_report(study.results(), tmp_path / "report", pdf=False).read_text()
    (study.folder / "site-report" / "report.json").write_text("{}")
    with pytest.raises(DataError, match="report"):
        write_report(study.results(), tmp_path / "report", pdf=False)


def test_page_methods_and_cards_tell_which_sites_were_held_out_of_all_training(tmp_path: Path) -> None:
    study = Study(tmp_path, held_out=["C"])
    study.arm("central_none", {"A": 0.85, "B": 0.5, "C": 0.4})
    study.arm("central_polarity", {"A": 0.85, "B": 0.74, "C": 0.7})
    study.arm("local_C_none", {"C": 0.8})
    page = write_report(study.results(), tmp_path / "report", pdf=False).read_text()
    assert "labels of A; C held out of all training" in page
    assert "at B (labels withheld) and C (new hospital, held out of all training)" in page
    assert ">held out<" in page  # over the column of C
    assert "C, held out of all training, can only be an example." in page
    assert "with <code>held_out_sites</code>" not in page
    written = (tmp_path / "report" / "methods.md").read_text()
    assert "Labels of A were used for training. Those of B were withheld" in written
    assert (
        "C took part in no central or federated training and stands for a new hospital: neither images nor" in written
    )
    assert "on at most 20 volumes without labels that are no test cases" in written
    assert json.loads((tmp_path / "report" / "study.json").read_text())["held_out"] == ["C"]
    cells = study.folder / "cells"
    cards = {
        name: (cells / f"{name}_seed-0" / "MODEL_CARD.md").read_text() for name in ("central_none", "central_polarity")
    }
    for card in cards.values():
        assert "| B | not stated | images |" in card
        assert "| C |" not in card.split("## Metrics")[0]
        assert ", 2 sites; labels of A." in card
    assert "its scores there are those of this model as it is." in cards["central_none"]
    assert "of this model after `nnunet-fedharm adapt` on at most 20 volumes" in cards["central_polarity"]
    own = json.loads((cells / "local_C_none_seed-0" / "model_card.json").read_text())
    assert [site["name"] for site in own["sites"]] == ["C"]
    assert not any("took part in no" in line for line in own["limits"])


def test_limits_name_small_sites_few_trainings_and_what_is_missing(tmp_path: Path) -> None:
    study = Study(tmp_path, seeds=(0, 1))
    study.arm("central_none", {"A": 0.85, "B": 0.5})
    said = " ".join(limits(analyse(study.results(), resamples=50), ["Lesion safety"]))
    assert "exploratory" in said
    assert "central_polarity_seed-0" in said
    assert "lesion safety" in said
    assert "Energy was not measured" in said


def test_charts_of_nothing_are_empty_and_hold_their_numbers_as_words(report: Path) -> None:
    assert dot_plot([], [Column("A", "A", "")], label="x") == ""
    assert band_chart([], margin=0.02, x_label="x", label="x") == ""
    assert paired_chart([], ["A"], margin=0.02, label="x") == ""
    assert epsilon_chart([], label="x") == ""
    page = (report / "report.html").read_text()
    assert "polarity (central): A 0.8" in page
    assert dot_plot([Row("g", "n", "s", {})], [Column("A", "A", "")], label="x") == ""


def test_without_a_browser_the_reason_is_one_sentence(
    report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    said = print_pdf(report / "report.html", tmp_path / "report.pdf")
    assert said is not None
    assert "Chromium" in said
    assert said.count("\n") == 0


@pytest.mark.skipif(not any(shutil.which(name) for name in BROWSERS), reason="no Chromium or Chrome here")
def test_a_browser_prints_the_page(report: Path, tmp_path: Path) -> None:
    said = print_pdf(report / "report.html", tmp_path / "report.pdf")
    assert said is None
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")


def test_the_reports_margin_floor_and_energy_are_those_of_the_study(tmp_path: Path) -> None:
    study = Study(tmp_path, more='baselines = ["augment"]\n[report]\nmargin = 0.05\nleast_dice = 0.8\n')
    study.arm("central_none", {"A": 0.85, "B": 0.5})
    study.arm("central_polarity", {"A": 0.85, "B": 0.74})
    study.arm("federated_polarity", {"A": 0.85, "B": 0.71})
    for cell in study.folder.glob("cells/*polarity*/cost.json"):
        cost = json.loads(cell.read_text())
        cell.write_text(json.dumps({**cost, "energy_j": 7200.0, "counters": ["RAPL"]}))
    found = analyse(study.results(), resamples=100)
    assert found.federated[0].equivalence is None, "central is below least_dice"
    assert found.at_reference[0].equivalence is not None
    assert found.at_reference[0].equivalence.margin == 0.05
    page = write_report(study.results(), tmp_path / "report", pdf=False).read_text()
    assert "within 0.05 Dice" in page
    assert "mean Dice below 0.8" in page
    assert "was changed after the first trainings" in page  # these cells recorded no [report], so they had the defaults
    assert "training, Wh" in page
    assert ">2.0<" in page
    assert "what RAPL counted" in page
    for cell in study.folder.glob("cells/*/environment.json"):
        content = json.loads(cell.read_text())
        cell.write_text(json.dumps({**content, "report": {"margin": 0.05, "least_dice": 0.8}}))
    page = write_report(study.results(), tmp_path / "report", pdf=False).read_text()
    assert "which was fixed beforehand" in page
