"""One strategy per run: what is refused before the start, what a round makes of its replies, what is remembered."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nnunet_fedharm.errors import FederationError
from nnunet_fedharm.federation.aggregation import SiteUpdate
from nnunet_fedharm.federation.codec import Weights
from nnunet_fedharm.federation.config import FederateConfig, warnings_of
from nnunet_fedharm.federation.ownership import Ownership
from nnunet_fedharm.federation.robust import coordinate_median
from nnunet_fedharm.federation.server_steps import momentum_step
from nnunet_fedharm.federation.state import Memory, load_state, new_state, save_state
from nnunet_fedharm.federation.strategy import (
    ROBUST,
    STRATEGIES,
    NextModel,
    Strategy,
    controlled,
    current_control,
    final_weights,
    next_model,
    strategy_of,
)
from nnunet_fedharm.federation.strategy_checks import check_sites
from nnunet_fedharm.planning.facts import SiteFacts

FORMER: Weights = {"w": np.zeros(2, np.float32), "n": np.array(1)}
SITES = {"A": 1.0, "B": 2.0, "C": 4.0, "D": 8.0, "E": 100.0}


def updates(values: dict[str, float] = SITES) -> dict[str, SiteUpdate]:
    return {
        site: SiteUpdate({"w": np.full(2, value, np.float32), "n": np.array(3)}, 10, 4, {})
        for site, value in values.items()
    }


def played(strategy: Strategy, memory: Memory | None = None, number: int = 0, **changes: Any) -> NextModel:
    details: dict[str, Any] = {
        "phase": "segmenter",
        "weighting": "steps",
        "batch_size": 2,
        "former": FORMER,
        "updates": updates(),
        "ownership": Ownership(),
        **changes,
    }
    return next_model(strategy, memory=memory or Memory(), number=number, **details)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"strategy": "best"}, "strategy is 'best'; choose one of fedavg, fedavgm"),
        (
            {"strategy": "krum", "sites": "A,B,C,D"},
            r"krum with 1 bad sites \(2f \+ 3\) needs at least 5 sites, .* has 4",
        ),
        ({"strategy": "multi-krum", "byzantine": 2, "sites": "A,B,C,D,E,F"}, "at least 7 sites, this federation has 6"),
        ({"strategy": "median", "sites": "A,B"}, "median needs at least 3 sites, .* Choose fedavg, "),
        ({"strategy": "trimmed-mean", "trim": 0.4, "sites": "A,B"}, "trimmed-mean needs at least 3 sites"),
        ({"strategy": "median", "quorum": 2, "sites": "A,B,C"}, "quorum is 2, but the strategy median needs 3 replies"),
        ({"strategy": "trimmed-mean", "trim": 0.5}, "above 0 and below 0.5; got 0.5"),
        ({"strategy": "krum", "byzantine": 0}, "byzantine must be >= 1, got 0"),
        ({"trim": 0.1}, "trim is for trimmed-mean; the strategy fedavg does not read it"),
        ({"strategy": "median", "server_lr": 0.5}, "server-lr is for fedavgm and fedadam and fedyogi and scaffold"),
        ({"strategy": "fedadam", "server_momentum": 0.5}, "server-momentum is for fedavgm"),
        ({"strategy": "fedavgm", "server_momentum": 1.0}, "server-momentum must be at least 0 and below 1, got 1.0"),
        ({"strategy": "fedadam", "server_lr": -1.0}, "server-lr must be >= 0"),
        ({"strategy": "fedyogi", "server_tau": 0.0}, "server-tau must be > 0"),
        ({"server_ema": 1.0}, "server-ema must be at least 0 and below 1"),
        ({"proximal_mu": -0.1}, "proximal-mu must be >= 0"),
        ({"proximal_mu": 200.0}, "Use proximal-mu of at most 100"),
        ({"norm_bound": 0.5}, r"above 1 \(0 = off\); got 0.5"),
        ({"local_groups": "norms"}, "local-groups names 'norms'; choose from harmonizer, norm, encoder"),
        ({"local_groups": "norm,norm"}, "named twice"),
        ({"local_groups": "harmonizer"}, "'none' is not trained at every site. Only curve is"),
        ({"local_groups": "norm,encoder,decoder,heads"}, "nothing to federate"),
        ({"local_groups": "norm", "strategy": "scaffold"}, "scaffold is not made for local-groups"),
        ({"local_groups": "norm", "server_ema": 0.9}, "server-ema is not made for local-groups"),
        (
            {"strategy": "scaffold", "harmonizer": "curve", "harmonizer_rounds": 1, "segmenter_rounds": 0},
            "scaffold corrects segmenter rounds",
        ),
        (
            {"server_ema": 0.9, "harmonizer": "curve", "harmonizer_rounds": 1, "segmenter_rounds": 0},
            "server-ema averages segmenter rounds",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(values: dict[str, Any], words: str) -> None:
    with pytest.raises(FederationError, match=words):
        FederateConfig(**values)


def test_what_may_surprise_is_a_warning() -> None:
    assert warnings_of(FederateConfig(strategy="median", sites="A,B,C")) == []
    judged: dict[str, Any] = {"harmonizer": "polarity", "harmonizer_rounds": 1, "epsilon": 8.0}
    assert warnings_of(FederateConfig(**judged)) == [], "the preparation takes a linear judge"
    judged["harmonizer_options"] = '{"judge": "network"}'
    assert "turns sites over at random. Ask for judge" in warnings_of(FederateConfig(**judged))[0]
    assert warnings_of(FederateConfig(**judged, start_from="public")) == []
    assert warnings_of(FederateConfig(harmonizer="curve", harmonizer_rounds=1, epsilon=8.0)) == []
    assert "counts all sites alike" in warnings_of(FederateConfig(strategy="median", weighting="cases"))[0]
    assert "own heads and norm: the server's own model" in warnings_of(FederateConfig(local_groups="norm,heads"))[0]


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_runs_with_enough_sites(name: str) -> None:
    strategy = strategy_of(FederateConfig(strategy=name, sites="A,B,C,D,E"))
    made = played(strategy)
    assert np.isfinite(made.weights["w"]).all()
    assert made.weights["n"] == 3
    assert (made.weights["w"].dtype, made.weights["n"].dtype) == (np.float32, np.int64)
    assert (np.abs(made.weights["w"]) < 10).all() == (name in (*ROBUST, "fedadam", "fedyogi"))


def test_what_changes_the_result_is_part_of_the_runs_identity() -> None:
    base = FederateConfig(strategy="fedadam")
    for name, value in {
        "strategy": "fedyogi",
        "server_lr": 0.5,
        "server_beta1": 0.5,
        "server_beta2": 0.5,
        "server_tau": 0.5,
        "proximal_mu": 0.5,
        "norm_bound": 5.0,
        "server_ema": 0.5,
        "local_groups": "norm",
    }.items():
        changed = replace(base, **{name: value})
        if name == "server_ema":
            assert changed.identity()["server_ema"] == 0.5
        assert changed.fingerprint() != base.fingerprint(), name
    new = {"strategy", "trim", "byzantine", "server_momentum", "norm_bound", "local_groups"}
    assert new <= {item.name for item in fields(FederateConfig) if item.metadata["identity"]}


def facts(site: str, labelled: int) -> SiteFacts:
    return SiteFacts(
        site=site,
        dataset_name="Dataset001_Blobs",
        channels={"0": "MR"},
        labels={"background": 0, "ball": 1},
        regions_class_order=None,
        file_ending=".nii.gz",
        n_labelled=labelled,
        n_unlabelled=1,
        versions={},
        reader="SimpleITKIO",
    )


def test_sites_without_labels_are_told_before_the_plans_are_made() -> None:
    known = [facts("A", 2), facts("B", 2), facts("C", 2), facts("D", 0)]
    check_sites(FederateConfig(strategy="median"), known)
    with pytest.raises(FederationError, match=r"median needs at least 3 sites, the segmenter phase .* has 2"):
        check_sites(FederateConfig(strategy="median"), [*known[:2], known[3]])
    with pytest.raises(FederationError, match="D has no labels to train its own norm with"):
        check_sites(FederateConfig(local_groups="norm"), known)
    check_sites(FederateConfig(local_groups="harmonizer", harmonizer="curve"), known)


def test_fedavg_is_the_weighted_mean_as_before() -> None:
    np.testing.assert_array_equal(played(Strategy()).weights["w"], np.float32(23.0))


def test_krum_leaves_the_far_ones_out_of_the_mean_and_says_so() -> None:
    one, several = (played(Strategy(name=name)) for name in ("krum", "multi-krum"))
    assert one.left_out == ("A", "C", "D", "E")
    np.testing.assert_array_equal(one.weights["w"], 2.0)
    assert several.left_out == ("E",)
    np.testing.assert_array_equal(several.weights["w"], np.float32(3.75))


def test_too_few_working_sites_stop_a_robust_round() -> None:
    idle = {site: replace(update, n_steps=0) if site in "CDE" else update for site, update in updates().items()}
    with pytest.raises(FederationError, match="median needs 3 sites that train, and only 2 did"):
        played(Strategy(name="median"), updates=idle)


def test_where_the_reference_trains_alone_there_is_nothing_to_outvote() -> None:
    alone = Ownership(reference_only=frozenset({"w"}), reference_sites=frozenset({"E"}))
    made = played(
        Strategy(name="krum"),
        updates={site: update for site, update in updates().items() if site in "AE"},
        ownership=alone,
    )
    np.testing.assert_array_equal(made.weights["w"], 100.0)
    assert made.left_out == ()


def test_the_servers_memory_goes_through_rounds_and_begins_anew_with_a_phase() -> None:
    strategy = Strategy(name="fedavgm", momentum=0.5)
    values = dict.fromkeys("AB", 2.0)
    first = played(strategy, updates=updates(values))
    second = played(strategy, first.memory, 1, former=first.weights, updates=updates(dict.fromkeys("AB", 3.0)))
    np.testing.assert_allclose(second.weights["w"], 2 + (0.5 * 2 + 1))
    fresh = played(strategy, second.memory, 0, phase="segmenter", former=second.weights, updates=updates(values))
    expected, _ = momentum_step(second.weights, updates(values)["A"].weights, {}, lr=1.0, momentum=0.5)
    np.testing.assert_array_equal(fresh.weights["w"], expected["w"])


def test_the_average_is_of_segmenter_rounds_and_becomes_the_final_model() -> None:
    strategy = Strategy(average=0.5)
    memory = played(strategy, phase="harmonizer").memory
    assert memory == Memory()
    first = played(strategy, updates=updates({"A": 1.0}))
    second = played(strategy, first.memory, 1, updates=updates({"A": 4.0}))
    np.testing.assert_allclose(final_weights(second.memory, second.weights)["w"], (0.5 * 1 + 4) / 1.5)
    np.testing.assert_array_equal(
        second.weights["w"], 4.0, "the next round starts from the last one, not from the average"
    )


def test_rows_and_fixed_tensors_are_not_averaged_nor_stepped() -> None:
    former = {**FORMER, "rows": np.zeros((2, 1), np.float32), "fixed": np.ones(1, np.float32)}
    ownership = Ownership(("A", "B"), rows=frozenset({"rows"}), fixed=frozenset({"fixed"}))
    replies = {
        site: replace(update, weights={**update.weights, "rows": np.full((1, 1), SITES[site], np.float32)})
        for site, update in updates({"A": 1.0, "B": 2.0}).items()
    }
    made = played(Strategy(name="fedadam", average=0.5), former=former, updates=replies, ownership=ownership)
    np.testing.assert_array_equal(made.weights["rows"], [[1.0], [2.0]])
    np.testing.assert_array_equal(made.weights["fixed"], 1.0)
    assert {name.split(":")[1] for name in made.memory.tensors} == {"w", "n"}
    assert set(controlled(ownership, former)) == {"w"}


def test_local_tensors_are_in_nobodys_message() -> None:
    ownership = Ownership(local=frozenset({"w"}))
    assert set(ownership.shared(FORMER)) == set(ownership.contribution("A", FORMER)) == {"n"}
    assert ownership.common(FORMER) == {"n"}


def test_the_memory_is_saved_with_the_weights_and_comes_back_whole(tmp_path: Path) -> None:
    memory = Memory({}, {"counted": {"A": 3}, "amounts": {"A": 2.0}})
    memory = memory.with_part("first", {"w": np.float32([1, 2])}).with_part("control", {"w": np.float32([3, 4])})
    state = replace(new_state("0" * 12, {}), memory=memory)
    save_state(tmp_path, state, FORMER)
    found, weights = load_state(tmp_path)
    assert weights is not None
    assert found.memory.numbers == memory.numbers
    np.testing.assert_array_equal(found.memory.part("control")["w"], [3, 4])
    assert set(found.memory.without("control").tensors) == {"first:w"}
    save_state(tmp_path, replace(state.with_round("segmenter", {}, None), memory=Memory()), FORMER)
    assert [path.name[:19] for path in tmp_path.glob("*.safetensors")] == ["weights-00000-00001"]


def test_scaffolds_control_is_weighted_like_the_weights() -> None:
    like = {"w": FORMER["w"]}
    replies = updates({"A": 1.0, "B": 2.0})
    replies = {
        "A": replace(replies["A"], n_cases=3, control={"w": np.float32([1, 1])}),
        "B": replace(replies["B"], n_cases=1, control={"w": np.float32([5, 5])}),
    }
    made = played(Strategy(name="scaffold"), updates=replies, weighting="cases")
    np.testing.assert_allclose(current_control(made.memory, like)["w"], (3 * 1 + 5) / 4)
    assert made.memory.numbers["counted"] == {"A": 0, "B": 0}
    np.testing.assert_array_equal(current_control(Memory(), like)["w"], 0.0)


def test_median_of_the_strategy_is_the_pure_one() -> None:
    sent = {site: update.weights for site, update in updates().items()}
    np.testing.assert_array_equal(played(Strategy(name="median")).weights["w"], coordinate_median(sent)["w"])
