"""Privacy of whole sites in rounds: the server's noise, a site's own, shares inside secure sums, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nnunet_fedharm.errors import FederationError, FedHarmError, PrivacyError
from nnunet_fedharm.evaluation.audit.model import read_claim
from nnunet_fedharm.federation.aggregation import SiteUpdate
from nnunet_fedharm.federation.codec import Weights
from nnunet_fedharm.federation.config import FederateConfig
from nnunet_fedharm.federation.durable import read_json
from nnunet_fedharm.federation.ownership import Ownership
from nnunet_fedharm.federation.secure.rounds import SECURE_SUM
from nnunet_fedharm.federation.site import Site
from nnunet_fedharm.federation.site_counts import count_release
from nnunet_fedharm.federation.site_privacy import (
    NOISY_MEAN,
    own_release,
    privacy_statement,
    protect,
    site_privacy_of,
    updates_only,
    with_own_noise,
)
from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.privacy.gaussian import gaussian_epsilon
from nnunet_fedharm.privacy.ledger import Ledger
from nnunet_fedharm.privacy.site_level import LOCAL, SERVER, SitePrivacy
from tests.federation.test_rounds import Bench, ScriptedSite
from tests.federation.test_secure_rounds import SecureSite, bench_of

SIZE = 4000
FORMER: Weights = {
    "segmenter.b": np.zeros(SIZE, np.float32),
    "segmenter.count": np.array(3, np.int64),
    "segmenter.a": np.ones(SIZE, np.float32),
}
PROMISE = SitePrivacy(mode=SERVER, clip=1.0, noise=0.5, delta=1e-5, rounds=10)
SITE_DP: dict[str, Any] = {"site_dp": "distributed", "site_clip": 1.0, "site_noise": 0.5, "secure_aggregation": "all"}


def trained(size: float) -> Weights:
    """All of a site's change in one direction, its norm `size`."""
    step = np.float32(size / math.sqrt(2 * SIZE))
    return {"segmenter.a": FORMER["segmenter.a"] + step, "segmenter.b": step * np.ones(SIZE, np.float32)} | {
        "segmenter.count": np.array(9, np.int64)
    }


def replies(*sizes: float) -> dict[str, SiteUpdate]:
    return {name: SiteUpdate(trained(size), 1, 5, {"dice": 0.5}) for name, size in zip("ABCDE", sizes, strict=False)}


def test_the_server_gives_the_strategy_one_noisy_mean_of_clipped_updates() -> None:
    found = protect(PROMISE, FORMER, Ownership(), replies(0.5, 3.0, 7.0, -1e6))
    mean = found[NOISY_MEAN]
    assert mean.metrics == {}
    assert set(found) == {NOISY_MEAN, *"ABCD"}
    assert not any(
        update.n_steps or update.weights or update.metrics for name, update in found.items() if name in "ABCD"
    )
    change = np.concatenate([mean.weights[name] - FORMER[name] for name in ("segmenter.a", "segmenter.b")])
    wanted = (0.5 + 1 + 1 - 1) / 4 / math.sqrt(2 * SIZE)
    assert change.mean() == pytest.approx(wanted, abs=4 * 0.5 / 4 / math.sqrt(2 * SIZE))
    assert change.std() == pytest.approx(0.5 / 4, rel=0.05), "z S over the number of sites"
    assert mean.weights["segmenter.count"] == 3, "counters are not noisy, so they stay"


def test_without_server_noise_replies_are_left_alone() -> None:
    updates = replies(1.0, 2.0)
    assert protect(None, FORMER, Ownership(), updates) == updates
    assert protect(replace(PROMISE, mode=LOCAL), FORMER, Ownership(), updates) == updates


def test_a_site_hides_its_own_update_and_nothing_of_it_is_left_out() -> None:
    hidden = with_own_noise(replace(PROMISE, mode=LOCAL, noise=2.0), FORMER, trained(50.0), Ownership())
    change = np.concatenate([hidden[name] - FORMER[name] for name in ("segmenter.a", "segmenter.b")])
    assert change.std() == pytest.approx(2.0, rel=0.05)
    assert abs(change.mean()) < 1 / math.sqrt(2 * SIZE) + 4 * 2 / math.sqrt(2 * SIZE)
    assert hidden["segmenter.count"] == 3
    entry = own_release(replace(PROMISE, mode=LOCAL, noise=2.0), "weights, segmenter round 1", "run")
    assert (entry.noise_multiplier, entry.unit) == (1.0, "patient"), "a patient can turn an update into any other"


