"""What is read from an event log: the run, its rounds, its sites."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from nnunet_fedharm.errors import FederationError
from nnunet_fedharm.federation.durable import write_json
from nnunet_fedharm.federation.watch.reading import read_run, server_root
from nnunet_fedharm.federation.watch.view import RunView
from tests.federation.watching import Log, at


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path)


def states(run: RunView) -> dict[str, str]:
    return {site.site: site.state for site in run.sites}


def test_a_run_in_a_round_says_who_answered_who_trains_and_when_it_will_end(log: Log) -> None:
    log.begin()
    log.whole_round(10, 1)
    log.whole_round(40, 2)
    log.round_start(60, 3)
    log.trained(70, "A", 3)
    run = read_run(log.folder, now=at(75))
    assert (run.state, run.where()) == ("running", "segmenter round 3 of 10")
    assert states(run) == {"A": "took part", "B": "training", "C": "training"}
    assert run.expected_end == at(75 + 8 * 20 - 15)
    assert run.bytes_down == 6000
    last = run.latest("segmenter")
    assert last is not None
    assert last.worst_site() == ("B", 0.6)
    assert run.sites[0].last_seen == at(70)
    assert not run.is_bad()


def test_a_site_that_takes_much_longer_than_usual_is_late(log: Log) -> None:
    log.begin()
    log.whole_round(10, 1)
    log.round_start(40, 2)
    log.trained(50, "A", 2)
    assert states(read_run(log.folder, now=at(65)))["B"] == "training"
    run = read_run(log.folder, now=at(80))
    assert states(run) == {"A": "took part", "B": "late", "C": "late"}
    assert run.expected_end == at(80 + 8 * 20), "those after it still take their time"
    assert run.sites[1].detail == "40 s in this round, usually 10 s"


def test_a_site_set_aside_keeps_its_reason_until_it_takes_part_again(log: Log) -> None:
    log.begin()
    log.round_start(10, 1)
    log.trained(20, "A", 1)
    log.trained(21, "B", 1)
    log.write(22, "site_set_aside", site="B", phase="segmenter", round=1, reason="the change is too large")
    log.write(22, "site_lost", site="C")
    log.round_end(23, 1, sites="A")
    run = read_run(log.folder, now=at(25))
    assert states(run) == {"A": "took part", "B": "set aside", "C": "away"}
    assert run.rounds[0].set_aside == {"B": "the change is too large"}
    assert list(run.rounds[0].sites) == ["A"]
    assert (run.sites[1].rounds, run.sites[1].set_aside) == (0, 1)
    log.whole_round(30, 2, sites="AB")
    assert states(read_run(log.folder, now=at(51)))["B"] == "took part"


def test_failed_and_resumed_runs_are_one_run_and_a_run_turned_away_is_none(log: Log) -> None:
    log.begin(run_id="old-1")
    log.whole_round(5, 1)
    log.begin(30)
    log.whole_round(35, 1)
    log.write(60, "failed", error="Only 1 of 2 needed sites are connected.")
    run = read_run(log.folder, now=at(61))
    assert (run.state, run.reason) == ("failed", "Only 1 of 2 needed sites are connected.")
    assert run.is_bad()
    assert run.expected_end is None
    log.begin(100, done=1, sites="")
    assert set(states(read_run(log.folder, now=at(101))).values()) == {"not there yet"}
    log.begin(100, done=1)
    log.whole_round(110, 2)
    log.write(131, "failed", error="Another run is using the folder.", other_run=True)
    run = read_run(log.folder, now=at(132))
    assert run.state == "running"
    assert [entry.number for entry in run.rounds] == [1, 2]
    assert run.started == at(30)


def test_a_server_without_a_process_has_stopped_and_a_silent_one_has_stalled(log: Log) -> None:
    log.begin()
    log.whole_round(10, 1)
    lock = log.path.parent / "server.lock"
    lock.touch()
    run = read_run(log.folder, now=at(40))
    assert run.state == "stopped"
    assert "no complete round is lost" in run.reason
    with lock.open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert read_run(log.folder, now=at(40)).state == "running"
        assert read_run(log.folder, now=at(500)).state == "stalled"
        assert read_run(log.folder, now=at(500), stalled_after_s=1000).state == "running"


def test_rounds_whose_last_event_a_crash_swallowed_come_from_the_state(log: Log) -> None:
    log.begin()
    log.whole_round(10, 1)
    log.round_start(40, 2)
    entry = {
        "phase": "segmenter",
        "round": 2,
        "seconds": 20.0,
        "dice": 0.75,
        "bytes_down": 7,
        "bytes_up": 8,
        "sites": ["A"],
    }
    config = {"segmenter_rounds": 2, "harmonizer_rounds": 0, "sites": "A,B,C", "epsilon": 3.0}
    write_json(log.path.parent / "aa-1" / "state.json", {"config": config, "history": [entry]})
    run = read_run(log.folder, now=at(70))
    assert run.rounds[1].metrics == {"dice": 0.75}
    assert list(run.rounds[1].sites) == ["A"]
    assert run.epsilon_budget == 3.0
    assert run.expected_end is None, "no round is left"


def test_a_finished_run_names_sites_without_its_model(log: Log) -> None:
    log.begin()
    log.whole_round(10, 1)
    log.write(40, "site_finished", site="A")
    log.write(41, "finished", results="/results", sites_without_model=["C"])
    run = read_run(log.folder, now=at(9999))
    assert run.state == "finished"
    assert states(run) == {"A": "holds the final model", "B": "done", "C": "without the final model"}


def test_events_of_a_later_release_and_odd_values_harm_nothing(log: Log) -> None:
    log.begin()
    log.write(5, "something_new", site=7)
    log.write(6, "round_start", phase="segmenter", round=None, rounds="many")
    log.write(7, "site_trained", site="A", phase="segmenter", round=1, metrics=None)
    with log.path.open("a") as stream:
        stream.write('{"event": "round_end", "time": "yesterday", "phase": "segmenter", "round": 1}\n')
    assert read_run(log.folder, now=at(8)).state == "running"


def test_a_folder_without_a_log_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(FederationError, match=r"no run has begun there.*--root"):
        server_root(tmp_path, None)
    log = Log(tmp_path)
    log.write(0, "warning", text="x")
    assert server_root(None, tmp_path) == log.folder, "the folder of `server init` is understood"
