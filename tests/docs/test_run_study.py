"""A study: the tutorial from its file to its four answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.docs.reading import follow

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
RUN = (*WHOLE, *SITES)
SMALL = {
    "harmonizer_epochs = 10": "harmonizer_epochs = 1",
    "segmenter_epochs = 16": "segmenter_epochs = 1",
    "iterations_per_epoch = 40": "iterations_per_epoch = 2",
    "base_features = 8": "base_features = 4",
    "max_features = 64": "max_features = 8",
    "seeds = [0, 1, 2]": "seeds = [0]",
    'harmonizers = ["polarity", "diffusion"]': 'harmonizers = ["polarity"]',
    'baselines = ["no-augmentation", "augment"]': "baselines = []",
    "oracle = true": "oracle = false",
}


def edit(changes: dict[str, str]) -> None:
    file = Path("study1", "study.toml")
    text = file.read_text()
    for before, after in changes.items():
        assert f"\n{before}\n" in text, before
        text = text.replace(f"\n{before}\n", f"\n{after}\n")
    file.write_text(text)


def test_a_study_from_its_file_to_its_four_answers(hospitals: Path, folder: Path) -> None:
    """As the tutorial says it, with one cell of each kind and two steps in each."""
    pytest.importorskip("radiomics", reason="pyradiomics is not installed")
    follow(WHOLE, after={WHOLE[0]: lambda: edit({**SMALL, "epsilons = []": "epsilons = [8.0]"})})
    answers = json.loads((folder / "study1" / "report" / "study.json").read_text())["answers"]
    assert len(answers) == 4
    assert all(answer["measured"] for answer in answers), "all four questions are answered"


def test_the_sites_of_a_study_are_compared_by_hand_where_the_study_looks(hospitals: Path, folder: Path) -> None:
    pytest.importorskip("radiomics", reason="pyradiomics is not installed")
    follow(SITES)
    report = folder / "study1" / "site-report"
    assert {"report.html", "report.json", "features.csv"} <= {path.name for path in report.iterdir()}
