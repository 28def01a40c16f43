"""Privacy of whole sites: bounded updates, shares of noise that add up to enough, and rounding that is paid for."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from nnunet_fedharm.errors import PrivacyError
from nnunet_fedharm.privacy.fixed_point import Field, Layout, Share
from nnunet_fedharm.privacy.gaussian import gaussian_delta, gaussian_epsilon
from nnunet_fedharm.privacy.noise import SecureNoise
from nnunet_fedharm.privacy.site_level import DISTRIBUTED, LOCAL, MOST_ETA, REACH, SERVER, SitePrivacy, clipped


def promise(mode: str = DISTRIBUTED, **values: float) -> SitePrivacy:
    given = {"clip": 2.0, "noise": 3.0, "delta": 1e-5, "rounds": 20, "least": 4, "colluding": 1, **values}
    return SitePrivacy(mode=mode, **given)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5), min_size=1, max_size=4),
    clip=st.floats(1e-3, 1e3),
)
def test_all_tensors_together_are_clipped_and_keep_their_direction(values: list[list[float]], clip: float) -> None:
    change = {f"t{index}": np.array(row) for index, row in enumerate(values)}
    cut = clipped(change, clip)
    before = np.concatenate([change[name] for name in sorted(change)])
    after = np.concatenate([cut[name] for name in sorted(change)])
    assert np.linalg.norm(after) <= clip * (1 + 1e-12)
    if np.linalg.norm(before) <= clip:
        np.testing.assert_array_equal(after, before)
    else:
        np.testing.assert_allclose(after, before * clip / np.linalg.norm(before), rtol=1e-9, atol=1e-300)


def test_what_cannot_be_clipped_is_refused() -> None:
    with pytest.raises(PrivacyError, match="NaN or infinity"):
        clipped({"a": np.array([1.0, np.nan])}, 1.0)


@settings(deadline=None, max_examples=30)
@given(updates=st.lists(st.lists(st.floats(-100, 100), min_size=3, max_size=3), min_size=2, max_size=6))
def test_a_site_more_or_less_moves_the_sum_by_at_most_the_clip(updates: list[list[float]]) -> None:
    cut = [clipped({"w": np.array(update)}, 2.0)["w"] for update in updates]
    assert np.linalg.norm(np.sum(cut, axis=0) - np.sum(cut[1:], axis=0)) <= 2.0 * (1 + 1e-9)


def test_epsilon_is_that_of_all_releases_as_one_gaussian() -> None:
    server = promise(SERVER, least=1, colluding=0)
    assert server.releases == 20
    assert server.epsilon() == pytest.approx(gaussian_epsilon(3.0, 1e-5, math.sqrt(20)))
    assert gaussian_delta(3.0, server.epsilon(), math.sqrt(20)) <= 1e-5
    local = promise(LOCAL, least=1, colluding=0)
    assert local.epsilon() == pytest.approx(gaussian_epsilon(3.0, 1e-5, 2 * math.sqrt(21)))
    assert promise().releases == 21, "a repeated opening is paid for"
    assert promise().epsilon() == pytest.approx(gaussian_epsilon(3.0, 1e-5, math.sqrt(21)), rel=0.005)
    assert promise().epsilon() > gaussian_epsilon(3.0, 1e-5, math.sqrt(21)), "rounding is paid for"


@pytest.mark.parametrize(("least", "colluding"), [(3, 0), (3, 1), (4, 1), (10, 4)])
def test_the_shares_of_those_that_keep_theirs_are_enough_whoever_drops_out(least: int, colluding: int) -> None:
    shares = promise(least=least, colluding=colluding)
    for answered in range(least, 12):
        honest = answered - colluding
        assert math.sqrt(honest) * shares.share >= shares.noise * shares.clip * (1 - 1e-12)
        surplus = shares.statement(sites=answered)["surplus_of_variance"]
        assert shares.share**2 * answered == pytest.approx((shares.noise * shares.clip) ** 2 * (1 + surplus))


def test_sums_with_shares_have_the_stated_variance_and_nothing_else_changes() -> None:
    shares = promise(least=3, colluding=0)
    size, sites = 20_000, 3
    layout = Layout((Field("tensor:w", (size,), shares.room, weighted=False), Field("n", (), 5, integer=True)), sites)
    generator = np.random.default_rng(0)
    values = [generator.normal(0, 2.0 / math.sqrt(size), size) for _ in range(sites)]
    share = Share(frozenset({"tensor:w"}), shares.share, SecureNoise().wide)
    total = np.sum([layout.encode({"tensor:w": value, "n": 1}, 1, share) for value in values], axis=0)
    opened = layout.decode(total)
    noise = opened.values["tensor:w"] - np.sum(values, axis=0)
    assert noise.std() == pytest.approx(shares.noise * shares.clip, rel=0.03)
    assert abs(noise.mean()) < 4 * noise.std() / math.sqrt(size)
    assert opened.values["n"] == sites
    assert opened.clipped == 0
    plain = layout.decode(np.sum([layout.encode({"tensor:w": value, "n": 1}) for value in values], axis=0))
    steps = (opened.values["tensor:w"] - plain.values["tensor:w"]) / layout.step(layout.fields[0])
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-3, err_msg="noise is added in whole steps")
    assert np.unique(np.rint(steps) % 16).size == 16, "the noise hides the last digits too"


def rounded_normal(sigma: float, reach: int) -> np.ndarray:
    edges = np.arange(reach + 2) - 0.5
    right = -np.diff(
        norm.sf(edges / sigma)
    )  # differences of small numbers: the right half keeps its digits in the tail
    return np.concatenate([right[:0:-1], right])


@pytest.mark.parametrize("sigma", [16.0, 40.0])
def test_rounded_shares_are_as_near_to_discrete_gaussians_as_the_bound_says(sigma: float) -> None:
    reach = int(REACH * sigma)
    integers = np.arange(-reach, reach + 1)
    discrete = np.exp(-(integers**2) / (2 * sigma**2))
    discrete /= discrete.sum()
    assert np.abs(np.log(rounded_normal(sigma, reach) / discrete)).max() <= 8 / sigma**2
    single = rounded_normal(sigma, int(1.5 * reach))
    total = single
    for sites in (2, 3, 4):
        total = np.convolve(total, single)
        inner = int(REACH * sigma * math.sqrt(sites))
        middle = (total.size - 1) // 2
        ratio = total[middle - inner : middle + inner + 1] / rounded_normal(sigma * math.sqrt(sites), inner)
        assert np.abs(np.log(ratio)).max() <= 8 * (sites + 1) / sigma**2


def test_a_grid_that_costs_more_than_its_part_of_epsilon_is_refused() -> None:
    shares = promise()
    shares.check_grid(10**6, 5, shares.share / 1e7)
    assert shares.eta(10**6, 5, shares.share / 1e7) < MOST_ETA < shares.eta(10**6, 5, shares.share / 1e6)
    for coarse in (1e6, 4.0):
        with pytest.raises(PrivacyError, match="too coarse"):
            shares.check_grid(10**6, 5, shares.share / coarse)


def test_an_impossible_promise_is_refused() -> None:
    for change in ({"colluding": 4}, {"noise": 0.0}, {"clip": math.inf}, {"delta": 1.0}, {"rounds": 0}):
        with pytest.raises(PrivacyError):
            replace(promise(), **change)  # type: ignore[arg-type]
    with pytest.raises(PrivacyError, match="choose one of"):
        promise("nobody")
    with pytest.raises(PrivacyError, match="cannot be read"):
        SitePrivacy.from_dict({"mode": LOCAL})
    assert SitePrivacy.from_dict(promise().to_dict()) == promise()
