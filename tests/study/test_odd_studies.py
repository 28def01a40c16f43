"""Studies that lack something: a site without labels or without any lesion, arms that failed or were trained otherwise."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from nnunet_fedharm.differences.findings import Estimate
from nnunet_fedharm.study.cell_card import cell_facts
from nnunet_fedharm.study.estimate import Estimator
from nnunet_fedharm.study.matrix import Arm, Cell
from nnunet_fedharm.study.report.answers import answer_all
from nnunet_fedharm.study.report.build import write_report
from nnunet_fedharm.study.report.charts import band_chart
from nnunet_fedharm.study.report.methods import methods
from nnunet_fedharm.study.statistics import analyse
from tests.study.cells import Study
from tests.study.test_report import QUALITY

DICE = {"A": 0.8, "B": 0.5}


def said(study: Study) -> list[str]:
    """All sentences of each answer, one text each."""
    found = analyse(study.results(), resamples=100)
    return [" ".join([item.headline, *item.support]) for item in answer_all(found, None)]


def page(study: Study) -> str:
    return write_report(study.results(), study.folder / "report", pdf=False).read_text()


@pytest.mark.parametrize("has_cases", [False, True], ids=["images alone", "nothing to find"])
def test_sites_without_a_dice_are_no_targets_and_the_report_is_made(tmp_path: Path, has_cases: bool) -> None:
    study = Study(tmp_path)
    for name in ("central_none", "central_polarity", "federated_polarity"):
        study.arm(name, DICE if has_cases else {"A": 0.8})
    for file in study.folder.glob("cells/*/metrics.json"):  # of B: neither labels nor predictions show anything
        content = json.loads(file.read_text())
        for entry in content["cases"].values():
            if entry["site"] == "B":
                entry["labels"]["ball"] = {"dice": None, "hd95_mm": None}
        file.write_text(json.dumps(content))
    assert analyse(study.results(), resamples=100).targets == ("A",)
    text = page(study)
    assert "mean Dice at A against plain nnU-Net" in text
    assert "A (labels withheld)" not in text
    assert "too badly" not in text
    assert "nothing here is about segmentation there" in text
    assert "Those of A were withheld" not in text


def test_two_arms_that_failed_are_called_equally_good_nowhere(tmp_path: Path) -> None:
    study = Study(tmp_path)
    for name in ("central_none", "central_polarity", "federated_polarity"):
        study.arm(name, {"A": 0.05, "B": 0.05}, like="the same")
    study.arm("central_none_epsilon-8", {"A": 0.05, "B": 0.05}, like="the same")
    found = analyse(study.results(), resamples=100)
    for item in (*found.federated, *found.private, *found.at_reference):
        assert item.equivalence is None
    assert {item.passed for item in found.controls if item.name == "no shift"} == {None}
    text = page(study)
    for praise in ("yes, within", "unchanged within", "as good as central within"):
        assert praise not in text
    assert "federated less central, Dice" not in text, "no bar within the margin either"
    table = (study.folder / "report" / "tables" / "comparisons.csv").read_text()
    assert not [line for line in table.splitlines() if line.endswith("yes")]


def test_how_often_arms_were_trained_is_not_said_of_those_with_more(tmp_path: Path) -> None:
    study = Study(tmp_path)
    for name, dice, seeds in (
        ("central_none", 0.5, None),
        ("central_augment", 0.6, [0]),
        ("central_polarity", 0.7, None),
        ("central_diffusion", 0.65, [0]),
    ):
        study.arm(name, {"A": 0.8, "B": dice}, seeds=seeds)
    central = said(study)[1]
    assert central.startswith("Exploratory, 1 training of some arms: Polarity and diffusion raise")
    assert "Exploratory, 1 training of each arm: Without any network in front, strong augmentation raises" in central


PRIVATE = "[privacy]\niterations_per_epoch = 50\ninitial_lr = 0.5\naugmentation = false"


@pytest.mark.parametrize("more", ["", PRIVATE])
def test_the_price_of_privacy_is_told_with_what_else_private_arms_did_otherwise(tmp_path: Path, more: str) -> None:
    study = Study(tmp_path, more=more)
    study.arm("central_none", DICE)
    study.arm("central_none_epsilon-8", {"A": 0.7, "B": 0.4})
    words = (
        "Private arms were trained otherwise in more than clipping and noise (steps of an epoch 50 instead of 250; initial "
        "learning rate 0.5 instead of 0.01; without nnU-Net's augmentation)"
    )
    assert (words in said(study)[3]) == bool(more)
    assert page(study).count("Private arms were trained otherwise") == (3 if more else 0)
    results = study.results()
    assert ("200 epochs of 50 steps" in methods(results, analyse(results, resamples=100))) == bool(more)
    private = next(cell for cell in results.finished if cell.cell.arm.epsilon)
    assert cell_facts(study.study, private).trained.startswith(f"200 epochs of {50 if more else 250} steps")
    assert "for as long as" not in " ".join(cell_facts(study.study, private).notes)


def test_a_gain_that_was_not_shown_is_no_share_of_the_gap_and_stands_with_its_p(tmp_path: Path) -> None:
    study = Study(tmp_path)
    study.arm("central_none", DICE)
    study.arm("local_B_none", {"B": 0.8})
    study.arm("central_polarity", {"A": 0.8, "B": 0.7})
    study.arm("central_diffusion", {"A": 0.8, "B": 0.501})
    central = said(study)[1]
    assert re.search(
        r"Diffusion was not shown to change .* \([+-]0\.00\d, 95% interval \S+ to \S+, p [0-9.]+\)\.", central
    )
    share = next(
        sentence for sentence in central.split(". ") if "they recover" in sentence or "it recovers" in sentence
    )
    assert "%" in share
    assert "diffusion" not in share


def test_what_waits_is_not_called_left_out(tmp_path: Path) -> None:
    study = Study(tmp_path)
    study.arm("central_none", DICE)
    _, central, federated, private = said(study)
    assert central == "Centralized harmonization has no result yet."
    assert federated == "Federated beside central training has no result yet."
    assert private.startswith("Differential privacy has no result yet")


def test_sites_that_were_compared_are_named_once_and_rightly(tmp_path: Path) -> None:
    study = Study(tmp_path, held_out=("C",))
    for name in ("central_none", "central_polarity", "federated_polarity"):
        study.arm(name, {"A": 0.8, "B": 0.7, "C": 0.1}, like="the same")
    federated = said(study)[2]
    assert "Federated less central, mean Dice with 90% interval" in federated
    assert federated.count("B (labels withheld)") == 0
    assert "polarity at B alone" in federated


def test_long_names_have_room_in_figures() -> None:
    name = "plain nnU-Net without augmentation at hospital-north and hospital-south alone"
    chart = band_chart([(name, "series-3", Estimate(0.01, 0.0, 0.02))], margin=0.02, x_label="x", label="x", width=500)
    place = re.search(r'<text x="([0-9.]+)"[^>]*class="armname end"', chart)
    assert place is not None
    assert float(place[1]) > 6 * len(name), "its beginning is inside the picture"


def test_the_figure_against_epsilon_says_what_and_where(tmp_path: Path) -> None:
    study = Study(tmp_path)
    study.arm("central_none", DICE)
    study.arm("central_polarity", DICE, quality=QUALITY)
    study.arm("central_none_epsilon-8", {"A": 0.7, "B": 0.4})
    text = page(study)
    assert text.count(">mean Dice at B</text>") >= 2
    assert "radiomics against epsilon" not in text


def test_a_finished_control_tells_what_steps_take_instead_of_a_few_timed_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Estimator, "seconds_of_step", lambda _: 23.0)  # as on a machine that is busy for a while
    study = Study(tmp_path)
    cell = Cell(Arm("central", "polarity"), 0)
    assert Estimator(study.study, study.results(), "cpu").of(cell).seconds == 23.0 * 240 * 250
    study.arm("central_none", DICE)  # 200 epochs of 250 steps in a minute
    found = Estimator(study.study, study.results(), "cpu").of(cell)
    assert found.seconds == pytest.approx(60.0 * 240 / 200)
    assert found.basis.startswith("by the steps of plain nnU-Net, central")
