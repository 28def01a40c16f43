"""The round loop's own logic on scripted nodes: quorum, deadline, bad replies, leaving and coming back."""

from __future__ import annotations

import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Error, Message

from nnunet_fedharm.errors import CheckpointError, FederationError, SiteMismatchError
from nnunet_fedharm.federation import messages, rounds
from nnunet_fedharm.federation.codec import Weights, decode, encode
from nnunet_fedharm.federation.config import FederateConfig
from nnunet_fedharm.federation.events import EventLog, read_events
from nnunet_fedharm.federation.messages import error_reply, json_hash, reply, unpack
from nnunet_fedharm.federation.ownership import Ownership
from nnunet_fedharm.federation.roster import Roster
from nnunet_fedharm.federation.rounds import RoundLoop
from nnunet_fedharm.federation.state import ServerState, new_state
from nnunet_fedharm.federation.stored_plans import OtherPlansError
from nnunet_fedharm.federation.updates import quorum_of
from tests.federation.local_grid import LocalGrid

START: Weights = {"harmonizer.k": np.zeros(2, np.float32), "segmenter.w": np.zeros(3, np.float32)}
OWNED: Weights = {
    **START,
    "harmonizer.bank": np.zeros((3, 2), np.float32),
    "harmonizer.judge": np.zeros((20, 5), np.float32),
    "harmonizer.rows": np.full((3, 1), 0.5, np.float32),
}
OWNERSHIP = Ownership(
    ("A", "B", "C"),
    rows=frozenset({"harmonizer.rows"}),
    fixed=frozenset({"harmonizer.bank"}),
    reference_only=frozenset({"harmonizer.judge"}),
    reference_sites=frozenset({"A"}),
)


class ScriptedSite:
    """A node that says who it is and adds `step` to every weight it gets; `behave` may replace its training reply."""

    def __init__(
        self, name: str, *, step: float, n_steps: int = 1, labelled: int = 2, labels: tuple[str, ...] = ("ball",)
    ) -> None:
        self.name, self.step, self.n_steps = name, step, n_steps
        self.behave: Any = None
        self.ownership = Ownership()
        self.held = ""
        self.loss: float | None = None
        self.trained: list[tuple[str, int, int]] = []
        self.facts = {
            "site": name,
            "dataset_name": "Dataset001_Blobs",
            "channels": {"0": "MR"},
            "labels": {"background": 0, **{label: index + 1 for index, label in enumerate(labels)}},
            "regions_class_order": None,
            "file_ending": ".nii.gz",
            "n_labelled": labelled,
            "n_unlabelled": 1,
            "versions": {"nnunetv2": "2.8.1"},
            "reader": "SimpleITKIO",
        }

    def __call__(self, message: Message) -> Message | None:
        kind = message.metadata.message_type
        if kind == "query.preflight":
            values = {"site": self.name, "facts": self.facts, "plans_hash": self.held}
            return Message(reply(messages.PREFLIGHT_REPLY, values), reply_to=message)
        if kind == "query.plans":
            self.held = json_hash(unpack(messages.STORE_PLANS, message.content, source="s").values["plans"])
            values = {"site": self.name, "plans_hash": self.held}
            return Message(reply(messages.STORE_PLANS_REPLY, values), reply_to=message)
        if kind == "query.finish":
            return Message(reply(messages.FINISH_REPLY, {"site": self.name}), reply_to=message)
        return self._train(message)

    def _train(self, message: Message) -> Message | None:
        request = unpack(messages.TRAIN, message.content, source="s")
        self.trained.append((request.values["phase"], request.values["round"], request.values["first_epoch"]))
        if self.behave is not None:
            answer: Message | None = self.behave(message)
            return answer
        received = self.ownership.contribution(self.name, decode(request.weights, source="s"))
        weights = {name: value + np.float32(self.step) for name, value in received.items()}
        values = {
            **echo(message),
            "site": self.name,
            "n_steps": self.n_steps,
            "n_cases": self.facts["n_labelled"] + self.facts["n_unlabelled"],
            "metrics": {"dice": self.step} | ({} if self.loss is None else {"train_loss": self.loss}),
            "seconds": 0.1,
        }
        return Message(reply(messages.TRAIN_REPLY, values, encode(weights)), reply_to=message)


