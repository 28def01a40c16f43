"""A kept run: what its events say of it, and that `server start` submits it again until it has ended well."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from nnunet_fedharm.errors import CheckpointError, SetupError
from nnunet_fedharm.federation.config import FederateConfig
from nnunet_fedharm.federation.deploy import keeper as keeping
from nnunet_fedharm.federation.deploy import server as module
from nnunet_fedharm.federation.deploy.control import Operator
from nnunet_fedharm.federation.deploy.keeper import Keeper
from nnunet_fedharm.federation.deploy.kept_run import MOST_FAILURES, KeptRun, keep, kept_run, outcome, save
from nnunet_fedharm.federation.deploy.server_folder import ServerFolder
from nnunet_fedharm.federation.durable import file_lock
from nnunet_fedharm.federation.events import EventLog, read_events

CONFIG = FederateConfig(dataset="1", segmenter_rounds=5, sites="A,B")
KEPT = KeptRun({}, 0)
ROUND, FAILED = {"event": "round_end"}, {"event": "failed", "error": "Too few sites."}
FINISHED = {"event": "finished", "results": "model/fold_all", "sites_without_model": []}


@dataclass(frozen=True)
class Door(Operator):
    """The operator's door of a SuperLink, which keeps what is submitted and forgets it at once."""

    client: object = None
    runs: dict[int, str] = field(default_factory=dict)
    submitted: list[Mapping[str, Any]] = field(default_factory=list)

    def active_runs(self) -> dict[int, str]:
        return self.runs

    def start_run(self, app_sha256: str, run_config: Mapping[str, Any]) -> int:
        self.submitted.append(run_config)
        return len(self.submitted)


class Desk:
    """A server with a kept run.

    Attributes:
        said: by `server start`.
        cards: folders whose model card was asked for.
    """

    def __init__(self, server: ServerFolder, monkeypatch: pytest.MonkeyPatch) -> None:
        self.server, self.door, self.log = server, Door(), EventLog(server.results / "fedharm" / "events.jsonl")
        for where in (module, keeping):
            monkeypatch.setattr(where, "operator", lambda folder: nullcontext(self.door))
        monkeypatch.setattr(keeping, "_LOOK_S", 0.0)
        for site in "AB":
            (server.node_keys / f"{site}.pub").write_text("a key\n")
        self.said: list[str] = []
        self.cards: list[Path] = []
        self.keeper = Keeper(server, show=self.said.append, finished=self.cards.append)

    def run(self, config: FederateConfig = CONFIG, *, kept: bool) -> None:
        module.run(self.server, config, detach=True, kept=kept, show=lambda line: None)

    def write(self, *events: Mapping[str, Any]) -> None:
        for event in events:
            self.log.write(**event)

    def look(self, times: int = 2) -> int:
        """Runs that were submitted while it looked: it notices the end, then acts."""
        before = len(self.door.submitted)
        for _ in range(times):
            self.keeper.look()
        return len(self.door.submitted) - before


@pytest.fixture
def desk(server: ServerFolder, monkeypatch: pytest.MonkeyPatch) -> Desk:
    return Desk(server, monkeypatch)


def test_what_was_cut_off_goes_on_at_once_and_what_failed_waits_longer_each_time() -> None:
    assert outcome(KEPT, [], "AB").wait_s == 0
    waits = [outcome(replace(KEPT, failures=count), [FAILED], "AB").wait_s for count in range(MOST_FAILURES)]
    assert waits == [60, 120, 240, 480, 960, 1920, 3600, 3600]
    assert outcome(replace(KEPT, failures=2), [], "AB").wait_s == 240, "a reboot whenever it runs is no accident"
    assert outcome(replace(KEPT, failures=5), [ROUND, FAILED], "AB").failures == 1, "it has come further"
    assert outcome(KEPT, [FAILED], "AB").why == "Too few sites."


def test_only_its_own_end_is_one() -> None:
    assert outcome(KEPT, [ROUND, FINISHED], "AB").event == FINISHED
    assert outcome(KEPT, [{**FAILED, "other_run": True}], "AB").why == ""
    assert outcome(KEPT, [FAILED, {"event": "reported", "results": "report.json"}], "AB").why == "Too few sites."


def test_a_site_without_the_model_is_waited_for_while_it_is_registered() -> None:
    end = {**FINISHED, "sites_without_model": ["B"]}
    assert outcome(KEPT, [ROUND, end], "AB").why.startswith("B had no connection at the end")
    assert outcome(KEPT, [ROUND, end], "A").event == end


def test_a_kept_run_is_resumed_not_begun_anew(desk: Desk) -> None:
    desk.run(replace(CONFIG, restart=True), kept=True)
    assert desk.look() == 1
    first, again = desk.door.submitted
    assert (first["restart"], again["restart"]) == (True, False)
    assert {**first, "restart": False} == again
    assert desk.said[0] == "The kept run is resumed now. It was cut off."


def test_a_run_that_goes_on_is_left_alone(desk: Desk) -> None:
    desk.run(kept=True)
    desk.door.runs[1] = "pending"
    assert desk.look() == 0
    desk.door.runs.clear()
    with file_lock(desk.server.results / "fedharm" / "server.lock", wait_s=0.0):
        assert desk.look() == 0, "its process is there, though Flower has given it up"
    assert desk.look() == 1


