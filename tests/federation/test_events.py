"""The server's event log after crashes and full disks."""

from __future__ import annotations

from pathlib import Path

from nnunet_fedharm.federation.events import EventLog, read_events


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
