"""What a cell writes down of itself, and what is said of one that another process runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nnunet_fedharm.cli import main
from nnunet_fedharm.errors import DataError
from nnunet_fedharm.federation.durable import file_lock
from nnunet_fedharm.study import cell as study_cell
from nnunet_fedharm.study import runner
from nnunet_fedharm.study.data import StudyData
from nnunet_fedharm.study.estimate import Estimate, Estimator
from nnunet_fedharm.study.matrix import Cell, cells_of
from nnunet_fedharm.study.runner import LOCK, LOCKED, Failed, run_missing
from tests.study.cells import Study


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(tmp_path)


def begin(study: Study, commit: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A start of the first cell whose training fails, unless it is trained already; what environment.json says then."""

    def fails(*_: object, **__: object) -> None:
        raise DataError("stopped here")

    monkeypatch.setattr(StudyData, "prepare", lambda _: None)
    for name in ("train", "read_trained"):
        monkeypatch.setattr(study_cell, name, fails)
    monkeypatch.setattr(study_cell, "_git_hash", lambda: commit)
    cell = cells_of(study.study)[0]
    with pytest.raises(DataError, match="stopped here"):
        study_cell.run_cell(study.study, cell, device="cpu", show=lambda _: None)
    content: dict[str, Any] = json.loads((folder_of(study, cell) / "environment.json").read_text())
    return content


def folder_of(study: Study, cell: Cell) -> Path:
    return study.folder / "cells" / cell.name


def test_a_cell_trained_at_one_commit_and_scored_at_another_tells_both(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = begin(study, "aaa", monkeypatch)
    assert (first["git"], first["earlier"]) == ("aaa", [])
    assert "scored" not in first
    resumed = begin(study, "bbb", monkeypatch)
    assert (resumed["git"], [item["git"] for item in resumed["earlier"]]) == ("bbb", ["aaa"])
    (folder_of(study, cells_of(study.study)[0]) / "trained.json").write_text("{}")
    scored = begin(study, "ccc", monkeypatch)
    assert (scored["git"], scored["scored"]["git"], scored["earlier"]) == ("bbb", "ccc", resumed["earlier"])
    assert scored["started"] == first["started"]
    assert "scored" not in begin(study, "bbb", monkeypatch)


def test_a_cell_keeps_the_study_file_that_it_was_begun_with(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(study, "aaa", monkeypatch)
    file = study.folder / "study.toml"
    begun = file.read_text()
    copy = folder_of(study, cells_of(study.study)[0]) / "study.toml"
    assert copy.read_text() == begun
    file.write_text(begun + "[report]\nmargin = 0.1\n")
    begin(study, "aaa", monkeypatch)
    assert copy.read_text() == begun


def test_a_cell_that_another_process_runs_is_not_called_finished(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cell = cells_of(study.study)[0]
    with file_lock(folder_of(study, cell) / LOCK):
        command = ["study", "run", str(study.folder), "--cell", cell.name, "--device", "cpu"]
        assert main(command) == LOCKED
    shown = capsys.readouterr()
    assert "finished" not in shown.out
    assert f"Another process runs the cell {cell.name}." in shown.err

    stands_for_it = tmp_path / "program"
    stands_for_it.write_text(f"#!/bin/sh\nexit {LOCKED}\n")
    stands_for_it.chmod(0o755)
    monkeypatch.setattr(runner, "program", lambda _: str(stands_for_it))
    said: list[str] = []
    assert run_missing(study.study, [cell], device="cpu", devices=[], parallel=1, show=said.append) == []
    assert said == [f"{cell.name} begins", f"{cell.name} is left to the other process that runs it; 0 waiting"]


def test_an_unknown_time_is_not_counted_as_none(
    study: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["study", "run", str(study.folder), "--dry-run", "--device", "cpu"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "hours" not in shown
    assert (
        f"How long they take is not known before the data are prepared: nnunet-fedharm study prepare {study.folder}"
        in shown
    )
    study.arm("central_none", {"A": 0.85, "B": 0.5}, seeds=[0])
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "hours for the 29 whose time is known, with 1 at once" in shown, "by the steps of the control"
    assert "How long 12 of them take is not known" in shown, "private steps take as long as the planned batch is small"
    monkeypatch.setattr(Estimator, "of", lambda *_: Estimate(3600.0, "guessed"))
    assert main([*command, "--gpus", "0", "1"]) == 0
    shown = capsys.readouterr().out
    assert "About 20.5 hours, with 2 at once" in shown
    assert "not known" not in shown


@pytest.mark.parametrize(
    ("words", "parallel"),
    [
        ([], 1),
        (["--gpus", "0", "1", "2"], 3),
        (["--gpus", "0", "1", "2", "--parallel", "6"], 6),
        (["--parallel", "2"], 2),
    ],
)
def test_as_many_cells_run_at_once_as_gpus_are_named(
    study: Study, monkeypatch: pytest.MonkeyPatch, words: list[str], parallel: int
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(runner, "run_missing", lambda *_, parallel, **__: asked.append(parallel) or [])
    assert main(["study", "run", str(study.folder), "--device", "cpu", *words]) == 0
    assert asked == [parallel]


def test_who_has_a_failed_cell_is_told_where_it_lies_and_how_to_begin_it_anew(
    study: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = cells_of(study.study)[:2]
    monkeypatch.setattr(runner, "run_missing", lambda *_, **__: [Failed(cell, "why") for cell in cells])
    assert main(["study", "run", str(study.folder), "--device", "cpu"]) == 1
    shown = capsys.readouterr().out
    assert shown.count("why") == 2
    assert all(f"To begin it anew, remove {folder_of(study, cell)}\n" in shown for cell in cells)


def test_init_names_prepare_before_the_dry_run(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", "init", str(tmp_path / "new"), "-d", str(study.study.raw_dataset), "--quick"]) == 0
    shown = capsys.readouterr().out
    assert shown.index("study prepare") < shown.index("study run")