def echo(message: Message) -> dict[str, Any]:
    """What a reply repeats of its request."""
    request = unpack(messages.TRAIN, message.content, source="s").values
    return {key: request[key] for key in ("phase", "round", "plans_hash")}


class Bench:
    """A round loop over scripted sites."""

    def __init__(
        self, folder: Path, nodes: list[ScriptedSite], ownership: Ownership | None = None, **options: Any
    ) -> None:
        ownership = ownership or Ownership()
        for node in nodes:
            node.ownership = ownership
        names = ",".join(site.name for site in nodes)
        self.config = FederateConfig(**{"sites": names, "deadline_s": 0.5, "segmenter_rounds": 3, **options})
        self.grid = LocalGrid(dict(enumerate(nodes, start=1)))
        self.log = EventLog(folder / "events.jsonl")
        self.state = ServerState(
            run_id=new_state("0" * 12, {}).run_id, config={}, dataset_name="Dataset001_Blobs", plans={"plans_name": "x"}
        )
        self.roster = Roster(self.grid, self.log, self.state.run_id, "1", self.config.site_names)
        self.saved: list[tuple[dict[str, int], Weights, bool]] = []
        self.loop = RoundLoop(
            self.roster,
            self.config,
            self.log,
            "nnUNetTrainerFedHarmNone",
            2,
            {"harmonizer": ownership, "segmenter": Ownership(ownership.bank, ownership.rows)},
            lambda state, weights, best: self.saved.append((state.rounds_done, weights, best)),
        )
        self.roster.wait_for_all(seconds=0.1, check_data=True, deadline_s=1.0)

    def run(self, n_rounds: int = 1, phase: str = "segmenter", weights: Weights = START) -> Weights:
        self.state, mean = self.loop.run_phase(phase, n_rounds, self.state, weights)
        return mean

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in read_events(self.log.path)[0] if event["event"] == name]


def test_a_round_averages_by_steps_and_is_checkpointed(tmp_path: Path) -> None:
    bench = Bench(tmp_path, [ScriptedSite("A", step=1, n_steps=3), ScriptedSite("B", step=5, n_steps=1)])
    mean = bench.run()
    np.testing.assert_allclose(mean["segmenter.w"], 2.0)
    assert bench.saved[0][0] == {"harmonizer": 0, "segmenter": 1}
    assert bench.state.history[0]["dice"] == pytest.approx(2.0)
    assert bench.state.best_dice == pytest.approx(2.0)


def test_what_can_wait_is_done_while_the_sites_train_and_after_the_last_round(tmp_path: Path) -> None:
    seen: list[str] = []

    class Watched(ScriptedSite):
        def __call__(self, message: Message) -> Message | None:
            if message.metadata.message_type == "train":
                seen.append(f"asked {message.content.config_records['config']['round']}")
            return super().__call__(message)

    bench = Bench(tmp_path, [Watched("A", step=1)])

    def checkpoint(state: ServerState, _: Weights, __: bool) -> None:
        number = state.rounds_done["segmenter"]
        seen.append(f"saved {number}")
        bench.loop.later.put(lambda: seen.append(f"written {number}"))

    bench.loop = replace(bench.loop, checkpoint=checkpoint)
    bench.run(2)
    assert seen == ["asked 0", "saved 1", "asked 1", "written 1", "saved 2", "written 2"]


def test_what_can_wait_is_done_too_where_the_next_round_finds_no_site(tmp_path: Path) -> None:
    bench = Bench(tmp_path, [ScriptedSite("A", step=1)], max_retries=0)
    written: list[int] = []

    def checkpoint(*_: object) -> None:
        bench.loop.later.put(lambda: written.append(1))
        bench.grid.clients.clear()

    bench.loop = replace(bench.loop, checkpoint=checkpoint)
    with pytest.raises(FederationError):
        bench.run(2)
    assert written == [1]


def test_the_harmonizer_phase_sends_only_the_harmonizer_and_asks_every_site(tmp_path: Path) -> None:
    sites = [ScriptedSite("A", step=1), ScriptedSite("B", step=1, labelled=0)]
    bench = Bench(tmp_path, sites, harmonizer="curve", harmonizer_rounds=1)
    mean = bench.run(phase="harmonizer")
    np.testing.assert_allclose(mean["harmonizer.k"], 1.0)
    np.testing.assert_allclose(mean["segmenter.w"], 0.0)
    bench.run(weights=mean)
    assert [len(site.trained) for site in sites] == [2, 1], "a site without labels rests in the segmenter phase"


