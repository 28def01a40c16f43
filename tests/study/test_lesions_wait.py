"""Lesions are counted whichever of control and harmonizer is finished first, and never left out without a word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nnunet_fedharm.cli import main
from nnunet_fedharm.errors import DataError
from nnunet_fedharm.federation.durable import file_lock
from nnunet_fedharm.study import runner
from nnunet_fedharm.study.data import StudyData
from nnunet_fedharm.study.matrix import Cell
from nnunet_fedharm.study.report.page import limits
from nnunet_fedharm.study.runner import LOCK, count_waiting_lesions
from nnunet_fedharm.study.statistics import analyse
from tests.study.cells import Study

REPORT = 'baselines = ["augment"]\n[report]\nlesion_labels = [1]\n'
UNJUDGED = {"sites": {}, "features": {}, "lesions": None, "conventions": {"region_values": [1]}}


class Measured:
    """Stands for `measure_quality`: writes lesions."""

    def __init__(self) -> None:
        self.cells: list[str] = []

    def __call__(self, data: StudyData, cell: Cell, *, device: str) -> None:
        self.cells.append(cell.name)
        file = data.study.folder / "cells" / cell.name / "quality.json"
        file.write_text(json.dumps({**UNJUDGED, "lesions": {"B": {"n_lesions": 9}}}))


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Harmonizers that were finished before the control."""
    study = Study(tmp_path, more=REPORT)
    for name in ("central_polarity", "federated_polarity"):
        study.arm(name, {"A": 0.85, "B": 0.7}, quality=UNJUDGED)
    return study


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Measured:
    measured = Measured()
    monkeypatch.setattr(runner, "measure_quality", measured)
    return measured


def test_cells_that_were_finished_before_the_control_are_measured_again_once_it_is(
    study: Study, measured: Measured
) -> None:
    said: list[str] = []
    count_waiting_lesions(study.study, device="cpu", show=said.append)
    assert not measured.cells
    assert said == [
        f"The lesions of {name}_seed-0 are counted when central_none_seed-0, which judges them, has its result."
        for name in ("central_polarity", "federated_polarity")
    ]
    study.arm("central_none", {"A": 0.85, "B": 0.5})
    for _ in range(2):
        count_waiting_lesions(study.study, device="cpu", show=said.append)
    assert measured.cells == ["central_polarity_seed-0", "federated_polarity_seed-0"]
    assert said[2] == "Lesions in the harmonized volumes of central_polarity_seed-0 are counted."
    text = (study.folder / "study.toml").read_text()
    (study.folder / "study.toml").write_text(text.replace("lesion_labels = [1]", "lesion_labels = [2]"))
    count_waiting_lesions(study.study, device="cpu", show=said.append)
    assert len(measured.cells) == 4, "other labels are other lesions"


def test_every_cell_run_and_report_look_for_lesions_that_wait(
    study: Study, measured: Measured, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def finish(*_: object, **__: object) -> bool:
        study.arm("central_none", {"A": 0.85, "B": 0.5})
        return True

    monkeypatch.setattr(runner, "run_here", finish)
    assert main(["study", "run", str(study.folder), "--cell", "central_none_seed-0", "--device", "cpu"]) == 0
    assert len(measured.cells) == 2
    monkeypatch.setattr(runner, "run_missing", lambda *_, **__: [])
    for command in (["run", "--device", "cpu"], ["report", "-o", str(study.folder / "report")]):
        file = study.folder / "cells" / "central_polarity_seed-0" / "quality.json"
        file.write_text(json.dumps(UNJUDGED))
        assert main(["study", command[0], str(study.folder), *command[1:]]) == 0
        assert json.loads(file.read_text())["lesions"]
        assert "Lesions in the harmonized volumes of central_polarity_seed-0 are counted" in capsys.readouterr().out


def test_a_cell_that_another_process_measures_is_left_to_it_and_a_failure_is_told(
    study: Study, measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    study.arm("central_none", {"A": 0.85, "B": 0.5})
    said: list[str] = []
    with file_lock(study.folder / "cells" / "central_polarity_seed-0" / LOCK):
        count_waiting_lesions(study.study, device="cpu", show=said.append)
    assert measured.cells == ["federated_polarity_seed-0"]

    def broken(*_: object, **__: object) -> None:
        raise DataError("x.nii.gz is missing.")

    monkeypatch.setattr(runner, "measure_quality", broken)
    count_waiting_lesions(study.study, device="cpu", show=said.append)
    assert said[-1] == "The lesions of central_polarity_seed-0 were not counted: x.nii.gz is missing."


def test_the_report_says_whose_lesions_were_not_counted(study: Study) -> None:
    study.arm("central_none", {"A": 0.85, "B": 0.5}, seeds=[1])
    said = " ".join(limits(analyse(study.results(), resamples=50)))
    assert "Lesions were not counted in the harmonized volumes of polarity, central and polarity, federated" in said
    assert "(central_none_seed-0), which judges them, has no result" in said
    study.arm("central_none", {"A": 0.85, "B": 0.5}, seeds=[0])
    assert "`nnunet-fedharm study run` counts them" in " ".join(limits(analyse(study.results(), resamples=50)))
