"""A study: from its file to its four answers, cells by choice and side by side, and a start of public weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.docs.reading import TINY_STUDY, edit_study, follow, lines_with, run, shell

pytestmark = pytest.mark.long

STUDY = "nnunet-fedharm study"
WHOLE = (
    f"{STUDY} init study1 -d 910 --reference A --labelled-sites A -c 2d --quick",
    f"{STUDY} prepare study1",
    f"{STUDY} run study1 --dry-run",
    f"{STUDY} run study1",
    f"{STUDY} report study1",
)
SITES = (
    WHOLE[0],
    "nnunet-fedharm sites report -d 910 -o study1/site-report",
    "nnunet-fedharm sites report -d Dataset910_HippocampusSites -o study1/site-report",
)
STUDY_PAGE = "docs/how-to/study.md"
SOME, SIDE_BY_SIDE = (line for line in lines_with(STUDY_PAGE, "--only") if "--parallel" in line)
WEIGHTS = tuple(lines_with(STUDY_PAGE, "nnUNetStudyPlans"))
RUN = (*WHOLE, *SITES, SOME, SIDE_BY_SIDE, *WEIGHTS)
SMALL = {
    **TINY_STUDY,
    "seeds": "[0]",
    "harmonizers": '["polarity"]',
    "baselines": "[]",
    "oracle": "false",
}
"""A cell of each kind: plain nnU-Net and one harmonizer, central and federated."""


def test_a_study_from_its_file_to_its_four_answers(hospitals: Path, folder: Path) -> None:
    """As the tutorial says it, with one cell of each kind and two steps in each."""
    pytest.importorskip("radiomics", reason="pyradiomics is not installed")
    follow(WHOLE, after={WHOLE[0]: lambda: edit_study("study1", {**SMALL, "epsilons": "[8.0]"})})
    answers = json.loads((folder / "study1" / "report" / "study.json").read_text())["answers"]
    assert len(answers) == 4
    assert all(answer["measured"] for answer in answers), "all four questions are answered"


def test_the_sites_of_a_study_are_compared_by_hand_where_the_study_looks(hospitals: Path, folder: Path) -> None:
    pytest.importorskip("radiomics", reason="pyradiomics is not installed")
    follow(SITES)
    report = folder / "study1" / "site-report"
    assert {"report.html", "report.json", "features.csv"} <= {path.name for path in report.iterdir()}


def finished(study: Path) -> set[str]:
    """Cells with a result."""
    return {path.parent.name for path in study.glob("cells/*/metrics.json")}


def test_some_cells_of_a_study_run_first_and_the_others_side_by_side(hospitals: Path, folder: Path) -> None:
    """The numbers of GPUs go into the cells' environment; the cells themselves take the CPU, as MORE says."""
    follow(WHOLE[:1])
    edit_study("study1", {**SMALL, "site_report_cases": "0"})
    said = run(SOME)
    chosen = {"central_polarity_seed-0", "federated_polarity_seed-0"}
    assert finished(folder / "study1") == chosen
    assert said.index("federated_polarity_seed-0 begins") < said.index("finished after"), "both at once"
    said = run(SIDE_BY_SIDE)
    assert finished(folder / "study1") == chosen | {"central_none_seed-0", "federated_none_seed-0"}
    assert "polarity" not in said, "what is finished is not run again"


def test_a_study_starts_from_weights_of_public_data_that_stock_nnu_net_trained(
    hospitals: Path, folder: Path, make_raw_dataset: Callable[..., Path]
) -> None:
    """The page's block in one shell; dataset 911 is public, and the control starts from its model."""
    make_raw_dataset(folder / "nnUNet_raw", name="Dataset911_Public", n_labelled=3, shape=(16, 16, 16), seed=9)
    follow(WHOLE[:1])
    edit_study("study1", {**SMALL, "modes": '["central"]', "site_report_cases": "0", "batch_size": "2"})
    follow(WHOLE[1:2])
    results = "nnUNet_results/Dataset911_Public/nnUNetTrainer_1epoch__nnUNetStudyPlans__2d"
    edit_study("study1", {"start_from": f'"../{results}"'})
    shell("\n".join([*WEIGHTS, f"{STUDY} run study1 --cell central_none_seed-0"]))
    cases = json.loads((folder / "study1" / "cells" / "central_none_seed-0" / "metrics.json").read_text())["cases"]
    assert {case["site"] for case in cases.values()} == {*"ABCD"}
    dice = [label["dice"] for case in cases.values() for label in case["labels"].values()]
    assert min(dice) > 0.5, "two steps from random weights segment nothing (0.97 from these)"