@pytest.mark.parametrize(("loss", "warnings"), [(0.69, 1), (0.3, 0), (None, 0)])
def test_a_judge_that_guesses_at_the_end_of_its_phase_is_said_once(
    tmp_path: Path, loss: float | None, warnings: int
) -> None:
    sites = [ScriptedSite("A", step=1), ScriptedSite("B", step=1)]
    sites[0].loss = loss  # B only votes
    bench = Bench(tmp_path, sites, harmonizer="polarity", harmonizer_rounds=3)
    bench.run(3, phase="harmonizer")
    said = [event["text"] for event in bench.events("warning")]
    assert [text.split("(loss")[0] for text in said] == ["The judge of polarity guesses "] * warnings


def learned(folder: Path, sites: list[ScriptedSite], ownership: Ownership = OWNERSHIP, **options: Any) -> Bench:
    return Bench(folder, sites, ownership, harmonizer="cyclegan", harmonizer_rounds=3, **options)


def test_rows_and_the_references_tensors_come_from_their_sites_alone(tmp_path: Path) -> None:
    bench = learned(tmp_path, [ScriptedSite("A", step=1), ScriptedSite("B", step=3), ScriptedSite("C", step=8)])
    mean = bench.run(phase="harmonizer", weights=OWNED)
    np.testing.assert_allclose(mean["harmonizer.k"], 4.0)
    np.testing.assert_allclose(mean["harmonizer.judge"], 1.0)
    np.testing.assert_array_equal(mean["harmonizer.rows"], np.float32([[1.5], [3.5], [8.5]]))
    np.testing.assert_array_equal(mean["harmonizer.bank"], 0.0)
    sent = {event["site"]: event["bytes_up"] for event in bench.events("site_trained")}
    assert sent["A"] > sent["B"] + OWNED["harmonizer.judge"].nbytes
    assert sent["B"] == sent["C"]


def test_a_missing_site_undoes_nothing_and_its_row_waits_for_it(tmp_path: Path) -> None:
    sites = [ScriptedSite("A", step=1), ScriptedSite("B", step=3), ScriptedSite("C", step=8)]
    bench = learned(tmp_path, sites)
    first = bench.run(1, phase="harmonizer", weights=OWNED)
    del bench.grid.clients[1], bench.grid.clients[2]
    bench.grid.clients[2] = sites[1]
    second = bench.run(2, phase="harmonizer", weights=first)
    np.testing.assert_array_equal(second["harmonizer.judge"], first["harmonizer.judge"])
    np.testing.assert_array_equal(second["harmonizer.rows"], np.float32([[1.5], [6.5], [16.5]]))
    np.testing.assert_allclose(second["harmonizer.k"], first["harmonizer.k"] + 5.5)
    assert [(event["round"], event["sites"]) for event in bench.events("reference_missing")] == [(2, ["A"])]
    bench.grid.clients[7] = sites[0]
    third = bench.run(3, phase="harmonizer", weights=second)
    np.testing.assert_allclose(third["harmonizer.judge"], 2.0)
    np.testing.assert_array_equal(third["harmonizer.rows"], np.float32([[2.5], [9.5], [24.5]]))


def test_a_site_that_took_no_step_carries_no_weight_but_its_row(tmp_path: Path) -> None:
    sites = [ScriptedSite("A", step=1), ScriptedSite("B", step=3, n_steps=0), ScriptedSite("C", step=5)]
    for folder, weighting in (("s", "steps"), ("c", "cases"), ("e", "sites")):
        mean = learned(tmp_path / folder, sites, weighting=weighting).run(phase="harmonizer", weights=OWNED)
        np.testing.assert_allclose(mean["harmonizer.k"], 3.0)
        np.testing.assert_array_equal(mean["harmonizer.rows"], np.float32([[1.5], [3.5], [5.5]]))


def test_sites_that_sit_the_phase_out_are_not_asked(tmp_path: Path) -> None:
    sites = [ScriptedSite("A", step=1), ScriptedSite("B", step=3), ScriptedSite("C", step=8)]
    alone = replace(OWNERSHIP, idle=frozenset({"B", "C"}))
    learned(tmp_path, sites, alone).run(phase="harmonizer", weights=OWNED)
    assert [len(site.trained) for site in sites] == [1, 0, 0]


