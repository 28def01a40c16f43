"""Two-sample audit of the statistics that leave a private site with noise: fingerprint summary and style.

The mechanism draws many times for patients of which one is a canary, and as often for the same patients with nothing in the
canary's place (the number of patients is public). The canary is as wild as images can make it. Scores are projections on the
difference of the two exact answers, the most telling direction; exact limits of the rates bound epsilon from below
(`rates.epsilon_lower_bound`). Draws are independent, so here the bound is a proof at its confidence.

References:
    Jagielski, Ullman, Oprea, "Auditing Differentially Private Machine Learning: How Private is Private SGD?", NeurIPS 2020.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import norm

from nnunet_fedharm.errors import PrivacyError
from nnunet_fedharm.evaluation.audit.rates import epsilon_lower_bound, largest_bound
from nnunet_fedharm.harmonizers.style import QUANTILE_LEVELS
from nnunet_fedharm.planning.private_style import CLIP, OFFSET, private_style
from nnunet_fedharm.planning.private_summary import private_summary
from nnunet_fedharm.planning.summary import CaseSummary
from nnunet_fedharm.privacy.accounting import Noise, epsilon_of
from nnunet_fedharm.privacy.noise import SecureNoise

Vector = npt.NDArray[np.float64]
Draw = Callable[[bool, float], Vector]
"""Whether the canary is in, and the noise multiplier -> what leaves the site."""
PATIENTS = 40
CONFIDENCE = 0.95


@dataclass(frozen=True)
class StatisticAudit:
    """The claim beside what was found.

    Attributes:
        what: release. draws: with the canary, and as many without. delta: of the claim.
        claimed: epsilon of one release by the accountant. epsilon_low: refuted below that; 0: nothing is shown.
        most: the bound that so many draws could show.
        share: what the canary moved, in sensitivities; promised is at most 1.
    """

    what: str
    draws: int
    delta: float
    claimed: float
    epsilon_low: float
    most: float
    share: float

    @property
    def refuted(self) -> bool:
        """Whether the claim is wrong, with 95% confidence, or the canary moves more than the sensitivity."""
        return self.epsilon_low > self.claimed or self.share > 1 + 1e-9

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "refuted": self.refuted}


def audit_statistic(
    what: str, draw: Draw, *, noise_multiplier: float, sensitivity: float, draws: int = 1000, delta: float = 1e-3
) -> StatisticAudit:
    """Bound the epsilon of one release from many.

    Args:
        what: name.
        draw: the mechanism.
        noise_multiplier: of the claim.
        sensitivity: largest change of the exact answer by one patient (L2).
        draws: of each kind.
        delta: of the claim.

    Raises:
        PrivacyError: fewer than ten draws, or a canary that changes nothing.
    """
    if draws < 10:
        raise PrivacyError(f"An audit of a statistic needs at least 10 draws, got {draws}.")
    without, inside = draw(False, 0.0), draw(True, 0.0)
    length = float(np.linalg.norm(inside - without))
    if length == 0:
        raise PrivacyError(f"The canary does not change {what}: there is nothing to audit.")
    direction = (inside - without) / length
    members, others = (
        np.array([float(direction @ (draw(canary, noise_multiplier) - without)) for _ in range(draws)])
        for canary in (True, False)
    )
    return StatisticAudit(
        what,
        draws,
        delta,
        epsilon_of([Noise(noise_multiplier)], delta),
        epsilon_lower_bound(members, others, delta=delta, confidence=CONFIDENCE),
        largest_bound(draws, draws, delta=delta, confidence=CONFIDENCE),
        length / sensitivity,
    )


def audit_fingerprint(*, noise_multiplier: float, draws: int = 1000, delta: float = 1e-3) -> StatisticAudit:
    """Of the fingerprint summary: hippocampus crops, and a canary with slices of two metres."""
    usual = [(f"case{i}", CaseSummary((1.0, 1.0, 1.0), (35, 50, 36), 1.0, False, ())) for i in range(PATIENTS)]
    canary = ("canary", CaseSummary((2048.0, 2048.0, 2048.0), (4000, 4000, 4000), 0.1, False, ()))
    noise = SecureNoise()

    def draw(inside: bool, sigma: float) -> Vector:
        cases = [*usual, canary] if inside else usual
        told = private_summary(cases, {}, site="A", measured=(), noise_multiplier=sigma, noise=noise)
        return np.array(told.sums)

    return audit_statistic(
        "fingerprint summary", draw, noise_multiplier=noise_multiplier, sensitivity=1.0, draws=draws, delta=delta
    )


def audit_style(*, noise_multiplier: float, draws: int = 1000, delta: float = 1e-3) -> StatisticAudit:
    """Of a style: normal images, and a canary whose offset no image has."""
    noise, levels = SecureNoise(), norm.ppf(QUANTILE_LEVELS)
    quantiles, nothing = np.tile(levels, (PATIENTS, 1, 1)), np.full((PATIENTS, 1), OFFSET)
    offsets = nothing.copy()
    offsets[0] = OFFSET + 1e3

    def draw(inside: bool, sigma: float) -> Vector:
        style = private_style(quantiles, offsets if inside else nothing, noise_multiplier=sigma, noise=noise)
        return np.concatenate([style.quantiles.reshape(-1), style.offset])

    # One patient's terms over all patients; the offset is told with half its weight.
    return audit_statistic(
        "style", draw, noise_multiplier=noise_multiplier, sensitivity=2 * CLIP / PATIENTS, draws=draws, delta=delta
    )
