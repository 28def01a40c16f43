"""What a training under differential privacy is asked to keep, as the plans say it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from nnunet_fedharm.errors import PrivacyError
from nnunet_fedharm.privacy.accounting import Noise, epsilon_of, rdp_epsilon
from nnunet_fedharm.privacy.gaussian import gaussian_sigma
from nnunet_fedharm.privacy.releases import Budget, check_delta

PRIVACY_FILE = "privacy.json"
"""Beside the checkpoints: what the training cost, or what a federation promised."""
RESERVE = 0.05
"""Share of further steps that the noise is calibrated for: an epoch that a crash repeats is charged again."""

FINGERPRINT_PART = 0.1
"""Share of the budget, in 1 / squared noise, that the fingerprint summary takes by itself."""
AUTOMATIC = -1.0
VOTE_NOISE = 8.0
"""Least noise multiplier of a site's votes: one such release costs an epsilon of about 0.5 at delta 1e-5."""


@dataclass(frozen=True, kw_only=True)
class PrivacyOptions:
    """DP-SGD by patient; every site finds its own noise from these and from its own number of patients."""

    epsilon: float
    """What all training steps of a run together may cost any patient; the smaller, the more private."""
    delta: float = 1e-5
    """Chance that epsilon does not hold; well below 1 / number of patients."""
    clip: float = 1.0
    """Bound on the L2 norm of one patient's gradient, over all trained tensors together."""
    patients_per_step: float = 8.0
    """Expected number of patients in a step; at a smaller site every patient takes part in each step."""
    patches_per_patient: int = 2
    """Patches whose mean loss is a patient's gradient; more of them cost time and no epsilon."""
    style_noise: float = 5.0
    """Noise multiplier of a site's style, which costs an epsilon of about 0.7 at delta 1e-5; 0 sends it as it is."""

    fingerprint_noise: float = -1.0
    """Noise multiplier of the fingerprint summary; -1 takes what costs a tenth of the budget (in squared noise), 0
    sends it as it is."""

    def __post_init__(self) -> None:
        Budget(self.epsilon, self.delta)
        for name in ("clip", "patients_per_step"):
            if not 0 < getattr(self, name) < math.inf:
                raise PrivacyError(f"privacy.{name} must be a positive number, got {getattr(self, name)}.")
        if not 0 <= self.style_noise < math.inf:
            raise PrivacyError(f"privacy.style_noise must not be negative, got {self.style_noise}.")
        if self.fingerprint_noise != AUTOMATIC and not 0 <= self.fingerprint_noise < math.inf:
            raise PrivacyError(f"privacy.fingerprint_noise must be -1 or not negative, got {self.fingerprint_noise}.")
        if self.patches_per_patient < 1:
            raise PrivacyError(f"privacy.patches_per_patient must be at least 1, got {self.patches_per_patient}.")

    @property
    def budget(self) -> Budget:
        """Of the releases that have noise; what leaves without any is named in the ledger."""
        return Budget(self.epsilon, self.delta, allow_unbounded=True)

    def sample_rate(self, patients: int) -> float:
        """q of a site."""
        return min(1.0, self.patients_per_step / patients)

    def check_delta(self, patients: int, *, who: str = "This training", mend: str = "Give --delta") -> None:
        """Refuse a delta that would allow to publish one patient outright; `who` and `mend` as in `releases.check_delta`.

        Raises:
            PrivacyError: delta is not below 1 / patients.
        """
        check_delta(self.delta, patients, who=who, mend=mend)

    @property
    def fingerprint_multiplier(self) -> float:
        """Noise multiplier of the fingerprint summary; 0 for none."""
        if self.fingerprint_noise != AUTOMATIC:
            return self.fingerprint_noise
        return gaussian_sigma(self.epsilon, self.delta) / math.sqrt(FINGERPRINT_PART)

    def statistics_part(self, *, styled: bool) -> tuple[Noise, ...]:
        """The releases of style and fingerprint, where they have noise.

        Args:
            styled: whether the harmonizer reads styles; else none is measured.
        """
        noises = (self.style_noise if styled else 0.0, self.fingerprint_multiplier)
        return tuple(Noise(noise) for noise in noises if noise)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@cache
def common_noise(epsilon: float, delta: float, parts: tuple[tuple[float, int], ...], fixed: tuple[Noise, ...]) -> float:
    """Smallest noise multiplier with which all parts together stay within (epsilon, delta), to 1% and rounded up.

    Args:
        parts: (sample rate, steps) of each phase; the steps are multiplied by 1 + RESERVE.
        fixed: further releases whose noise is settled.

    Raises:
        PrivacyError: no noise is enough.
    """

    steps = [(rate, math.ceil((1 + RESERVE) * count)) for rate, count in parts]

    def cost(bound: Callable[[Sequence[Noise], float], float], multiplier: float) -> float:
        return bound([*fixed, *(Noise(multiplier, rate, count) for rate, count in steps)], delta)

    def smallest(bound: Callable[[Sequence[Noise], float], float], low: float, high: float) -> float:
        while high - low > 0.01 * high:
            middle = (low + high) / 2
            low, high = (low, middle) if cost(bound, middle) <= epsilon else (middle, high)
        return high

    high = 0.5
    while cost(rdp_epsilon, high) > epsilon:
        high *= 2
        if high > 1e5:
            raise PrivacyError(f"No noise keeps this training within epsilon {epsilon}; take fewer steps.")
    high = smallest(rdp_epsilon, 0.0, high)
    return smallest(epsilon_of, 0.85 * high, high)  # the tight accountant is the slow one, and hardly ever 15% better
