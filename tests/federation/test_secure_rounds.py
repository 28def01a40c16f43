"""Rounds through secure sums on scripted sites: the plain mean within the bound, what is refused, who may be missing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from nnunet_fedharm.errors import FederationError, PrivacyError
from nnunet_fedharm.federation import answers, messages
from nnunet_fedharm.federation.codec import Weights, decode
from nnunet_fedharm.federation.config import FederateConfig
from nnunet_fedharm.federation.messages import error_reply, unpack
from nnunet_fedharm.federation.ownership import Ownership
from nnunet_fedharm.federation.secure import home as secure_home
from nnunet_fedharm.federation.secure.checks import check_secure_sites
from nnunet_fedharm.federation.secure.home import Offer
from nnunet_fedharm.federation.secure.rounds import SECURE_SUM, Trained, offer_of, train_for_sum
from nnunet_fedharm.federation.secure.update import mean_update, site_arrays, update_layout
from nnunet_fedharm.federation.site import Site, describe_error
from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.planning.facts import SiteFacts
from nnunet_fedharm.privacy.ledger import Ledger
from tests.federation.test_rounds import START, Bench, ScriptedSite

ROWS: Weights = {**START, "harmonizer.rows": np.full((3, 1), 0.5, np.float32)}
OWNERSHIP = Ownership(("A", "B", "C"), rows=frozenset({"harmonizer.rows"}))


class SecureSite(ScriptedSite):
    """A scripted site that keeps its update for the sum; `silent_in` names an action that it never answers."""

    def __init__(self, name: str, folder: Path, **options: Any) -> None:
        super().__init__(name, **options)
        self.site = Site(name, NnunetRoot(folder / name), "cpu", 1)
        self.silent_in = ""
        self.metrics: dict[str, float] = {"dice": self.step}
        self.private = False

    def __call__(self, message: Message) -> Message | None:
        kind = message.metadata.message_type
        action = kind.removeprefix("query.")
        if kind == self.silent_in or action == self.silent_in:
            return None
        if kind == "train.secure":
            return self._answer(
                message,
                messages.TRAIN,
                lambda request: train_for_sum(
                    self.site, request, lambda key, question: self.make(request, key, question)
                ),
            )
        if action in secure_home.ACTIONS:
            schema, work = secure_home.ACTIONS[action]
            return self._answer(message, schema, lambda request: work(self.site, request))
        return super().__call__(message)

    def _answer(self, message: Message, schema: messages.Schema, work: Any) -> Message:
        try:
            content = work(unpack(schema, message.content, source="the server"))
        except Exception as error:  # noqa: BLE001 - as the ClientApp
            content = error_reply(*describe_error(self.site, error))
        return Message(content, reply_to=message)

    def make(self, request: messages.Unpacked, key: str, question: str) -> Offer:
        self.trained.append((request.values["phase"], request.values["round"], request.values["first_epoch"]))
        received = decode(request.weights, source="s")
        own = self.ownership.contribution(self.name, received)
        weights = {name: value + np.float32(self.step) for name, value in own.items()}
        cases = self.facts["n_labelled"] + self.facts["n_unlabelled"]
        learnt = Trained(received, weights, self.ownership, self.n_steps, cases, self.metrics, self.private)
        return offer_of(key, question, request.values, learnt)


def sites(folder: Path, count: int = 4) -> list[SecureSite]:
    return [
        SecureSite(name, folder, step=0.1 * (index + 1), n_steps=index + 1)
        for index, name in enumerate("ABCDEF"[:count])
    ]


def bench_of(folder: Path, nodes: list[SecureSite], ownership: Ownership | None = None, **options: Any) -> Bench:
    common = {"iterations_per_epoch": 10, "secure_aggregation": "segmenter", "max_retries": 0}
    return Bench(folder, list(nodes), ownership, **{**common, **options})


@pytest.mark.parametrize("weighting", ["steps", "cases", "sites"])
def test_a_secure_round_gives_the_plain_mean_within_the_bound(tmp_path: Path, weighting: str) -> None:
    secure = bench_of(tmp_path / "s", sites(tmp_path / "s"), weighting=weighting)
    plain = bench_of(tmp_path / "p", sites(tmp_path / "p"), weighting=weighting, secure_aggregation="off")
    mean, wanted = secure.run(2), plain.run(2)
    for name, value in wanted.items():
        np.testing.assert_allclose(mean[name], value, atol=1e-6)
    for key in ("dice", "train_loss"):
        assert secure.state.history[-1][key] == pytest.approx(plain.state.history[-1][key], abs=1e-4)
    assert {event["site"]: event["metrics"] for event in secure.events("site_trained")} == {site: {} for site in "ABCD"}
    assert secure.state.history[0]["sites"] == [*"ABCD", SECURE_SUM]


@pytest.mark.parametrize("strategy", ["fedavgm", "fedadam", "fedyogi"])
def test_strategies_that_step_from_the_mean_work_as_they_are(tmp_path: Path, strategy: str) -> None:
    secure = bench_of(tmp_path / "s", sites(tmp_path / "s"), strategy=strategy, server_ema=0.5)
    plain = bench_of(tmp_path / "p", sites(tmp_path / "p"), strategy=strategy, server_ema=0.5, secure_aggregation="off")
    np.testing.assert_allclose(secure.run(3)["segmenter.w"], plain.run(3)["segmenter.w"], atol=1e-5)


def test_rows_come_from_their_sites_word_for_word(tmp_path: Path) -> None:
    nodes = sites(tmp_path)
    options = {"harmonizer": "curve", "harmonizer_rounds": 1, "secure_aggregation": "all"}
    bench = bench_of(tmp_path, nodes, OWNERSHIP, **options)
    mean = bench.run(phase="harmonizer", weights=ROWS)
    np.testing.assert_array_equal(mean["harmonizer.rows"], np.float32([[0.6], [0.7], [0.5 + np.float32(0.1 * 3)]]))
    np.testing.assert_allclose(mean["harmonizer.k"], np.average([0.1, 0.2, 0.3, 0.4], weights=[1, 2, 3, 4]), atol=1e-6)
    np.testing.assert_array_equal(mean["segmenter.w"], START["segmenter.w"])


@pytest.mark.parametrize("action", ["train.secure", "secure_setup", "secure_share", "secure_mask"])
def test_a_round_goes_on_without_a_site_that_falls_silent(tmp_path: Path, action: str) -> None:
    nodes = sites(tmp_path)
    nodes[1].silent_in = action
    bench = bench_of(tmp_path, nodes)
    mean = bench.run()
    np.testing.assert_allclose(mean["segmenter.w"], np.average([0.1, 0.3, 0.4], weights=[1, 3, 4]), atol=1e-6)
    assert any(event["site"] == "B" for event in bench.events("site_set_aside"))


def test_a_round_without_enough_sites_stops_and_resumes_without_training_again(tmp_path: Path) -> None:
    nodes = sites(tmp_path)
    for site in nodes[:2]:
        site.silent_in = "secure_mask"
    bench = bench_of(tmp_path, nodes)
    with pytest.raises(FederationError, match=r"opened no secure sum of at least 3 sites .*Only 2 of 4 sites answered"):
        bench.run()
    for site in nodes:
        site.silent_in = ""
    mean = bench.run()
    np.testing.assert_allclose(mean["segmenter.w"], np.average([0.1, 0.2, 0.3, 0.4], weights=[1, 2, 3, 4]), atol=1e-6)
    assert [len(site.trained) for site in nodes] == [1, 1, 1, 1], "the update was still there"


def test_a_diverged_site_keeps_its_nan_to_itself_and_is_named(tmp_path: Path) -> None:
    nodes = sites(tmp_path)
    nodes[2].step = float("nan")
    bench = bench_of(tmp_path, nodes)
    mean = bench.run()
    assert np.isfinite(mean["segmenter.w"]).all()
    reasons = {event["site"]: event["reason"] for event in bench.events("site_set_aside")}
    assert "holds NaN or infinity; nothing of it was sent" in reasons["C"]


def test_a_site_that_claims_more_steps_than_were_asked_for_takes_itself_out(tmp_path: Path) -> None:
    nodes = sites(tmp_path)
    nodes[0].n_steps = 11
    bench = bench_of(tmp_path, nodes)
    bench.run()
    reasons = {event["site"]: event["reason"] for event in bench.events("site_set_aside")}
    assert "The weight of this site is 11; the secure sum takes 0 to 10" in reasons["A"]


def test_updates_beyond_the_clip_range_are_cut_and_counted_in_a_warning(tmp_path: Path) -> None:
    bench = bench_of(tmp_path, sites(tmp_path), secure_clip=0.25)
    mean = bench.run()
    np.testing.assert_allclose(mean["segmenter.w"], np.average([0.1, 0.2, 0.25, 0.25], weights=[1, 2, 3, 4]), atol=1e-6)
    (warning,) = bench.events("warning")
    assert "10 entries of the updates were cut to secure-clip 0.25" in warning["text"]


def test_each_site_enters_one_release_a_round(tmp_path: Path) -> None:
    nodes = sites(tmp_path)
    bench_of(tmp_path, nodes).run(2)
    names = [entry.what for entry in Ledger(nodes[0].site.folder).releases()]
    assert names == ["weights and metrics, segmenter round 1", "weights and metrics, segmenter round 2"]


def test_a_private_training_has_entered_its_steps_itself(tmp_path: Path) -> None:
    nodes = sites(tmp_path)
    nodes[0].private = True
    bench_of(tmp_path, nodes).run()
    assert [len(Ledger(site.site.folder).releases()) for site in nodes] == [0, 1, 1, 1]


def test_a_site_that_sends_secure_sums_only_refuses_a_plain_round(tmp_path: Path) -> None:
    site = replace(sites(tmp_path)[0].site, secure_only=True)
    with pytest.raises(FederationError, match="Site A sends its updates in secure sums only"):
        answers._train(site, messages.Unpacked({}))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"secure_aggregation": "yes"}, "choose one of off, segmenter, all"),
        ({"sites": "A,B"}, "needs at least 3 sites, this federation has 2"),
        ({"strategy": "median"}, "strategy median needs the single updates"),
        ({"strategy": "scaffold"}, "strategy scaffold needs the single updates"),
        ({"norm_bound": 3.0}, "norm-bound looks at"),
        ({"fp16": True}, "fp16 looks at or shortens"),
        ({"secure_clip": 0.0}, "secure-clip"),
        ({"secure_bytes": 3}, "secure-bytes"),
        ({"secure_threshold": 2}, "secure-threshold is 2, but this federation has 4: take 3 to 4, or leave it out"),
        ({"secure_threshold": 5}, "secure-threshold is 5, but this federation has 4: take 3 to 4, or leave it out"),
        ({"sites": "A,B,C,D,E", "secure_threshold": 3}, "take 4 to 5, or leave it out. With less, a server that tells"),
        (
            {"secure_aggregation": "all", "harmonizer": "polarity", "harmonizer_rounds": 1},
            "a sum of one site hides nothing. Use secure-aggregation segmenter",
        ),
        ({"segmenter_rounds": 0, "harmonizer": "curve", "harmonizer_rounds": 1}, "segmenter-rounds is 0"),
    ],
)
def test_what_contradicts_secure_aggregation_is_refused_before_the_start(options: dict[str, Any], words: str) -> None:
    common = {"sites": "A,B,C,D", "secure_aggregation": "segmenter"}
    with pytest.raises((FederationError, PrivacyError), match=words):
        FederateConfig(**{**common, **options})


def test_weights_that_four_bytes_cannot_hold_are_refused_before_the_start() -> None:
    with pytest.raises(PrivacyError, match="4 bytes are too few"):
        FederateConfig(sites="A,B,C", secure_aggregation="all", secure_bytes=4, iterations_per_epoch=10**6)


def test_two_sites_with_labels_are_too_few(tmp_path: Path) -> None:
    config = FederateConfig(sites="A,B,C,D", secure_aggregation="segmenter")
    facts = [SiteFacts.from_dict(site.facts) for site in sites(tmp_path)]
    check_secure_sites(config, facts)
    unlabelled = [SiteFacts.from_dict(ScriptedSite(name, step=1, labelled=0).facts) for name in "CD"]
    with pytest.raises(FederationError, match=r"sites with labels.* has 2"):
        check_secure_sites(config, facts[:2] + unlabelled)
    with pytest.raises(FederationError, match=r"secure-threshold is 4, but .*sites with labels.* has 3: take 3 to 3"):
        check_secure_sites(replace(config, secure_threshold=4), facts[:3] + unlabelled[:1])


def test_integer_and_boolean_tensors_come_out_as_in_a_plain_mean() -> None:
    former: Weights = {
        "count": np.array([10, 20], np.int64),
        "flag": np.array([True, False, True]),
        "w": np.zeros(2, np.float32),
    }
    layout = update_layout(former, sites=3, max_weight=4, clip=1.0, width=5)
    total = np.zeros(layout.size, np.uint64)
    for weight, step in ((1, 1), (2, 4), (4, 7)):
        new = {
            "count": former["count"] + step,
            "flag": np.array([step > 1, step > 4, False]),
            "w": former["w"] + np.float32(0.1),
        }
        total += layout.encode(site_arrays(former, new, {"dice": float("nan")}, former), weight)
    mean = mean_update(layout.decode(total & np.uint64(2**40 - 1)), former)
    np.testing.assert_array_equal(mean.weights["count"], [15, 25])  # (1 + 8 + 28) / 7 = 5.3
    np.testing.assert_array_equal(mean.weights["flag"], [True, True, False])
    assert mean.weights["count"].dtype == np.int64
    assert mean.weights["flag"].dtype == np.bool_
    assert mean.metrics == {}
    assert mean.weight == 7


def test_a_round_in_which_no_site_did_any_work_is_no_round() -> None:
    former: Weights = {"w": np.zeros(2, np.float32)}
    layout = update_layout(former, sites=3, max_weight=4, clip=1.0, width=5)
    with pytest.raises(FederationError, match="No site did any work"):
        mean_update(layout.decode(layout.encode(site_arrays(former, former, {}, former), 0)), former)