def test_more_than_a_sites_own_share_is_refused(tmp_path: Path) -> None:
    sites = [ScriptedSite("A", step=1), ScriptedSite("B", step=3), ScriptedSite("C", step=8)]
    bench = learned(tmp_path, sites)
    sites[1].ownership = Ownership()  # B sends everything that it got
    mean = bench.run(phase="harmonizer", weights=OWNED)
    np.testing.assert_array_equal(mean["harmonizer.rows"], np.float32([[1.5], [0.5], [8.5]]))
    assert "unknown 'harmonizer.bank'" in bench.events("site_set_aside")[0]["reason"]


def test_the_clock_runs_over_rounds_with_several_local_epochs(tmp_path: Path) -> None:
    site = ScriptedSite("A", step=1)
    Bench(tmp_path, [site], local_epochs=4).run(3)
    assert site.trained == [("segmenter", 0, 0), ("segmenter", 1, 4), ("segmenter", 2, 8)]


def test_an_error_reply_is_set_aside_with_its_reason(tmp_path: Path) -> None:
    bad = ScriptedSite("C", step=9)
    bad.behave = lambda message: Message(error_reply("DataError", "Site C lost its disk."), reply_to=message)
    bench = Bench(tmp_path, [ScriptedSite("A", step=1), ScriptedSite("B", step=3), bad])
    np.testing.assert_allclose(bench.run()["segmenter.w"], 2.0)
    assert bench.events("site_set_aside")[0]["reason"] == "Site C lost its disk."


def nan_reply(message: Message) -> Message:
    content = reply(
        messages.TRAIN_REPLY,
        {**echo(message), "site": "C", "n_steps": 1, "n_cases": 1, "metrics": {}, "seconds": 0.0},
        encode(START),
    )
    array = content.array_records["weights"]["segmenter.w"]
    array.data = array.data[:-12] + np.full(3, np.nan, np.float32).tobytes()
    return Message(content, reply_to=message)


def misshapen_reply(message: Message) -> Message:
    values = {**echo(message), "site": "C", "n_steps": 1, "n_cases": 1, "metrics": {}, "seconds": 0.0}
    weights = {**START, "segmenter.w": np.zeros(4, np.float32)}
    return Message(reply(messages.TRAIN_REPLY, values, encode(weights)), reply_to=message)


def foreign_reply(message: Message) -> Message:
    values = {**echo(message), "site": "A", "n_steps": 1, "n_cases": 1, "metrics": {}, "seconds": 0.0}
    return Message(reply(messages.TRAIN_REPLY, values, encode(START)), reply_to=message)


@pytest.mark.parametrize(
    ("behave", "reason"),
    [
        (nan_reply, "segmenter.w from C holds NaN or infinity"),
        (misshapen_reply, r"segmenter.w from C is float32 \(4,\)"),
        (foreign_reply, "The reply of C carries the name A"),
        (
            lambda message: Message(Error(code=2, reason="traceback with case_042"), reply_to=message),
            "raised an exception",
        ),
        (lambda message: Message(Error(code=5, reason="x"), reply_to=message), "its node is gone"),
        (lambda message: None, "no reply within"),
    ],
)
def test_a_bad_or_missing_reply_does_not_stop_the_round(tmp_path: Path, behave: Any, reason: str) -> None:
    bad = ScriptedSite("C", step=9)
    bad.behave = behave
    bench = Bench(tmp_path, [ScriptedSite("A", step=1), ScriptedSite("B", step=3), bad])
    np.testing.assert_allclose(bench.run()["segmenter.w"], 2.0)
    event = bench.events("site_set_aside")[0]
    assert event["site"] == "C"
    assert re.search(reason, event["reason"])
    assert "case_042" not in bench.log.path.read_text()


def test_too_few_replies_repeat_the_round_and_then_stop_with_the_reasons(tmp_path: Path) -> None:
    sites = [ScriptedSite("A", step=1), ScriptedSite("B", step=3)]
    for site in sites:
        site.behave = lambda message: Message(error_reply("X", "no power."), reply_to=message)
    bench = Bench(tmp_path, sites, max_retries=1)
    with pytest.raises(FederationError, match=r"Round 1 .* got 0 of 2 needed replies \(A: no power; B: no power\)"):
        bench.run()
    assert len(bench.events("round_repeated")) == 2
    assert bench.saved == []