def test_rows_of_single_sites_are_nobodys() -> None:
    owned = updates_only(Ownership(("A", "B"), rows=frozenset({"harmonizer.gate"})))
    tensors = {"harmonizer.gate": np.zeros((2, 1)), "segmenter.a": np.zeros(2)}
    assert set(owned.contribution("A", tensors)) == {"segmenter.a"}


def test_a_round_with_the_servers_noise_goes_on_like_any_other(tmp_path: Path) -> None:
    sites = [ScriptedSite(name, step=step) for name, step in zip("ABC", (0.001, 5.0, -3.0), strict=True)]
    options = {
        "site_dp": "server",
        "weighting": "sites",
        "site_clip": 2.0,
        "site_noise": 0.25,
        "iterations_per_epoch": 1,
    }
    bench = Bench(tmp_path, sites, segmenter_rounds=1, **options)
    bench.state = replace(bench.state, facts={site.name: site.facts for site in sites})
    mean = bench.run(1, weights={"segmenter.w": BIG["segmenter.w"]})
    wanted = 0.001 / 3  # B's and C's updates are cut to the same norm and point in opposite directions
    noise = 0.25 * 2.0 / 3
    assert mean["segmenter.w"].std() == pytest.approx(noise, rel=0.1)
    assert mean["segmenter.w"].mean() == pytest.approx(wanted, abs=5 * noise / math.sqrt(3000))
    assert bench.state.history[0]["sites"] == ["A", "B", "C", NOISY_MEAN]
    assert bench.state.history[0]["dice"] is None


def secure_bench(
    folder: Path, count: int = 5, *, cases: tuple[int, ...] = (), **options: Any
) -> tuple[Bench, list[SecureSite]]:
    sites = [SecureSite(name, folder, step=0.0, n_steps=3) for name in "ABCDE"[:count]]
    for site, number in zip(sites, cases, strict=False):
        site.facts["n_labelled"] = number - site.facts["n_unlabelled"]
    bench = bench_of(folder, sites, **{**SITE_DP, "iterations_per_epoch": 3, **options})
    bench.state = replace(bench.state, facts={site.name: site.facts for site in sites})
    return bench, sites


BIG: Weights = {"segmenter.w": np.zeros(3000, np.float32), "segmenter.n": np.array(1, np.int64)}


@pytest.mark.parametrize(("lost", "action"), [(0, ""), (1, "secure_mask"), (2, "train.secure")])
def test_the_noise_of_a_secure_sum_is_never_below_the_promise(tmp_path: Path, lost: int, action: str) -> None:
    bench, sites = secure_bench(tmp_path, quorum=3, site_colluding=1)
    for site in sites[:lost]:
        site.silent_in = action
    mean = bench.run(1, weights=BIG)
    answered = 5 - lost
    # Shares for three sites of which one colludes: sigma^2 = (z S)^2 / 2 each.
    wanted = 0.5 * math.sqrt(answered / 2) / answered
    assert mean["segmenter.w"].std() == pytest.approx(wanted, rel=0.1)
    assert wanted * answered >= 0.5
    assert bench.state.history[0]["sites"] == [site.name for site in sites[lost:]] + [SECURE_SUM]
    assert bench.state.history[0]["dice"] is None, "metrics are no part of the sum"


def test_weights_multiply_the_clipped_updates_and_stay_within_the_bound(tmp_path: Path) -> None:
    bench, sites = secure_bench(tmp_path, 3, cases=(2, 4, 9), weighting="cases", site_noise=1e-3, site_clip=1.0)
    sites[2].step = 1.0
    mean = bench.run(1, weights=BIG)
    # C's change of norm sqrt(3000) is clipped to 1 and weighs 9 of 15.
    np.testing.assert_allclose(mean["segmenter.w"], 9 / 15 / math.sqrt(3000), atol=5 * 1e-3)
    assert mean["segmenter.w"].mean() == pytest.approx(9 / 15 / math.sqrt(3000), abs=1e-4)


