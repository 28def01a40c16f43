"""Two-sample audit of the statistics that leave a private site with noise: fingerprint summary, styles and votes.

The mechanism draws many times for a site's patients and a canary, and as often for the same patients with nothing in the
canary's place (the number of patients is public). The canary is as wild as a patient can be. Scores are projections on the
difference of the two exact answers, the most telling direction; exact limits of the rates bound epsilon from below
(`rates.epsilon_lower_bound`), and the noise from above (`rates.gaussian_lower_bound`). Draws are independent, so here the bounds
are proofs at their confidence. Much noise hides a wrong claim from few draws, so a score is the mean over several releases, and
the claim is that of as many together.

| symbol | here |
|---|---|
| sigma | `noise_multiplier` |
| k | `together` |
| mu | distance of the two means in noises; promised sqrt(k) / sigma at most |

References:
    Jagielski, Ullman, Oprea, "Auditing Differentially Private Machine Learning: How Private is Private SGD?", NeurIPS 2020.
    Nasr et al., "Tight Auditing of Differentially Private Machine Learning", USENIX Security 2023.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import norm
from tqdm import tqdm

from nnunet_fedharm.errors import PrivacyError
from nnunet_fedharm.evaluation.audit.rates import epsilon_lower_bound, gaussian_lower_bound, largest_bound
from nnunet_fedharm.harmonizers.style import QUANTILE_LEVELS, FloatArray
from nnunet_fedharm.planning.histogram import INTENSITY
from nnunet_fedharm.planning.private_style import CLIP, OFFSET, OFFSET_WEIGHT, private_style
from nnunet_fedharm.planning.private_summary import patient_vectors, private_sum
from nnunet_fedharm.planning.summary import CaseSummary
from nnunet_fedharm.privacy.accounting import Noise, epsilon_of
from nnunet_fedharm.privacy.gaussian import gaussian_epsilon
from nnunet_fedharm.privacy.noise import SecureNoise
from nnunet_fedharm.privacy.votes import private_votes

Vector = npt.NDArray[np.float64]
Draw = Callable[[bool, float], Vector]
"""Whether the canary is in, and the noise multiplier -> what leaves the site."""
MOST_TOGETHER = 16
"""Releases behind one score, at most; with that many, mu is near 1 where noise is usual."""


@dataclass(frozen=True, kw_only=True)
class StatisticOptions:
    """How hard an audit of statistics looks."""

    draws: int = 1000
    """Scores with the canary, and as many without; more of them find smaller lacks of noise."""
    confidence: float = 0.95
    """Of each bound: a mechanism that keeps its promise is contradicted in at most 1 of 20 audits."""

    def __post_init__(self) -> None:
        if self.draws < 10:
            raise PrivacyError(f"An audit of a statistic needs at least 10 draws, got {self.draws}.")
        if not 0.5 < self.confidence < 1:
            raise PrivacyError(f"The confidence must lie between 0.5 and 1, got {self.confidence}.")


@dataclass(frozen=True)
class StatisticAudit:
    """The claim beside what was found.

    Attributes:
        what: release.
        patients: of the site, without the canary.
        noise_multiplier: promised.
        draws: scores with the canary, and as many without.
        together: releases behind a score.
        delta: of the claim.
        claimed: epsilon of so many releases by the accountant.
        epsilon_low: refuted below that; 0: nothing is shown.
        gaussian_low: the same against Gaussian noise alone, which is the promise.
        most: the largest `epsilon_low` that so many draws could show.
        noise_most: the noise multiplier is no larger than that; infinite: nothing is shown.
        share: what the canary moved, in sensitivities; promised is at most 1.
        scores: (in sensitivities from the exact answer without the canary, whether it was in).
    """

    what: str
    patients: int
    noise_multiplier: float
    draws: int
    together: int
    delta: float
    claimed: float
    epsilon_low: float
    gaussian_low: float
    most: float
    noise_most: float
    share: float
    scores: tuple[tuple[float, bool], ...]

    @property
    def suspicions(self) -> list[str]:
        """What is not as promised, in words."""
        found = []
        if self.share > 1 + 1e-6:
            found.append(
                f"One patient moved it by {self.share:.3g} sensitivities; the bound on a patient promises at most 1."
            )
        if self.noise_most < self.noise_multiplier:
            found.append(
                f"The noise multiplier is at most {self.noise_most:.3g}, promised are {self.noise_multiplier:.3g}."
            )
        return found

    @property
    def refuted(self) -> bool:
        """Whether the claim is wrong, at the confidence of the bounds, or a patient moves more than the sensitivity."""
        return max(self.epsilon_low, self.gaussian_low) > self.claimed or bool(self.suspicions)

    def to_dict(self) -> dict[str, Any]:
        """Without the scores; JSON has no infinity."""
        content = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "scores"}
        shown = self.noise_most if math.isfinite(self.noise_most) else None
        return {**content, "noise_most": shown, "suspicions": self.suspicions, "refuted": self.refuted}


@dataclass(frozen=True)
class Mechanism:
    """What makes a release, for a site's patients with or without a canary.

    Attributes:
        what: name of the release.
        draw: makes one.
        patients: of the site, without the canary.
        noise_multiplier: that the release is said to have.
        sensitivity: largest change of the exact answer by one patient (L2).
    """

    what: str
    draw: Draw
    patients: int
    noise_multiplier: float
    sensitivity: float


def audit_statistic(
    mechanism: Mechanism, *, delta: float, options: StatisticOptions, progress: bool = False
) -> StatisticAudit:
    """Bound the epsilon of releases from many of them.

    Args:
        delta: of the claim.

    Raises:
        PrivacyError: a canary that changes nothing, or a claim without noise.
    """
    what, draw, noise_multiplier = mechanism.what, mechanism.draw, mechanism.noise_multiplier
    without, inside = draw(False, 0.0), draw(True, 0.0)
    length = float(np.linalg.norm(inside - without))
    if length == 0:
        raise PrivacyError(f"The canary does not change {what}: there is nothing to audit.")
    together = max(1, min(MOST_TOGETHER, round(noise_multiplier**2)))
    claimed = epsilon_of([Noise(noise_multiplier, 1.0, together)], delta)
    direction = (inside - without) / length
    scores = []
    for number in tqdm(range(2 * options.draws), desc=f"Releasing {what}", leave=False, disable=not progress):
        canary = number % 2 == 0
        seen = [direction @ (draw(canary, noise_multiplier) - without) for _ in range(together)]
        scores.append((float(np.mean(seen)) / mechanism.sensitivity, canary))
    members, others = (np.array([score for score, canary in scores if canary is which]) for which in (True, False))
    mu = gaussian_lower_bound(members, others, confidence=options.confidence)
    return StatisticAudit(
        what=what,
        patients=mechanism.patients,
        noise_multiplier=noise_multiplier,
        draws=options.draws,
        together=together,
        delta=delta,
        claimed=claimed,
        epsilon_low=epsilon_lower_bound(members, others, delta=delta, confidence=options.confidence),
        gaussian_low=gaussian_epsilon(1.0, delta, mu) if mu > 0 else 0.0,
        most=largest_bound(options.draws, options.draws, delta=delta, confidence=options.confidence),
        noise_most=math.sqrt(together) / mu if mu > 0 else math.inf,
        share=length / mechanism.sensitivity,
        scores=tuple(scores),
    )


def fingerprint_mechanism(
    cases: Sequence[tuple[str, CaseSummary]],
    patients: Mapping[str, str],
    measured: Sequence[int],
    *,
    noise_multiplier: float,
) -> Mechanism:
    """Of the fingerprint summary; the canary has slices of two metres, and intensities beyond all CT numbers.

    Args:
        cases, patients, measured: as of `patient_vectors`.
    """
    vectors = patient_vectors(cases, patients, measured)
    canary = patient_vectors([("canary", _wild_case(1 + max(measured, default=-1)))], {}, measured)
    with_canary, noise = np.concatenate([vectors, canary]), SecureNoise()

    def draw(inside: bool, sigma: float) -> Vector:
        return private_sum(with_canary if inside else vectors, noise_multiplier=sigma, noise=noise)

    return Mechanism("fingerprint summary", draw, len(vectors), noise_multiplier, sensitivity=1.0)


def style_mechanism(quantiles: FloatArray, offsets: FloatArray, *, what: str, noise_multiplier: float) -> Mechanism:
    """Of a style; the canary has an offset that no image has.

    Args:
        quantiles, offsets: of the patients, as of `private_style`.
    """
    patients, channels, _ = quantiles.shape
    rows = np.concatenate([quantiles, np.broadcast_to(norm.ppf(QUANTILE_LEVELS), (1, *quantiles.shape[1:]))])
    nothing = np.concatenate([offsets, np.full((1, channels), OFFSET)])
    wild = np.concatenate([offsets, np.full((1, channels), OFFSET + 1e3)])
    noise = SecureNoise()

    def draw(inside: bool, sigma: float) -> Vector:
        style = private_style(rows, wild if inside else nothing, noise_multiplier=sigma, noise=noise)
        return np.concatenate([style.quantiles.reshape(-1), style.offset])

    # One patient's terms over all patients; the canary's are in the offsets alone, which are told with half their weight.
    sensitivity = CLIP * math.sqrt(channels) / OFFSET_WEIGHT / (patients + 1)
    return Mechanism(what, draw, patients, noise_multiplier, sensitivity)


def votes_mechanism(votes: torch.Tensor, *, what: str, noise_multiplier: float) -> Mechanism:
    """Of the votes on polarity; the canary votes a hundred times against the others.

    Args:
        votes: (N, C), of the patients, as of `private_votes`.
    """
    patients, channels = votes.shape
    against = torch.where(votes.sum(dim=0, keepdim=True) > 0, -100.0, 100.0).to(votes)
    nothing, inside = torch.cat([votes, torch.zeros_like(against)]), torch.cat([votes, against])
    noise = SecureNoise()

    def draw(canary: bool, sigma: float) -> Vector:
        told = private_votes(inside if canary else nothing, noise_multiplier=sigma, noise=noise)
        return told.double().numpy()

    return Mechanism(what, draw, patients, noise_multiplier, sensitivity=math.sqrt(channels) / (patients + 1))


def _wild_case(channels: int) -> CaseSummary:
    value = 3e4
    channel = ((value, value**2, value, value), {int(INTENSITY.codes(np.array([value]))[0]): 1.0})
    return CaseSummary((2048.0, 2048.0, 2048.0), (4000, 4000, 4000), 0.1, True, (channel,) * channels)