def test_a_site_that_left_comes_back_under_another_node_id(tmp_path: Path) -> None:
    sites = [ScriptedSite("A", step=1), ScriptedSite("B", step=3), ScriptedSite("C", step=8)]
    bench = Bench(tmp_path, sites)
    mean = bench.run(1)
    del bench.grid.clients[3]
    mean = bench.run(2, weights=mean)
    assert bench.state.history[1]["sites"] == ["A", "B"]
    sites[2].held = ""  # it lost its plans, too
    bench.grid.clients[77] = sites[2]
    bench.run(3, weights=mean)
    assert bench.state.history[2]["sites"] == ["A", "B", "C"]
    assert sites[2].held == json_hash(bench.state.plans)
    assert [event["site"] for event in bench.events("site_lost")] == ["C"]


def test_a_site_that_has_lost_its_plans_gets_them_again_before_the_next_round(tmp_path: Path) -> None:
    sites = [ScriptedSite("A", step=1), ScriptedSite("B", step=3), ScriptedSite("C", step=8)]
    bench = Bench(tmp_path, sites)
    lost = OtherPlansError("Site C holds no plans of this run.")

    def as_it_holds_plans(message: Message) -> Message | None:
        if not sites[2].held:
            return Message(error_reply(type(lost).__name__, str(lost)), reply_to=message)
        sites[2].behave = None
        return sites[2](message)

    mean = bench.run(1)
    sites[2].held, sites[2].behave = "", as_it_holds_plans  # restored from a backup, and never seen offline
    mean = bench.run(2, weights=mean)
    bench.run(3, weights=mean)
    assert [entry["sites"] for entry in bench.state.history[1:]] == [["A", "B"], ["A", "B", "C"]]
    assert len(bench.events("site_set_aside")) == 1


def test_who_connects_while_another_site_is_asked_is_asked_too_before_the_run_gives_up(tmp_path: Path) -> None:
    """The check of a site's data may take longer than the whole time that a run waits."""
    sites = [ScriptedSite("A", step=1), ScriptedSite("B", step=3)]
    late: dict[int, ScriptedSite] = {}

    class Checking(ScriptedSite):
        def __call__(self, message: Message) -> Message | None:
            if late:
                time.sleep(0.2)
                bench.grid.clients.update(late)
            return super().__call__(message)

    bench = Bench(tmp_path, [Checking("A", step=1), sites[1]])
    del bench.grid.clients[2]
    bench.roster.nodes.clear()
    late[2] = sites[1]
    bench.roster.wait_for_all(seconds=0.1, check_data=True, deadline_s=5.0)
    assert bench.roster.missing == []


def test_a_dead_node_that_flower_still_lists_is_not_asked_again(tmp_path: Path) -> None:
    sites = [ScriptedSite("A", step=1), ScriptedSite("B", step=3)]
    bench = Bench(tmp_path, sites)
    bench.grid.clients[2] = lambda message: None
    bench.grid.clients[9] = sites[1]
    bench.run(2)
    assert bench.roster.nodes["B"] == 9
    assert bench.grid.sent.count(("query.preflight", 2)) == 1


def test_a_node_that_nobody_waited_for_is_asked_again_once_the_dead_one_is_gone(tmp_path: Path) -> None:
    """Flower lists a dead node for a minute; with a shorter deadline the new one used up its chances to answer by then."""
    sites = [ScriptedSite("A", step=1), ScriptedSite("B", step=3)]
    bench = Bench(tmp_path, sites, quorum=1)
    mean = bench.run(1)
    bench.grid.clients[2] = lambda message: None
    bench.grid.clients[9] = lambda message: None  # starts, and cannot answer yet
    mean = bench.run(3, weights=mean)
    assert bench.state.history[2]["sites"] == ["A"]
    assert bench.grid.sent.count(("query.preflight", 9)) == 2
    del bench.grid.clients[2]
    bench.grid.clients[9] = sites[1]
    bench.run(4, weights=mean)
    assert bench.state.history[3]["sites"] == ["A", "B"]


