"""The noise of the Gaussian mechanism against the inequality that defines it and against the definition itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm

from nnunet_fedharm.errors import PrivacyError
from nnunet_fedharm.privacy.gaussian import gaussian_delta, gaussian_epsilon, gaussian_sigma

EPSILONS = st.floats(1e-3, 100)
DELTAS = st.floats(1e-12, 0.5)
SENSITIVITIES = st.floats(1e-6, 1e6)


@pytest.mark.parametrize(("sigma", "epsilon"), [(1.0, 0.5), (0.5, 3.0), (4.0, 0.1), (2.0, 1.0)])
def test_delta_is_the_integral_of_the_definition(sigma: float, epsilon: float) -> None:
    """delta = integral of max(0, p - e^epsilon q) over the outputs, with p and q one sensitivity apart."""
    edge = sigma**2 * epsilon + 0.5  # p > e^epsilon q from here on, with p at 1 and q at 0
    direct, _ = quad(
        lambda x: norm.pdf(x, 1, sigma) - math.exp(epsilon) * norm.pdf(x, 0, sigma), edge, edge + 40 * sigma
    )
    assert gaussian_delta(sigma, epsilon) == pytest.approx(direct, rel=1e-6)


@given(EPSILONS, DELTAS, SENSITIVITIES)
@settings(max_examples=60, deadline=None)
def test_sigma_keeps_the_inequality_and_less_noise_would_break_it(
    epsilon: float, delta: float, sensitivity: float
) -> None:
    sigma = gaussian_sigma(epsilon, delta, sensitivity)
    assert gaussian_delta(sigma, epsilon, sensitivity) <= delta * (1 + 1e-9)
    assert gaussian_delta(sigma * (1 - 1e-4), epsilon, sensitivity) > delta


@given(EPSILONS, DELTAS)
@settings(max_examples=60, deadline=None)
def test_epsilon_inverts_sigma(epsilon: float, delta: float) -> None:
    assert gaussian_epsilon(gaussian_sigma(epsilon, delta), delta) == pytest.approx(epsilon, rel=1e-5, abs=1e-7)


@given(st.floats(0.05, 0.999), st.floats(1e-10, 0.1))
@settings(max_examples=30, deadline=None)
def test_it_never_needs_more_than_the_classical_formula(epsilon: float, delta: float) -> None:
    assert gaussian_sigma(epsilon, delta) <= math.sqrt(2 * math.log(1.25 / delta)) / epsilon


def test_noise_scales_with_sensitivity_and_falls_with_epsilon() -> None:
    assert gaussian_sigma(1.0, 1e-5, 3.0) == pytest.approx(3 * gaussian_sigma(1.0, 1e-5))
    sigmas = [gaussian_sigma(epsilon, 1e-5) for epsilon in (0.0, 0.1, 1.0, 8.0, 1000.0)]
    assert sigmas == sorted(sigmas, reverse=True)
    assert np.isfinite(sigmas).all()


def test_much_noise_needs_no_epsilon() -> None:
    assert gaussian_epsilon(1e6, 1e-3) == 0.0


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((-1.0, 1e-5, 1.0), "epsilon"),
        ((1.0, 0.0, 1.0), "delta"),
        ((1.0, 1.0, 1.0), "delta"),
        ((1.0, 1e-5, 0.0), "sensitivity"),
    ],
)
def test_values_out_of_range_are_refused_by_name(values: tuple[float, float, float], words: str) -> None:
    with pytest.raises(PrivacyError, match=words):
        gaussian_sigma(*values)
