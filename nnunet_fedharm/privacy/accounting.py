"""Epsilon of many releases together, by Opacus' accountants, and the noise that a planned training needs.

The unit is the patient and neighbours differ by one patient added or removed. A Gaussian release is described by its noise
multiplier (sigma / L2 sensitivity), a subsampled one also by the rate at which each patient is drawn, independently of all
others (Poisson), and by its steps.

| symbol | here |
|---|---|
| sigma / Delta | `noise_multiplier` |
| q | `sample_rate` |
| T | `steps` |

References:
    Mironov, Talwar and Zhang, "Renyi Differential Privacy of the Sampled Gaussian Mechanism", 2019 (RDP);
    Gopi, Lee and Wutschitz, "Numerical Composition of Differential Privacy", NeurIPS 2021 (PRV).
    Implementation of both: Opacus.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from nnunet_fedharm.errors import PrivacyError
from nnunet_fedharm.privacy.gaussian import gaussian_epsilon, gaussian_sigma

_logger = logging.getLogger(__name__)

ORDERS = (*(1 + step / 10 for step in range(1, 100)), *range(12, 64), 64, 80, 96, 128, 192, 256, 384, 512)
"""Orders of RDP; Opacus' own and larger ones, which much noise needs."""
PRV_ERROR = 0.01
"""Absolute error of epsilon by PRV, added to it."""
_PRV_UP_TO = 60.0
"""PRV's grid grows with epsilon; beyond this the RDP bound stands alone."""


@dataclass(frozen=True)
class Noise:
    """One Gaussian release, or `steps` equal ones.

    Attributes:
        noise_multiplier: sigma / L2 sensitivity to one patient.
        sample_rate: probability of each patient to be drawn in a step; 1 where all take part.
        steps: how often.
    """

    noise_multiplier: float
    sample_rate: float = 1.0
    steps: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.noise_multiplier < math.inf:
            raise PrivacyError(f"noise multiplier must be a positive number, got {self.noise_multiplier}.")
        if not 0 < self.sample_rate <= 1:
            raise PrivacyError(f"sample rate must be above 0 and at most 1, got {self.sample_rate}.")
        if self.steps < 1:
            raise PrivacyError(f"steps must be at least 1, got {self.steps}.")


def rdp_epsilon(noises: Sequence[Noise], delta: float) -> float:
    """Epsilon of all releases together at delta, by Renyi differential privacy: valid for any parameters, somewhat loose."""
    from opacus.accountants.analysis.rdp import get_privacy_spent

    _check_delta(delta)
    if not noises:
        return 0.0
    divergences = np.sum([steps * _divergences(noise, rate) for noise, rate, steps in _history(noises)], axis=0)
    with warnings.catch_warnings():
        # The smallest or largest order being the best one leaves the bound valid.
        warnings.filterwarnings("ignore", message="Optimal order is the")
        return max(0.0, float(get_privacy_spent(orders=list(ORDERS), rdp=divergences, delta=delta)[0]))


@lru_cache(maxsize=1024)
def _divergences(noise_multiplier: float, sample_rate: float) -> npt.NDArray[np.float64]:
    """RDP of one step at ORDERS; steps add up, so a search over steps or a long ledger pays for it once."""
    from opacus.accountants.analysis.rdp import compute_rdp

    return np.asarray(compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=list(ORDERS)))


def prv_epsilon(noises: Sequence[Noise], delta: float) -> float:
    """Epsilon of all releases together at delta, by privacy random variables: tight, with its numerical error added.

    Raises:
        PrivacyError: the numbers are outside of what the method resolves; the RDP bound still holds.
    """
    from opacus.accountants import PRVAccountant

    _check_delta(delta)
    if not noises:
        return 0.0
    accountant = PRVAccountant()
    accountant.history = _history(noises)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=RuntimeWarning)  # log(1 - q) at q = 1 is -inf, as it should be
            warnings.filterwarnings(
                "ignore", category=UserWarning
            )  # orders at an end of their range, tails of integrals
            epsilon = float(accountant.get_epsilon(delta, eps_error=PRV_ERROR))
    except (RuntimeError, ValueError, MemoryError) as error:
        raise PrivacyError(f"PRV cannot resolve this composition ({error}). Use the RDP bound.") from error
    if not math.isfinite(epsilon):
        raise PrivacyError("PRV cannot resolve this composition. Use the RDP bound.")
    return max(0.0, epsilon)


