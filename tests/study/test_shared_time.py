"""What a cell costs holds what others did for it: seconds of shared planning, preprocessing and adaptations."""

from __future__ import annotations

import json
from pathlib import Path

from nnunet_fedharm.study.matrix import Arm
from nnunet_fedharm.study.new_site import adapt_seconds
from nnunet_fedharm.study.report.build import write_report
from nnunet_fedharm.study.shared_time import central_seconds, federated_seconds, seconds_before_rounds, write_prepared
from tests.study.cells import Study


def event(second: int, name: str) -> dict[str, str]:
    return {"time": f"2026-01-01T00:{second // 60:02d}:{second % 60:02d}.000+00:00", "event": name}


def test_preparation_counts_until_the_first_round_and_not_while_the_run_stood_still() -> None:
    whole = [event(0, "started"), event(30, "step"), event(40, "round_start"), event(50, "started")]
    assert seconds_before_rounds(whole) == 40
    stopped = [event(0, "started"), event(25, "step"), event(600, "started"), event(610, "round_start")]
    assert seconds_before_rounds(stopped) == 35
    assert seconds_before_rounds([]) == 0


def test_later_federated_cells_pay_what_the_first_one_prepared(tmp_path: Path) -> None:
    assert central_seconds(tmp_path, "") is None  # prepared by an earlier release
    write_prepared(tmp_path, pooled_s=100.0, own_s={"B": 20.0})
    assert federated_seconds(tmp_path, 60.0) == 0.0
    assert federated_seconds(tmp_path, 10.0) == 50.0
    assert federated_seconds(tmp_path, 80.0) == 0.0
    assert (central_seconds(tmp_path, ""), central_seconds(tmp_path, "B")) == (100.0, 20.0)
    assert central_seconds(tmp_path, "C") is None


def test_seconds_of_adaptations_are_those_of_all_held_out_sites(tmp_path: Path) -> None:
    study = Study(tmp_path, held_out=["B", "C"], more='modes = ["central"]').study
    arm, cell = Arm("central", "polarity"), tmp_path / "cell"
    (cell / "adapted").mkdir(parents=True)
    assert adapt_seconds(study, arm, cell) is None
    (cell / "adapted" / "clock.json").write_text(json.dumps({"B": 3.0}))
    assert adapt_seconds(study, arm, cell) is None
    (cell / "adapted" / "clock.json").write_text(json.dumps({"B": 3.0, "C": 4.5}))
    assert adapt_seconds(study, arm, cell) == 7.5
    assert adapt_seconds(study, Arm("central", "none"), cell) == 0.0


def test_the_page_has_a_column_for_each_and_none_where_nothing_was_recorded(tmp_path: Path) -> None:
    study = Study(tmp_path, held_out=["C"])
    study.arm("central_none", {"A": 0.85, "B": 0.5, "C": 0.4})
    page = write_report(study.results(), tmp_path / "report", pdf=False).read_text()
    assert "shared before, minutes" not in page
    assert "adaptation, minutes" not in page
    for seed, seconds in ((0, 60.0), (1, 120.0)):
        file = study.folder / "cells" / f"central_none_seed-{seed}" / "cost.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "shared_s": seconds, "adapt_s": 2 * seconds}))
    page = write_report(study.results(), tmp_path / "report", pdf=False).read_text()
    assert "shared before, minutes" in page
    costs = (tmp_path / "report" / "tables" / "costs.csv").read_text().splitlines()
    assert costs[0].endswith(",shared_s,adapt_s")
    assert costs[1].endswith(",90.0,180.0"), "means over the trainings that recorded them"
