"""Following a run of a consortium by its event log, where another run is turned away."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import httpx
import pytest

from nnunet_fedharm.errors import FederationError, SetupError
from nnunet_fedharm.federation.config import FederateConfig
from nnunet_fedharm.federation.deploy import server as module
from nnunet_fedharm.federation.deploy.control import Operator, operator
from nnunet_fedharm.federation.deploy.server import follow
from nnunet_fedharm.federation.deploy.server_folder import ServerFolder
from nnunet_fedharm.federation.deploy.site_folder import SiteFolder
from nnunet_fedharm.federation.durable import file_lock
from nnunet_fedharm.federation.events import EventLog
from tests.federation.deploy.conftest import SITES


@dataclass(frozen=True)
class Door(Operator):
    """The operator's door of a SuperLink that knows these runs."""

    client: object = None
    runs: dict[int, str] = field(default_factory=dict)

    def active_runs(self) -> dict[int, str]:
        return self.runs


@pytest.fixture
def log(server: ServerFolder, monkeypatch: pytest.MonkeyPatch) -> EventLog:
    for name in ("_ASK_S", "_GRACE_S", "_POLL_S"):
        monkeypatch.setattr(module, name, 0.01)
    return EventLog(server.results / "fedharm" / "events.jsonl")


def turn_away(log: EventLog) -> None:
    log.write("failed", error="Another run is using the folder.", other_run=True)


def test_a_run_that_goes_on_is_followed_to_its_own_end(server: ServerFolder, log: EventLog) -> None:
    turn_away(log)
    log.write("finished", results="model", sites_without_model=[])
    last = follow(server, Door(runs={7: "running"}), 7, log.path, 0, lambda line: None)
    assert last["event"] == "finished"


def test_a_run_that_was_turned_away_ends_with_its_sentence_when_flower_says_so(
    server: ServerFolder, log: EventLog
) -> None:
    turn_away(log)
    with pytest.raises(FederationError, match="Another run is using the folder"):
        follow(server, Door(runs={8: "running"}), 7, log.path, 0, lambda line: None)


def test_a_run_that_ended_without_a_word_points_to_flowers_log(server: ServerFolder, log: EventLog) -> None:
    log.write("started", run_id="a", resumed=False, rounds_done={})
    with pytest.raises(FederationError, match=r"superexec\.log says why"):
        follow(server, Door(), 7, log.path, 0, lambda line: None)


def test_watching_begins_with_the_run_that_goes_on_not_with_the_former_ones_end(
    server: ServerFolder, log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.write("started", run_id="former", resumed=False, rounds_done={})
    log.write("failed", error="The former run's reason.")
    hour = timedelta(hours=1)
    now, lines = datetime.now(UTC), []

    def show(line: str) -> None:
        lines.append(line)
        if len(lines) == 1:
            log.write("report_started", run_id="now", sites=["A", "B"])
            log.write("reported", results="report.json", sites=["A", "B"])

    monkeypatch.setattr(module, "_TELL_S", 0.02)
    monkeypatch.setattr(module, "operator", lambda folder: nullcontext(Door(runs={7: _stamp(now + hour)})))
    assert module.watch_run(server, show=show)["event"] == "reported"
    assert not [line for line in lines if "former" in line]

    # Its server app has begun: all from there on, whatever it was.
    monkeypatch.setattr(module, "operator", lambda folder: nullcontext(Door(runs={7: _stamp(now - hour)})))
    lines = [""]
    assert module.watch_run(server, show=lines.append)["event"] == "reported"
    assert lines[1] == "site report now on A, B"


def _stamp(time: datetime) -> str:
    """As Flower writes it."""
    return time.isoformat(timespec="seconds").replace("+00:00", "Z")


def test_after_a_crash_a_run_waits_until_flower_knows_that_the_former_one_is_over(
    server: ServerFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_POLL_S", 0.01)
    listed, said = [7, 7, 7], []

    class Recovering(Door):
        def active_runs(self) -> dict[int, str]:
            return {listed.pop(): ""} if listed else {}

    module._wait_for_former_run(server, Recovering(), said.append)
    assert listed == []
    assert [line.split(",")[0] for line in said] == ["Flower lists a run that has no process"]

    # A run with a process is not waited for, nor one that stays.
    with (
        file_lock(server.results / "fedharm" / "server.lock"),
        pytest.raises(FederationError, match="A run is going on here"),
    ):
        module._wait_for_former_run(server, Door(runs={7: ""}), said.append)
    assert len(said) == 1
    monkeypatch.setattr(module, "_FORMER_S", 0.05)
    with pytest.raises(FederationError, match="A run is going on here"):
        module._wait_for_former_run(server, Door(runs={7: ""}), said.append)


def test_expected_sites_that_are_not_registered_are_named_before_a_run(
    server: ServerFolder, join_site: Callable[..., SiteFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    @dataclass(frozen=True)
    class Starting(Door):
        def start_run(self, app_sha256: str, run_config: Mapping[str, object]) -> int:
            said.append(f"submitted for {run_config['sites']}")
            return 7

    monkeypatch.setattr(module, "operator", lambda folder: nullcontext(Starting()))
    monkeypatch.setattr(module, "_sync_if_running", lambda folder: False)
    for number, site in enumerate(SITES):
        module.register_site(server, site, join_site(site).node_key.with_suffix(".pub"))
        assert module.run(server, FederateConfig(dataset="1"), detach=True, show=said.append) == {}
        first = said.pop(0)
        assert (first == "expected but not registered: hospital-south") == (number == 0)
    assert "submitted for hospital-north,hospital-south" in said


def test_whoever_waits_for_flower_is_told_so(
    server: ServerFolder, log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_TELL_S", 0.02)
    lines: list[str] = []

    def show(line: str) -> None:
        lines.append(line)
        if len(lines) == 2:
            log.write("reported", results="report.json", sites=["A", "B"])

    follow(server, Door(runs={7: "pending"}), 7, log.path, 0, show)
    assert lines == ["  waiting for Flower's server app to start (0 s)"] * 2 + ["reported on A, B: report.json"]


def test_a_server_that_is_too_busy_to_answer_does_not_end_the_following(server: ServerFolder, log: EventLog) -> None:
    asked: list[int] = []

    @dataclass(frozen=True)
    class Busy(Operator):
        client: object = None

        def active_runs(self) -> dict[int, str]:
            asked.append(1)
            if len(asked) == 2:
                log.write("finished", results="model", sites_without_model=[])
            raise httpx.ReadTimeout("30 s are over")

    lines: list[str] = []
    last = follow(server, Busy(), 7, log.path, 0, lines.append)
    assert last["event"] == "finished"
    assert "  the server is too busy to say whether the run goes on; asking again" in lines
    with pytest.raises(SetupError, match="did not answer in time: its machine is very busy"), operator(server):
        raise httpx.ReadTimeout("30 s are over")
