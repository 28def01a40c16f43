"""Replies that are answers to something else, claim too much, or are too large are set aside by name; the round goes on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from nnunet_fedharm.errors import FederationError
from nnunet_fedharm.federation import messages
from nnunet_fedharm.federation.aggregation import SiteUpdate
from nnunet_fedharm.federation.codec import Weights, decode, encode
from nnunet_fedharm.federation.exchange import Answers
from nnunet_fedharm.federation.messages import reply, unpack
from nnunet_fedharm.federation.updates import set_outliers_aside
from tests.federation.test_rounds import START, Bench, ScriptedSite, echo


def answering(step: float = 9.0, weights: Weights | None = None, **changes: Any) -> Any:
    """Behaviour of site C with some values of its reply changed."""

    def behave(message: Message) -> Message:
        received = decode(unpack(messages.TRAIN, message.content, source="s").weights, source="s")
        values = {**echo(message), "site": "C", "n_steps": 1, "n_cases": 2, "metrics": {}, "seconds": 0.0, **changes}
        sent = weights or {name: value + np.float32(step) for name, value in received.items()}
        return Message(reply(messages.TRAIN_REPLY, values, encode(sent)), reply_to=message)

    return behave


def bench(folder: Path, behave: Any, **options: Any) -> Bench:
    bad = ScriptedSite("C", step=9)
    bad.behave = behave
    return Bench(folder, [ScriptedSite("A", step=1), ScriptedSite("B", step=3), bad], **options)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"round": 7}, "The reply of C is of segmenter round 8, asked was for segmenter round 1"),
        ({"phase": "harmonizer"}, "The reply of C is of harmonizer round 1, asked was for segmenter round 1"),
        ({"plans_hash": "f" * 64}, "The reply of C was trained with other plans"),
        ({"n_steps": 251}, "The reply of C claims n_steps 251; at most 250 is possible"),
        ({"n_cases": 10**6}, "The reply of C claims n_cases 1000000; at most 3 is possible"),
        ({"n_steps": 0}, "The reply of C says that it took no step"),
        (
            {"weights": {**START, "more": np.zeros(1, np.float32)}},
            "weights from C do not fit: 3 tensors instead of 2, unknown 'more'",
        ),
        ({"weights": {"segmenter.w": START["segmenter.w"]}}, "missing 'harmonizer.k'"),
        ({"weights": {**START, "control:segmenter.w": START["segmenter.w"]}}, "unknown 'control:segmenter.w'"),
    ],
)
def test_a_reply_that_is_not_the_answer_is_set_aside_with_its_reason(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    run = bench(tmp_path, answering(**changes))
    np.testing.assert_allclose(run.run()["segmenter.w"], 2.0)
    event = run.events("site_set_aside")[0]
    assert (event["site"], event["round"]) == ("C", 1)
    assert re.search(reason, event["reason"])


def test_an_update_out_of_proportion_is_set_aside_where_a_bound_is_set(tmp_path: Path) -> None:
    run = bench(tmp_path / "bound", answering(step=500.0), norm_bound=10.0)
    np.testing.assert_allclose(run.run()["segmenter.w"], 2.0)
    assert "more than norm-bound 10 times the median" in run.events("site_set_aside")[0]["reason"]
    assert run.events("round_end")[0]["sites"] == ["A", "B"]
    free = bench(tmp_path / "free", answering(step=500.0))
    np.testing.assert_allclose(free.run()["segmenter.w"], 168.0)
    small = bench(tmp_path / "small", answering(step=9.0), norm_bound=10.0)
    np.testing.assert_allclose(small.run()["segmenter.w"], 13 / 3, rtol=1e-6)


def test_two_replies_have_no_bound(tmp_path: Path) -> None:
    sites = [ScriptedSite("A", step=1), ScriptedSite("B", step=300)]
    np.testing.assert_allclose(Bench(tmp_path, sites, norm_bound=2.0).run()["segmenter.w"], 150.5)


def test_a_round_that_a_bound_leaves_without_quorum_is_repeated_and_then_stops(tmp_path: Path) -> None:
    run = bench(tmp_path, answering(step=500.0), norm_bound=10.0, quorum=3, max_retries=1)
    with pytest.raises(FederationError, match=r"got 2 of 3 needed replies .*norm-bound"):
        run.run()


@pytest.mark.parametrize(("strategy", "step"), [("median", 500.0), ("trimmed-mean", -500.0)])
def test_robust_strategies_outvote_a_bad_reply(tmp_path: Path, strategy: str, step: float) -> None:
    run = bench(tmp_path, answering(step=step), strategy=strategy)
    np.testing.assert_allclose(run.run()["segmenter.w"], 3.0 if step > 0 else 1.0)
    assert run.events("round_end")[0]["dice"] == 2.0, "the metrics' median; C sent none"


def test_a_robust_strategy_waits_for_as_many_replies_as_it_needs(tmp_path: Path) -> None:
    run = bench(tmp_path, lambda message: None, strategy="median", max_retries=0)
    with pytest.raises(FederationError, match="got 2 of 3 needed replies"):
        run.run()


def test_krum_names_whom_it_left_out(tmp_path: Path) -> None:
    sites = [ScriptedSite(name, step=step) for name, step in zip("ABCDE", (1, 1.1, 1.2, 1.3, -900), strict=True)]
    run = Bench(tmp_path, sites, strategy="multi-krum")
    np.testing.assert_allclose(run.run()["segmenter.w"], 1.15, rtol=1e-6)
    assert run.events("round_end")[0]["left_out"] == ["E"]
    assert run.events("round_end")[0]["dice"] == pytest.approx(1.15)


def test_proximal_mu_and_local_groups_are_told_to_the_sites(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    site = ScriptedSite("A", step=1)

    def behave(message: Message) -> Message:
        seen.append(dict(unpack(messages.TRAIN, message.content, source="s").values))
        return answering(site="A")(message)

    site.behave = behave
    Bench(tmp_path, [site], proximal_mu=0.5, local_groups="norm,heads").run()
    assert {key: seen[0][key] for key in ("proximal_mu", "local_groups", "scaffold", "counted")} == {
        "proximal_mu": 0.5,
        "local_groups": "heads,norm",
        "scaffold": False,
        "counted": {},
    }


def test_a_control_variate_out_of_proportion_is_set_aside_too() -> None:
    former = {"w": np.zeros(2, np.float32)}
    answers: Answers[tuple[SiteUpdate, int]] = Answers()
    for site, size in {"A": 1.0, "B": 1.2, "C": 0.9, "D": 80.0}.items():
        control = {"w": np.full(2, size, np.float32)}
        answers.accepted[site] = (SiteUpdate({"w": np.ones(2, np.float32)}, 1, 1, {}, control), 8)
    set_outliers_aside(answers, former, ["w"], 10.0)
    assert sorted(answers.accepted) == ["A", "B", "C"]
    assert answers.failures["D"].startswith("The change of its control variate has the norm")