def test_a_failed_run_waits_and_is_let_go_where_it_never_gets_anywhere(desk: Desk) -> None:
    desk.run(kept=True)
    desk.write(FAILED)
    assert desk.look() == 0
    assert desk.said == ["The kept run is resumed in 1 min. Too few sites."]
    kept = kept_run(desk.server)
    assert kept is not None
    assert kept.failures == 1
    save(desk.server, replace(kept, failures=MOST_FAILURES, counted=False))
    fresh = Keeper(desk.server, show=desk.said.append)
    fresh.look()
    assert kept_run(desk.server) is None
    assert f"failed {MOST_FAILURES} times" in desk.said[-1]
    assert "Too few sites." in desk.said[-1]


def test_a_run_that_has_ended_well_is_let_go_and_gets_its_card(desk: Desk) -> None:
    desk.run(kept=True)
    desk.write(ROUND, FINISHED)
    assert desk.look() == 0
    assert desk.cards == [Path("model/fold_all")]
    assert kept_run(desk.server) is None
    assert desk.look() == 0


def test_another_run_or_a_stop_lets_go(desk: Desk) -> None:
    desk.run(kept=True)
    desk.run(replace(CONFIG, seed=1), kept=False)
    assert kept_run(desk.server) is None
    desk.run(kept=True)
    assert module.stop_runs(desk.server) == 0
    assert desk.look() == 0


def test_a_run_that_was_taken_up_by_hand_while_it_waited_is_not_submitted_again_at_its_end(desk: Desk) -> None:
    desk.run(kept=True)
    desk.write(FAILED)
    desk.look(1)
    desk.run(kept=True)  # its cause is mended, and nobody waits for the next try
    desk.door.runs[2] = "pending"
    assert desk.look() == 0
    desk.write(ROUND, FINISHED)
    desk.door.runs.clear()
    desk.keeper._next_look = float("-inf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keeping.time, "monotonic", lambda: 1e9)  # long after the try that was due
        assert desk.look() == 0
    assert desk.cards == [Path("model/fold_all")]


def test_a_server_that_is_started_again_while_a_run_waits_counts_its_failure_once(desk: Desk) -> None:
    desk.run(kept=True)
    desk.write(FAILED)
    for _ in range(MOST_FAILURES + 2):
        Keeper(desk.server, show=desk.said.append).look()
    kept = kept_run(desk.server)
    assert kept is not None
    assert kept.failures == 1
    assert set(desk.said) == {"The kept run is resumed in 1 min. Too few sites."}


def test_a_run_that_cannot_be_submitted_is_let_go_though_it_had_come_far(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.run(kept=True)
    desk.write(ROUND)

    def refuse(*_: object) -> None:
        raise SetupError("The SuperLink refused.")

    monkeypatch.setattr(keeping, "submit", refuse)
    clock = iter(range(0, 10**9, 5000))
    monkeypatch.setattr(keeping.time, "monotonic", lambda: float(next(clock)))
    assert desk.look(3 * MOST_FAILURES) == 0
    assert kept_run(desk.server) is None
    assert "kept no more. The last reason: The SuperLink refused." in desk.said[-1]


def test_a_look_never_ends_the_server_and_says_the_same_trouble_once(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.run(kept=True)
    for trouble, words in (
        (PermissionError(13, "Permission denied"), "Permission denied"),
        (KeyError("x"), "KeyError"),
    ):

        def fail(*_: object, trouble: Exception = trouble) -> None:
            raise trouble

        with monkeypatch.context() as patch:
            patch.setattr(keeping, "read_events", fail)
            before = len(desk.said)
            assert desk.look(5) == 0
            assert words in desk.said[-1]
            assert len(desk.said) == before + 1
    assert desk.look() == 1, "it goes on when the trouble is over"


def test_a_model_that_one_site_lacks_has_its_card_and_is_called_no_failure(desk: Desk) -> None:
    desk.run(kept=True)
    desk.write(ROUND, {**FINISHED, "sites_without_model": ["B"]})
    assert desk.look(1) == 0
    assert desk.cards == [Path("model/fold_all")]
    kept = kept_run(desk.server)
    assert kept is not None
    save(desk.server, replace(kept, failures=MOST_FAILURES + 1))
    Keeper(desk.server, show=desk.said.append).look()
    assert kept_run(desk.server) is None
    assert "has ended, and was resumed 8 times" in desk.said[-1]
    assert "B had no connection at the end" in desk.said[-1]


def test_a_run_that_is_refused_leaves_the_kept_one_kept(desk: Desk) -> None:
    desk.run(kept=True)
    with pytest.raises(SetupError):
        desk.run(replace(CONFIG, sites="A,C"), kept=False)
    assert kept_run(desk.server) is not None


def test_a_stop_in_the_middle_of_a_look_is_not_undone_by_it(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.run(kept=True)
    desk.write(FAILED)
    stopping = threading.Thread(target=module.stop_runs, args=[desk.server])

    def read(*given: Any) -> Any:
        stopping.start()
        stopping.join(0.5)  # it stops at once, if nothing keeps it from it
        return read_events(*given)

    monkeypatch.setattr(keeping, "read_events", read)
    assert desk.look(1) == 0
    stopping.join()
    assert kept_run(desk.server) is None


def test_what_cannot_be_done_is_said_and_the_server_goes_on(desk: Desk) -> None:
    keep(desk.server, CONFIG, 0)
    (desk.server.node_keys / "B.pub").unlink()
    assert desk.look() == 0
    assert "B is not registered" in desk.said[-1]
    desk.server.kept_run.write_text("half a fi")
    assert desk.look(1) == 0
    assert "kept-run.json" in desk.said[-1]
    with pytest.raises(CheckpointError):
        kept_run(desk.server)
