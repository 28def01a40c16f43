"""The server's event log after crashes and full disks."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from nnunet_fedharm.errors import CheckpointError, FederationError
from nnunet_fedharm.federation import server_root
from nnunet_fedharm.federation.config import FederateConfig
from nnunet_fedharm.federation.events import EventLog, read_events
from nnunet_fedharm.federation.server_root import locked_server


def test_half_a_line_left_by_a_crash_swallows_no_later_event(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.write("started", run_id="a")
    with log.path.open("a") as stream:
        stream.write('{"time": "2026-01-01T00:00:00+00:00", "event": "round_e')  # the power goes here
    events, offset = read_events(log.path)
    assert [event["event"] for event in events] == ["started"]
    log.write("started", run_id="b")
    later, end = read_events(log.path, offset)
    assert [event["run_id"] for event in later] == ["b"]
    assert end == log.path.stat().st_size


def test_lines_that_are_no_event_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'\x00\x00\n[1]\n{"time": "x"}\n\xff\n{"event": "finished"}\n')
    assert read_events(path)[0] == [{"event": "finished"}]


def test_a_full_disk_anywhere_is_told_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no complete round is lost"), locked_server(config(tmp_path)):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert "is full. Free space" in read_events(tmp_path / "fedharm" / "events.jsonl")[0][-1]["error"]


def test_a_run_that_is_turned_away_is_not_the_end_of_the_one_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_root, "LOCK_WAIT_S", 0.01)
    with locked_server(config(tmp_path)) as (_, log):
        with pytest.raises(FederationError, match="Another run is using"), locked_server(config(tmp_path)):
            pass
        with pytest.raises(FederationError, match="mine"), locked_server(config(tmp_path / "other")):
            raise FederationError("mine")
    assert read_events(log.path)[0][-1]["other_run"] is True
    assert "other_run" not in read_events(tmp_path / "other" / "fedharm" / "events.jsonl")[0][-1]


def config(folder: Path) -> FederateConfig:
    return FederateConfig(server_root=str(folder), sites="A,B", dataset="1")
