"""Epsilon of many releases: Opacus' accountants called directly, the exact Gaussian, and each other as oracles."""

from __future__ import annotations

import math
import warnings

import pytest
from opacus.accountants import PRVAccountant, RDPAccountant

from nnunet_fedharm.errors import PrivacyError
from nnunet_fedharm.privacy.accounting import ORDERS, Noise, epsilon_of, noise_for, prv_epsilon, rdp_epsilon
from nnunet_fedharm.privacy.gaussian import gaussian_epsilon, gaussian_sigma

DELTA = 1e-5
GRID = [(rate, noise, steps) for rate in (0.02, 0.2) for noise in (0.9, 2.0, 5.0) for steps in (20, 200)]


@pytest.mark.parametrize(("rate", "noise", "steps"), GRID)
def test_both_accountants_say_what_opacus_says(rate: float, noise: float, steps: int) -> None:
    ours, history = [Noise(noise, rate, steps)], [(noise, rate, steps)]
    rdp, prv = RDPAccountant(), PRVAccountant()
    rdp.history, prv.history = list(history), list(history)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert rdp_epsilon(ours, DELTA) == pytest.approx(rdp.get_epsilon(DELTA, alphas=list(ORDERS)))
        assert rdp_epsilon(ours, DELTA) <= rdp.get_epsilon(DELTA) + 1e-12, "more orders can only tighten the bound"
        assert prv_epsilon(ours, DELTA) == pytest.approx(prv.get_epsilon(DELTA))


@pytest.mark.parametrize(("rate", "noise", "steps"), GRID)
def test_prv_is_within_the_rdp_bound_and_not_far_below_it(rate: float, noise: float, steps: int) -> None:
    rdp, prv = rdp_epsilon([Noise(noise, rate, steps)], DELTA), prv_epsilon([Noise(noise, rate, steps)], DELTA)
    assert 0.3 * rdp <= prv <= rdp + 0.02


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (5.0, 20), (30.0, 400)])
def test_without_sampling_both_agree_with_the_exact_gaussian(noise: float, steps: int) -> None:
    exact = gaussian_epsilon(noise, DELTA, math.sqrt(steps))
    assert epsilon_of([Noise(noise, 1.0, steps)], DELTA) == pytest.approx(exact)
    assert prv_epsilon([Noise(noise, 1.0, steps)], DELTA) == pytest.approx(exact, abs=0.03)
    assert exact <= rdp_epsilon([Noise(noise, 1.0, steps)], DELTA) <= 1.3 * exact


def test_one_patient_in_two_releases_pays_for_both_in_any_order() -> None:
    first, second = Noise(1.0, 0.05, 200), Noise(6.0)
    together = epsilon_of([first, second], DELTA)
    assert together == pytest.approx(epsilon_of([second, first], DELTA))
    alone = [epsilon_of([noise], DELTA) for noise in (first, second)]
    assert max(alone) < together < sum(alone)
    split = epsilon_of([Noise(1.0, 0.05, 150), second, Noise(1.0, 0.05, 50)], DELTA)
    assert split == pytest.approx(together), "a resumed run costs what an unbroken one costs"


def test_epsilon_grows_with_steps_and_rate_and_falls_with_noise() -> None:
    def at(noise: float = 1.2, rate: float = 0.05, steps: int = 100) -> float:
        return epsilon_of([Noise(noise, rate, steps)], DELTA)

    assert at(steps=50) < at() < at(steps=200)
    assert at(rate=0.02) < at() < at(rate=0.1)
    assert at(noise=2.0) < at() < at(noise=0.9)


@pytest.mark.parametrize(("epsilon", "rate", "steps"), [(1.0, 0.1, 300), (8.0, 0.05, 1000), (0.05, 0.01, 50)])
def test_planned_noise_keeps_the_target_and_little_less_breaks_it(epsilon: float, rate: float, steps: int) -> None:
    noise = noise_for(epsilon, DELTA, sample_rate=rate, steps=steps)
    assert epsilon_of([Noise(noise, rate, steps)], DELTA) <= epsilon
    assert rdp_epsilon([Noise(0.8 * noise, rate, steps)], DELTA) > epsilon


def test_planned_noise_without_sampling_is_the_exact_gaussian() -> None:
    assert noise_for(3.0, DELTA, sample_rate=1.0, steps=4) == pytest.approx(2 * gaussian_sigma(3.0, DELTA))


def test_no_release_costs_nothing_and_hardly_any_noise_has_a_finite_bound() -> None:
    assert epsilon_of([], DELTA) == rdp_epsilon([], DELTA) == prv_epsilon([], DELTA) == 0.0
    assert 60 < epsilon_of([Noise(0.3, 0.5, 300)], DELTA) < math.inf


@pytest.mark.parametrize("values", [(0.0, 0.5, 1), (1.0, 0.0, 1), (1.0, 1.5, 1), (1.0, 0.5, 0), (math.inf, 0.5, 1)])
def test_noise_out_of_range_is_refused(values: tuple[float, float, int]) -> None:
    with pytest.raises(PrivacyError, match="must be"):
        Noise(*values)