def test_fewer_sites_than_the_shares_are_made_for_open_nothing(tmp_path: Path) -> None:
    bench, sites = secure_bench(tmp_path, quorum=4)
    sites[0].silent_in = sites[1].silent_in = "secure_mask"
    with pytest.raises(FederationError, match="opened no secure sum of at least 4 sites"):
        bench.run(1, weights=BIG)
    assert not any((site.site.folder / bench.state.run_id / "site-privacy.json").exists() for site in sites)


def test_each_opening_is_counted_and_entered_and_the_last_one_that_is_paid_for_is_the_last(tmp_path: Path) -> None:
    bench, sites = secure_bench(tmp_path, 3, segmenter_rounds=2)
    bench.run(2, weights=BIG)
    site = sites[0].site
    kept = read_json(site.folder / bench.state.run_id / "site-privacy.json")
    assert kept["releases"] == 2
    entries = Ledger(site.folder).releases()
    assert [entry.noise_multiplier for entry in entries] == [0.25, 0.25]
    assert "inside a secure sum" in entries[0].note
    promised = site_privacy_of(bench.config, 3)
    assert promised is not None
    assert count_release(site, bench.state.run_id, promised) == 3, "one more than rounds, for a crash"
    with pytest.raises(PrivacyError, match="3 times in this run"):
        count_release(site, bench.state.run_id, promised)


def test_a_promise_cannot_change_within_a_run(tmp_path: Path) -> None:
    site = Site("A", NnunetRoot(tmp_path), "cpu", 1)
    count_release(site, "aaaaaaaaaaaa-bbbbbb", PROMISE)
    with pytest.raises(PrivacyError, match="promised another"):
        count_release(site, "aaaaaaaaaaaa-bbbbbb", replace(PROMISE, noise=0.1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"site_dp": "nobody"}, "choose one of off, server"),
        ({"site_dp": "server"}, "weighting is steps"),
        ({"site_dp": "local", "weighting": "cases"}, "Use weighting sites"),
        ({"site_dp": "server", "weighting": "sites", "norm_bound": 3.0}, "norm-bound"),
        ({"site_dp": "server", "weighting": "sites", "strategy": "median"}, "one noisy mean"),
        ({"site_dp": "server", "weighting": "sites", "site_noise": 0.0}, "site-noise"),
        ({"site_dp": "server", "weighting": "sites", "secure_aggregation": "segmenter"}, "use distributed"),
        ({"site_dp": "distributed"}, "Use secure-aggregation all"),
        (
            {**SITE_DP, "site_colluding": 3, "secure_threshold": 4, "quorum": 4},
            "opens any update, if 3 of them help it",
        ),
        ({**SITE_DP, "site_colluding": 4, "secure_threshold": 5, "quorum": 3}, "no noise that anybody can rely on"),
        (
            {"site_dp": "server", "weighting": "sites", "harmonizer": "polarity", "harmonizer_rounds": 1},
            "Use curve",
        ),
    ],
)
def test_what_would_break_the_promise_is_refused_before_the_start(options: dict[str, Any], words: str) -> None:
    with pytest.raises(FedHarmError, match=words):
        FederateConfig(sites="A,B,C,D,E", **options)


def test_the_statement_has_epsilon_unit_and_what_is_not_covered(tmp_path: Path) -> None:
    facts = {name: {"n_labelled": 5} for name in "ABCDE"}
    config = FederateConfig(sites="A,B,C,D,E", segmenter_rounds=20, quorum=4, **{**SITE_DP, "site_noise": 4.0})
    said = privacy_statement(config, facts)["site_level"]
    assert (said["unit"], said["releases"], said["least_sites"]) == ("site", 21, 4)
    assert said["epsilon"] == pytest.approx(gaussian_epsilon(4.0, 1e-5, math.sqrt(21)), rel=0.005)
    assert said["surplus_of_variance"] == pytest.approx(5 / 3 - 1)
    assert "style" in said["not_covered"]
    both = privacy_statement(replace(config, epsilon=3.0), facts)
    for content, claim in ((both, 3.0), ({"site_level": said}, None), ({"epsilon": 2.0, "unit": "patient"}, 2.0)):
        (tmp_path / "privacy.json").write_text(json.dumps(content))
        read = read_claim(tmp_path)
        assert (None if read is None else read["epsilon"]) == claim, "an audit takes the promise to patients"
    assert (both["patient_level"]["unit"], both["patient_level"]["epsilon"]) == ("patient", 3.0)
