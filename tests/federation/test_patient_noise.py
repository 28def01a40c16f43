"""Private steps with one noise for all sites: the step, its noise, one opening a draw, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nnunet_fedharm.errors import FederationError, FedHarmError
from nnunet_fedharm.federation import messages
from nnunet_fedharm.federation.codec import Weights
from nnunet_fedharm.federation.config import FederateConfig
from nnunet_fedharm.federation.durable import read_json
from nnunet_fedharm.federation.secure.home import Offer
from nnunet_fedharm.federation.secure.patient_noise import shared_steps_of, step_offer
from nnunet_fedharm.federation.site_counts import FILE
from nnunet_fedharm.federation.site_privacy import privacy_statement
from nnunet_fedharm.privacy.ledger import Ledger
from nnunet_fedharm.privacy.shared_steps import SharedSteps
from nnunet_fedharm.trainers.clipped_sum import WEIGHT_DECAY, ClippedSum
from tests.federation.test_rounds import Bench
from tests.federation.test_secure_rounds import SecureSite, bench_of

SIZE = 3000
W: Weights = {"segmenter.w": np.full(SIZE, 2.0, np.float32)}
OPTIONS: dict[str, Any] = {
    "patient_noise": "distributed",
    "epsilon": 8.0,
    "delta": 1e-3,
    "patients_per_step": 10.0,
    "clip": 0.5,
    "iterations_per_epoch": 1,
    "initial_lr": 0.1,
    "style_noise": 0.0,
    "fingerprint_noise": 0.0,
}


class StepSite(SecureSite):
    """Patients whose clipped gradients, of all that are drawn, add up to `step` in every entry; `draws` counts the draws."""

    draws = 0

    def make(self, request: messages.Unpacked, key: str, question: str) -> Offer:
        self.draws += 1
        shared = SharedSteps.from_dict(request.values["shared_steps"])
        found = ClippedSum({"segmenter.w": np.full(SIZE, self.step, np.float32)}, self.facts["n_labelled"])
        return step_offer(key, question, request.values, shared, found)


def step_bench(folder: Path, cases: tuple[int, ...], **options: Any) -> tuple[Bench, list[StepSite]]:
    nodes = [StepSite(name, folder, step=float(count)) for name, count in zip("ABCDE", cases, strict=False)]
    for node, count in zip(nodes, cases, strict=True):
        node.facts |= {"n_labelled": count, "n_unlabelled": 0}
    bench = bench_of(folder, nodes, **{**OPTIONS, **options})
    bench.state = replace(bench.state, facts={node.name: node.facts for node in nodes})
    bench.loop = replace(bench.loop, stepped=frozenset(W))
    return bench, nodes


def test_a_round_is_one_step_from_the_sum_of_all_patients(tmp_path: Path) -> None:
    bench, _ = step_bench(tmp_path, (10, 20, 30, 40), epsilon=1e6, segmenter_rounds=2)
    shared = shared_steps_of(bench.config, bench.state.facts)
    assert shared is not None
    assert shared.sample_rate == 0.1
    after = bench.run(1, weights=W)["segmenter.w"]
    gradient = 0.5 * 100 / (0.1 * 100) + WEIGHT_DECAY * 2.0
    noise = (
        0.1 * 0.5 / 10 * shared.noise * math.sqrt(4 / 2)
    )  # four answered; shares are for a quorum of three, one colluding
    assert after.mean() == pytest.approx(2.0 - 0.1 * gradient, abs=5 * noise / math.sqrt(SIZE) + 1e-6)


def test_the_noise_of_the_step_is_that_of_one_mechanism_and_the_ledger_has_it(tmp_path: Path) -> None:
    bench, nodes = step_bench(tmp_path, (10, 20, 30, 40), quorum=4, segmenter_rounds=3)
    shared = shared_steps_of(bench.config, bench.state.facts)
    assert shared is not None
    after = bench.run(1, weights=W)["segmenter.w"]
    assert after.std() == pytest.approx(0.1 * 0.5 / 10 * shared.noise * math.sqrt(4 / 3), rel=0.1)
    for node in nodes:
        (entry,) = Ledger(node.site.folder).releases()
        assert (entry.noise_multiplier, entry.sample_rate, entry.steps) == (shared.noise, 0.1, 1)
        assert entry.noise_alone == pytest.approx(shared.noise / math.sqrt(3))
        assert "inside a secure sum" in entry.note
    said = privacy_statement(bench.config, bench.state.facts)["patient_level"]
    assert (said["epsilon"], said["least_sites"], said["colluding"]) == (8.0, 4, 1)
    assert said["noise_over_central"] == pytest.approx(math.sqrt(4 / 3))


def test_a_draw_that_may_have_been_opened_is_drawn_anew_and_one_that_did_not_leave_is_kept(tmp_path: Path) -> None:
    bench, nodes = step_bench(tmp_path, (10, 20, 30), segmenter_rounds=3)
    nodes[0].silent_in = "secure_mask"
    with pytest.raises(FederationError, match="opened no secure sum"):
        bench.run(1, weights=W)
    nodes[0].silent_in = ""
    bench.run(1, weights=W)
    assert [node.draws for node in nodes] == [1, 2, 2], (
        "the vectors of B and C had left, whatever the server says of the sum"
    )
    state = replace(bench.state, rounds_done={"harmonizer": 0, "segmenter": 0}, history=[])
    bench.state = state  # the server lost the round that it had opened
    bench.run(1, weights=W)
    assert [node.draws for node in nodes] == [2, 3, 3], "two looks at one draw would cost more than two draws"


def test_a_sum_that_the_others_opened_counts_at_a_site_that_was_not_asked_to(tmp_path: Path) -> None:
    bench, nodes = step_bench(tmp_path, (10, 20, 30, 40), segmenter_rounds=3)
    nodes[3].silent_in = "secure_unmask"
    bench.run(1, weights=W)  # three of four open it
    nodes[3].silent_in = ""
    bench.state = replace(bench.state, rounds_done={"harmonizer": 0, "segmenter": 0}, history=[])
    bench.run(1, weights=W)
    assert [node.draws for node in nodes] == [2, 2, 2, 2]
    counts = [read_json(node.site.folder / bench.state.run_id / FILE)["releases"] for node in nodes]
    assert counts == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"patient_noise": "central"}, "choose one of local, distributed"),
        ({"epsilon": 0.0}, "Give --epsilon"),
        ({"secure_aggregation": "off"}, "Use secure-aggregation segmenter or all"),
        ({"local_epochs": 2}, "Use local-epochs 1 and iterations-per-epoch 1"),
        ({"iterations_per_epoch": 4}, "Use local-epochs 1 and iterations-per-epoch 1"),
        ({"phases": "finetune"}, "Use phases frozen"),
        ({"site_dp": "distributed", "secure_aggregation": "all"}, "Use one of both"),
        ({"proximal_mu": 0.1}, "neither proximal-mu nor local-groups"),
        (
            {"site_colluding": 3, "secure_threshold": 4, "quorum": 5},
            "take 5 to 5, or leave it out.* opens any part, if 3 of",
        ),
        ({"site_colluding": 5, "quorum": 5}, "the server and so many open any part"),
    ],
)
def test_what_is_no_sum_of_one_mechanism_is_refused_before_the_start(options: dict[str, Any], words: str) -> None:
    with pytest.raises(FedHarmError, match=words):
        FederateConfig(**{"sites": "A,B,C,D,E", "secure_aggregation": "segmenter", **OPTIONS, **options})