def epsilon_of(noises: Sequence[Noise], delta: float) -> float:
    """The smaller of the two bounds, both of which hold; without any subsampling the exact value.

    Args:
        noises: releases about the same patients, in any order.
        delta: in (0, 1).

    Returns:
        Epsilon; 0 for no release.

    Raises:
        PrivacyError: delta is out of range.
    """
    _check_delta(delta)
    return _epsilon_of(tuple(Noise(*equal) for equal in _history(noises)), delta)


@lru_cache(maxsize=256)
def _epsilon_of(noises: tuple[Noise, ...], delta: float) -> float:
    """Kept, because a site asks for the same composition several times a round, and PRV takes a second."""
    if not noises:
        return 0.0
    if all(noise.sample_rate == 1 for noise in noises):
        sensitivity = math.sqrt(math.fsum(noise.steps / noise.noise_multiplier**2 for noise in noises))
        return gaussian_epsilon(1.0, delta, sensitivity)
    bound = rdp_epsilon(noises, delta)
    if bound > _PRV_UP_TO or bound < PRV_ERROR:
        return bound
    try:
        return min(bound, prv_epsilon(noises, delta))
    except PrivacyError as error:
        _logger.debug("%s", error)
        return bound


def noise_for(epsilon: float, delta: float, *, sample_rate: float, steps: int, before: Sequence[Noise] = ()) -> float:
    """Smallest noise multiplier with which `steps` steps stay within (epsilon, delta), to 0.5% and rounded up.

    Args:
        epsilon, delta: of the steps and what was released before, together.
        sample_rate: chance of a patient to be drawn in a step; 1 where all take part.
        steps: how many.
        before: what was released about the same patients already.

    Raises:
        PrivacyError: an argument is out of range, or no noise is enough.
    """
    if not 0 < epsilon < math.inf:
        raise PrivacyError(f"epsilon must be a positive number, got {epsilon}.")
    _check_delta(delta)
    Noise(1.0, sample_rate, steps)
    if sample_rate == 1 and not before:
        return gaussian_sigma(epsilon, delta, math.sqrt(steps))
    gone = epsilon_of(before, delta)
    if gone >= epsilon:
        raise PrivacyError(f"Epsilon {gone:.3g} at delta {delta:g} is spent already; nothing is left of {epsilon:g}.")

    def holds(bound: Callable[[Sequence[Noise], float], float], noise: float) -> bool:
        return bound([*before, Noise(noise, sample_rate, steps)], delta) <= epsilon

    def needed(bound: Callable[[Sequence[Noise], float], float], low: float, high: float) -> float:
        while high - low > 0.005 * high:
            middle = (low + high) / 2
            low, high = (low, middle) if holds(bound, middle) else (middle, high)
        return high

    first = epsilon_of if before else rdp_epsilon  # what is spent may fit by the tighter bound only
    high = 0.5
    while not holds(first, high):
        high *= 2
        if high > 1e6:
            raise PrivacyError(
                f"No noise keeps {steps} steps at rate {sample_rate} within epsilon {epsilon}; take fewer steps."
            )
    high = needed(first, 0.0 if high == 0.5 else high / 2, high)
    if epsilon < 10 * PRV_ERROR or first is epsilon_of:
        return high
    return needed(epsilon_of, 0.6 * high, high)  # PRV is the slow one, and never this much better


def _history(noises: Sequence[Noise]) -> list[tuple[float, float, int]]:
    """Opacus' form; equal releases are counted together, which its accountants need to stay fast."""
    steps: dict[tuple[float, float], int] = {}
    for noise in noises:
        key = (noise.noise_multiplier, noise.sample_rate)
        steps[key] = steps.get(key, 0) + noise.steps
    return [(*key, count) for key, count in sorted(steps.items())]


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise PrivacyError(
            f"delta must lie between 0 and 1, got {delta}. A usual choice is below 1 / number of patients."
        )
