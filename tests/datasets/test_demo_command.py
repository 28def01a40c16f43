"""The demo command: its small parts here, the whole of it in `test_the_quick_demo_runs_end_to_end`."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from pathlib import Path

import pytest

from nnunet_fedharm.commands import demo
from nnunet_fedharm.datasets.demo import DATASET_NAME, HOSPITALS, DemoSize
from nnunet_fedharm.errors import SetupError
from nnunet_fedharm.nnunet_root import NnunetRoot

TINY = demo.DemoSettings(size=DemoSize(training=2, held_out=1, spacing_mm=5.0))


def test_data_that_is_there_is_not_made_again_and_other_data_is(tmp_path: Path) -> None:
    image = tmp_path / "sites" / "alder" / "nnUNet_raw" / DATASET_NAME / "imagesTr" / "alder_000_0000.nii.gz"
    demo._make_data(tmp_path, TINY, seed=0)
    first = image.stat().st_mtime_ns
    demo._make_data(tmp_path, TINY, seed=0)
    assert image.stat().st_mtime_ns == first
    demo._make_data(tmp_path, TINY, seed=1)
    assert image.stat().st_mtime_ns != first


def test_the_rounds_of_a_resumed_run_are_joined_and_other_runs_left_out(tmp_path: Path) -> None:
    events = [
        {"event": "started", "run_id": "none-1"},
        {"event": "round_end", "phase": "segmenter", "round": 1, "dice": 0.1},
        {"event": "started", "run_id": "curve-1"},
        {"event": "round_end", "phase": "harmonizer", "round": 1, "dice": None},
        {"event": "round_end", "phase": "segmenter", "round": 1, "dice": 0.2},
        {"event": "started", "run_id": "curve-1"},
        {"event": "round_end", "phase": "segmenter", "round": 1, "dice": 0.3},
    ]
    log = tmp_path / "server" / "fedharm" / "events.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text("".join(json.dumps(event) + "\n" for event in events))
    assert [(event["phase"], event["dice"]) for event in demo._events_of_last_run(tmp_path)] == [
        ("harmonizer", None),
        ("segmenter", 0.3),
    ]


def test_a_failed_prediction_names_its_log(tmp_path: Path) -> None:
    NnunetRoot(tmp_path / "sites" / "alder").create()
    with pytest.raises(SetupError, match=r"predict_none_alder\.log says why"):
        demo._predict(tmp_path, "alder", "none")
    assert (tmp_path / "logs" / "predict_none_alder.log").read_text()


@pytest.mark.long
def test_the_quick_demo_runs_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = ArgumentParser()
    demo.add_arguments(parser)
    assert demo.run(parser.parse_args(["--quick", "-o", str(tmp_path)])) == 0
    assert str(tmp_path / "demo.html") in capsys.readouterr().out
    page = (tmp_path / "demo.html").read_text()
    assert all(site in page for site in HOSPITALS)
    for kind in demo.KINDS:
        metrics = json.loads((tmp_path / f"metrics_{kind}.json").read_text())
        assert set(metrics["sites"]) == {*HOSPITALS, "all"}
    for site in HOSPITALS:
        assert len(list((tmp_path / "harmonized" / site).glob("*.nii.gz"))) == 1