def test_a_site_may_leave_and_come_back_under_the_same_node_id_as_often_as_it_likes(tmp_path: Path) -> None:
    """With node keys, Flower gives a site the same node id for ever."""
    sites = [ScriptedSite("A", step=1), ScriptedSite("B", step=3)]
    bench = Bench(tmp_path, sites, quorum=1, segmenter_rounds=8)
    mean = bench.run(1)
    for again in range(3):
        del bench.grid.clients[2]
        mean = bench.run(2 * again + 2, weights=mean)
        bench.grid.clients[2] = sites[1]
        mean = bench.run(2 * again + 3, weights=mean)
        assert bench.state.history[-1]["sites"] == ["A", "B"], again


def test_a_site_that_was_refused_and_mended_is_let_in(tmp_path: Path) -> None:
    sites = [ScriptedSite("A", step=1), ScriptedSite("B", step=3)]
    bench = Bench(tmp_path, sites, quorum=1)
    mean = bench.run(1)
    del bench.grid.clients[2]
    mean = bench.run(2, weights=mean)
    bench.grid.clients[2] = ScriptedSite("B", step=3, labels=("other",))
    mean = bench.run(3, weights=mean)
    assert len(bench.events("site_refused")) == 1
    del bench.grid.clients[2]
    mean = bench.run(4, weights=mean)
    bench.grid.clients[2] = sites[1]
    bench.run(5, weights=mean)
    assert bench.state.history[4]["sites"] == ["A", "B"]


def test_a_site_that_answered_with_errors_and_was_mended_under_its_node_id_is_asked_again(tmp_path: Path) -> None:
    """A registered key keeps its node id: what the node said before must not count against it for ever."""
    bench = Bench(tmp_path, [ScriptedSite(name, step=1) for name in "ABC"], quorum=2)
    mended = bench.grid.clients[3]
    bench.grid.clients[3] = lambda message: Message(error_reply("DataError", "no dataset"), reply_to=message)
    del bench.roster.nodes["C"]
    for _ in range(4):
        bench.roster.refresh()
    assert "C" not in bench.roster.nodes
    bench.grid.clients[3] = mended
    bench.roster.refresh()
    assert bench.roster.nodes["C"] == 3


def test_a_refused_node_that_never_left_is_asked_again_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = [ScriptedSite(name, step=1) for name in "ABC"]
    bench = Bench(tmp_path, sites, quorum=2)
    right = dict(sites[2].facts)
    sites[2].facts = {**right, "labels": {"background": 0, "other": 1}}
    del bench.roster.nodes["C"]
    assert bench.roster.refresh()
    sites[2].facts = right
    bench.roster.refresh()
    assert "C" not in bench.roster.nodes
    later = time.monotonic() + 601
    monkeypatch.setattr("nnunet_fedharm.federation.roster.time.monotonic", lambda: later)
    bench.roster.refresh()
    assert bench.roster.nodes["C"] == 3


def test_facts_of_preflight_hold_when_a_site_comes_back_with_other_data(tmp_path: Path) -> None:
    sites = [ScriptedSite(name, step=1) for name in "AB"]
    bench = Bench(tmp_path, sites, quorum=1)
    before = bench.roster.facts["B"].n_labelled
    for count, let_in in ((before + 5, True), (0, False)):
        sites[1].facts = {**sites[1].facts, "n_labelled": count}
        bench.roster.nodes.pop("B", None)
        bench.roster.refresh()
        assert ("B" in bench.roster.nodes) is let_in
        assert bench.roster.facts["B"].n_labelled == before
    assert "still count" in bench.events("warning")[0]["text"]
    assert "all mounted" in bench.events("site_refused")[0]["reason"]


def test_a_reply_that_no_parser_expects_is_set_aside_and_the_round_goes_on(tmp_path: Path) -> None:
    class Overflowing(ScriptedSite):
        def _train(self, message: Message) -> Message | None:
            answer = super()._train(message)
            assert answer is not None
            values = answer.content.config_records["config"]
            (name,) = [key for key, value in values.items() if "dice" in str(value)]
            values[name] = str(values[name]).replace("7.5", "1" + "0" * 400)
            return answer

    bench = Bench(tmp_path, [ScriptedSite("A", step=2), Overflowing("B", step=7.5)], quorum=1)
    np.testing.assert_allclose(bench.run()["segmenter.w"], 2.0)
    assert "cannot be read" in bench.events("site_set_aside")[0]["reason"]


