"""The same `server run` resumes a stopped run, also where sites were removed or registered since it began."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from nnunet_fedharm.errors import SetupError
from nnunet_fedharm.federation.config import FederateConfig
from nnunet_fedharm.federation.deploy import server as module
from nnunet_fedharm.federation.deploy.control import Operator
from nnunet_fedharm.federation.deploy.server_folder import ServerFolder
from nnunet_fedharm.federation.report.config import SiteReportConfig
from nnunet_fedharm.federation.state import new_state, save_state

CONFIG = FederateConfig(dataset="1", segmenter_rounds=5)


@dataclass(frozen=True)
class Door(Operator):
    """The operator's door of an idle SuperLink, which keeps what is submitted."""

    client: object = None
    submitted: list[Mapping[str, Any]] = field(default_factory=list)

    def active_runs(self) -> dict[int, str]:
        return {}

    def start_run(self, app_sha256: str, run_config: Mapping[str, Any]) -> int:
        self.submitted.append(run_config)
        return len(self.submitted)


class Desk:
    """The coordinator's: registers, removes, and asks for runs."""

    def __init__(self, server: ServerFolder, monkeypatch: pytest.MonkeyPatch) -> None:
        self.server, self.door = server, Door()
        monkeypatch.setattr(module, "operator", lambda folder: nullcontext(self.door))

    def register(self, *sites: str) -> None:
        for site in sites:
            (self.server.node_keys / f"{site}.pub").write_text("a key\n")

    def remove(self, site: str) -> None:
        self.server.shut_out_key(site)

    def stopped(self, sites: str, *, age_s: float = 0.0, plans: bool = True, finished: str = "") -> str:
        """State of a run that was stopped, as its server leaves it; returns the run's fingerprint."""
        config = replace(CONFIG, sites=sites)
        state = new_state(config.fingerprint(), config.identity())
        state = replace(
            state, plans={"plans_name": "x"} if plans else {}, finished_sites=[*filter(None, finished.split(","))]
        )
        folder = self.server.results / "fedharm" / state.run_id
        save_state(folder, state, None)
        time = (folder / "state.json").stat().st_mtime - age_s
        os.utime(folder / "state.json", (time, time))
        return config.fingerprint()

    def run(self, config: FederateConfig | SiteReportConfig = CONFIG) -> tuple[str, list[str]]:
        """Ask for a run: its fingerprint as the server app will see it, and what was said about sites."""
        said: list[str] = []
        module.run(self.server, config, detach=True, show=said.append)
        kind = type(config)
        own = [line for line in said if "registered any more" in line or "registered since" in line]
        return kind.from_run_config(self.door.submitted[-1]).fingerprint(), own


@pytest.fixture
def desk(server: ServerFolder, monkeypatch: pytest.MonkeyPatch) -> Desk:
    return Desk(server, monkeypatch)


@pytest.mark.parametrize("named", ["", "A,B,C"])
def test_a_run_whose_member_was_removed_is_resumed_by_the_same_command(desk: Desk, named: str) -> None:
    desk.register("A", "B", "C")
    run = desk.stopped("A,B,C")
    assert desk.run(replace(CONFIG, sites=named)) == (run, [])
    desk.remove("B")
    again, said = desk.run(replace(CONFIG, sites=named, quorum=2))
    assert again == run
    assert [line.split(":")[0] for line in said] == ["B is not registered any more"]


def test_a_site_that_is_registered_while_a_run_is_stopped_belongs_to_the_next_one(desk: Desk) -> None:
    desk.register("A", "B", "D")
    run = desk.stopped("A,B")
    again, said = desk.run()
    assert again == run
    assert [line.split(":")[0] for line in said] == ["D is registered since"]
    everybody = replace(CONFIG, sites="A,B,D")
    assert desk.run(everybody) == (everybody.fingerprint(), [])
    assert desk.run(replace(CONFIG, restart=True)) == (everybody.fingerprint(), [])
    assert desk.run(replace(CONFIG, seed=1))[1] == [], "another configuration is another run"


def test_a_run_that_has_ended_is_not_resumed_with_former_members(desk: Desk) -> None:
    desk.register("A", "B", "D")
    run = desk.stopped("A,B", finished="A")
    assert desk.run()[0] == run, "B has not got the model yet"
    desk.stopped("A,B", finished="A,B")
    everybody = replace(CONFIG, sites="A,B,D").fingerprint()
    assert desk.run() == (everybody, [])
    desk.stopped("A,B,C", age_s=60)
    assert desk.run() == (everybody, []), "only the last run is meant"


def test_a_run_without_plans_needs_all_its_sites(desk: Desk) -> None:
    desk.register("A", "B", "C")
    run = desk.stopped("A,B,C", plans=False)
    assert desk.run() == (run, [])
    desk.remove("B")
    again, said = desk.run()
    assert again == replace(CONFIG, sites="A,C").fingerprint()
    assert said[0].endswith("was stopped before it had plans, and B is not registered any more: a new run.")
    with pytest.raises(SetupError, match="B is not registered"):
        desk.run(replace(CONFIG, sites="A,B,C"))


def test_a_damaged_state_is_no_run_and_a_report_is_for_whom_is_registered(desk: Desk) -> None:
    desk.register("A", "C")
    desk.stopped("A,B,C")
    report = SiteReportConfig(dataset="1")
    desk.run(report)
    assert desk.door.submitted[-1]["sites"] == "A,C"
    for path in Path(desk.server.results / "fedharm").glob("*/state.json"):
        path.write_text("half a fi")
    assert desk.run()[0] == replace(CONFIG, sites="A,C").fingerprint()
