"""Noise of the Gaussian mechanism, exactly as much as (epsilon, delta) asks for.

| symbol | here |
|---|---|
| Delta | `sensitivity`: largest L2 distance between the values of two neighbouring data sets |
| sigma | `sigma`: standard deviation of the noise added to each entry |
| Phi | `scipy.special.ndtr` |

A release f(data) + N(0, sigma^2 I) is (epsilon, delta)-differentially private exactly where (theorem 8)

    Phi(Delta / 2 sigma - epsilon sigma / Delta) - e^epsilon Phi(-Delta / 2 sigma - epsilon sigma / Delta) <= delta.

Several releases on the same records are one release of the concatenated vector: sensitivities add in squares, so k releases of
sensitivity Delta with noise sigma cost what one of sensitivity sqrt(k) Delta costs.

References:
    Balle and Wang, "Improving the Gaussian Mechanism for Differential Privacy: Analytical Calibration and Optimal
    Denoising", ICML 2018.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from scipy.special import log_ndtr

from nnunet_fedharm.errors import PrivacyError

_LARGEST = 2.0**200


def gaussian_delta(sigma: float, epsilon: float, sensitivity: float = 1.0) -> float:
    """Smallest delta for which noise of this sigma is (epsilon, delta)-DP; the left side of the inequality above.

    Args:
        sigma: standard deviation of the noise, in the unit of the value.
        epsilon: >= 0.
        sensitivity: L2, in the unit of the value.

    Raises:
        PrivacyError: an argument is out of range.
    """
    _check(sigma=sigma, sensitivity=sensitivity)
    _check_epsilon(epsilon)
    ratio = sensitivity / sigma
    log_first = float(log_ndtr(ratio / 2 - epsilon / ratio))
    # In logarithms, because e^epsilon overflows and the two terms may cancel to a few digits.
    log_quotient = epsilon + float(log_ndtr(-ratio / 2 - epsilon / ratio)) - log_first
    return math.exp(log_first) * max(0.0, -math.expm1(min(0.0, log_quotient)))


def gaussian_sigma(epsilon: float, delta: float, sensitivity: float = 1.0) -> float:
    """Smallest noise for (epsilon, delta)-DP, rounded up in its last digits.

    Args:
        epsilon: >= 0; 0 asks for delta alone.
        delta: in (0, 1).
        sensitivity: L2, in the unit of the value.

    Returns:
        Standard deviation per entry, in the unit of the value.

    Raises:
        PrivacyError: an argument is out of range.
    """
    _check(sensitivity=sensitivity)
    _check_delta(delta)
    _check_epsilon(epsilon)
    return sensitivity * _first(lambda sigma: gaussian_delta(sigma, epsilon) <= delta)


def gaussian_epsilon(sigma: float, delta: float, sensitivity: float = 1.0) -> float:
    """Smallest epsilon that this noise gives at delta, rounded up in its last digits; the inverse of `gaussian_sigma`.

    Raises:
        PrivacyError: an argument is out of range.
    """
    _check(sigma=sigma, sensitivity=sensitivity)
    _check_delta(delta)
    if gaussian_delta(sigma, 0.0, sensitivity) <= delta:
        return 0.0
    return _first(lambda epsilon: gaussian_delta(sigma, epsilon, sensitivity) <= delta)


def _first(holds: Callable[[float], bool]) -> float:
    """Smallest positive number for which a monotone condition holds, by doubling and bisection down to neighbouring floats."""
    low, high = 0.5, 1.0
    while not holds(high) and high < _LARGEST:
        low, high = high, 2 * high
    while holds(low) and low > 1 / _LARGEST:
        low, high = low / 2, low
    for _ in range(100):
        middle = low + (high - low) / 2
        if not low < middle < high:
            break
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _check(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise PrivacyError(f"{name} must be a positive number, got {value}.")


def _check_epsilon(epsilon: float) -> None:
    if not 0 <= epsilon < math.inf:
        raise PrivacyError(f"epsilon must be a number >= 0, got {epsilon}.")


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise PrivacyError(
            f"delta must lie between 0 and 1, got {delta}. A usual choice is below 1 / number of patients."
        )