def test_a_slow_site_is_asked_until_the_deadline_where_the_quorum_needs_it(tmp_path: Path) -> None:
    sites = [ScriptedSite("A", step=1), ScriptedSite("B", step=3)]
    bench = Bench(tmp_path, sites, quorum=2, deadline_s=10.0)
    del bench.grid.clients[2]
    asked = []

    def busy(message: Message) -> Message | None:
        asked.append(message.metadata.message_type)
        return sites[1](message) if len(asked) > 3 else Message(error_reply("B", "busy."), reply_to=message)

    bench.grid.clients[9] = busy
    bench.run(1)
    assert bench.state.history[0]["sites"] == ["A", "B"]


def test_a_site_that_comes_back_with_other_labels_is_refused_and_the_run_goes_on(tmp_path: Path) -> None:
    sites = [ScriptedSite("A", step=1), ScriptedSite("B", step=3), ScriptedSite("C", step=8)]
    bench = Bench(tmp_path, sites)
    del bench.grid.clients[3]
    bench.grid.clients[4] = ScriptedSite("C", step=8, labels=("other",))
    bench.run(1)
    assert bench.state.history[0]["sites"] == ["A", "B"]
    assert "labels" in bench.events("site_refused")[0]["reason"]


def test_a_site_that_disagrees_is_refused_by_name_before_anything_runs(tmp_path: Path) -> None:
    sites = [ScriptedSite("A", step=1), ScriptedSite("B", step=1), ScriptedSite("C", step=1, labels=("other",))]
    with pytest.raises(SiteMismatchError, match="C"):
        Bench(tmp_path, sites)


def test_two_nodes_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="2 nodes call themselves A"):
        Bench(tmp_path, [ScriptedSite("A", step=1), ScriptedSite("A", step=1), ScriptedSite("B", step=1)], sites="A,B")


def test_a_stranger_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SiteMismatchError, match="Site X is not part of this run"):
        Bench(tmp_path, [ScriptedSite("A", step=1), ScriptedSite("X", step=1)], sites="A,B")


def test_without_enough_connected_sites_the_run_stops_and_says_who_is_missing(tmp_path: Path) -> None:
    bench = Bench(tmp_path, [ScriptedSite("A", step=1), ScriptedSite("B", step=1)])
    del bench.grid.clients[2]
    with pytest.raises(FederationError, match="Only 1 of 2 needed sites are connected; missing: B"):
        bench.run()


def test_the_last_broadcast_names_the_sites_that_got_the_model(tmp_path: Path) -> None:
    sites = [ScriptedSite("A", step=1), ScriptedSite("B", step=1)]
    bench = Bench(tmp_path, sites)
    del bench.grid.clients[2]
    state = bench.loop.finish(bench.state, START)
    assert state.finished_sites == ["A"]
    bench.grid.clients[5] = sites[1]
    assert bench.loop.finish(state, START).finished_sites == ["A", "B"]
    assert bench.grid.sent.count(("query.finish", 1)) == 1, "who holds the model is not sent it again"


@pytest.mark.parametrize(
    ("quorum", "n_sites", "needed"), [(0, 1, 1), (0, 2, 2), (0, 3, 2), (0, 4, 3), (1, 4, 1), (4, 3, 3)]
)
def test_the_quorum_is_more_than_half_unless_told(quorum: int, n_sites: int, needed: int) -> None:
    assert quorum_of(quorum, n_sites) == needed


def test_a_phase_without_sites_is_refused() -> None:
    with pytest.raises(FederationError, match="at least one site with labels"):
        quorum_of(0, 0)


def test_reasons_name_each_site_once() -> None:
    assert rounds.join_reasons({"B": "Site B is ill.", "A": "no reply"}) == "A: no reply; Site B is ill"


def test_a_full_disk_at_the_server_stops_the_run_and_is_no_sites_fault(tmp_path: Path) -> None:
    bench = Bench(tmp_path, [ScriptedSite("A", step=1), ScriptedSite("B", step=2)])
    site: ScriptedSite = bench.grid.clients[1]  # type: ignore[assignment]

    def no_room(message: Message) -> Message | None:
        shutil.rmtree(tmp_path / bench.state.run_id / "spool")  # as good as full: nothing can be written there
        site.behave = None
        return site(message)

    site.behave = no_room
    with pytest.raises(CheckpointError, match="Free space there, then run the same command again"):
        bench.run()
    assert not bench.events("site_set_aside")
    assert not bench.events("round_repeated"), "nobody trains again for it"
    np.testing.assert_allclose(bench.run()["segmenter.w"], 1.5)
