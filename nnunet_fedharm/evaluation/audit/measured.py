"""The released gradients beside the mechanism's description: where an implementation differs from it, if it does.

A lower bound on epsilon says that something is wrong, and only if it is very wrong. The noise's size and independence, a canary's
share after clipping and the draws can each be measured well with few steps, and say what is wrong. A chance of LEVEL each of
crying wolf.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest, chi2, norm

Array = npt.NDArray[np.floating[Any]]
Bits = npt.NDArray[np.bool_]

LEVEL = 1e-5


@dataclass(frozen=True)
class Measured:
    """In units of the clip.

    Attributes:
        noise: standard deviation at coordinates of canaries that are out; promised is the noise multiplier.
        noise_values: numbers behind it.
        contribution: mean of what a drawn canary added; promised is at most 1.
        contribution_error: its standard error.
        draws, participation: steps times canaries that were in, and the share of them in which one took part; promised is the
            sample rate.
        repeats: largest correlation, without its sign, of the noise of two steps in a row; promised is 0.
        repeats_limit: what chance alone exceeds with LEVEL.
        shared, shared_limit: the same for equal places of two tensors in one step; None where no two tensors are of one size.
    """

    noise: float
    noise_values: int
    contribution: float
    contribution_error: float
    draws: int
    participation: float
    repeats: float
    repeats_limit: float
    shared: float | None
    shared_limit: float | None

    def suspicions(self, noise_multiplier: float, sample_rate: float) -> list[str]:
        """Sentences on what is not as promised; empty if all is."""
        found = []
        most = self.noise * math.sqrt(self.noise_values / chi2.ppf(LEVEL, self.noise_values)) if self.noise else 0.0
        if most < noise_multiplier:
            found.append(f"The noise is {self.noise:.3g} clips, less than the promised {noise_multiplier:.3g}.")
        # Where there is hardly any noise, what correlates is the patients' own gradients.
        there = self.noise > noise_multiplier / 10
        if self.contribution - norm.isf(LEVEL) * self.contribution_error > 1 + 1e-3:
            found.append(f"A canary moved the sum by {self.contribution:.3g} clips; clipping promises at most 1.")
        if binomtest(round(self.participation * self.draws), self.draws, sample_rate).pvalue < LEVEL:
            found.append(f"Canaries took part in {self.participation:.1%} of the steps instead of {sample_rate:.1%}.")
        repeats = there and self.repeats > self.repeats_limit
        if repeats:
            found.append(
                f"The noise of two steps in a row correlates by {self.repeats:.2f}; it should be new in every step."
            )
        # Noise that repeats makes few independent pairs of many, which the limit for many does not fit.
        shared = self.shared is not None and self.shared_limit is not None and self.shared > self.shared_limit
        if there and shared and not repeats:
            found.append(f"Two tensors of a step share noise: it correlates by {self.shared:.2f}.")
        return found


def measure(own: Array, twin: Array, signs: Array, included: Bits, drawn: Bits) -> Measured:
    """From the released gradients at the canaries' places.

    Args:
        own, twin: (T, m) in clips; `twin` is NaN where there is none.
        signs: (T,) of the canaries' gradients.
        included: (m,), drawn: (T, m).
    """
    out, mates = own[:, ~included], twin[:, ~included]
    both = ~np.isnan(mates)
    took = drawn[:, included]
    added = (signs[:, None] * own)[:, included][took]
    pairs = list(pairwise(out))
    return Measured(
        noise=float(np.sqrt(np.mean(out**2))),
        noise_values=out.size,
        contribution=float(added.mean()) if added.size else math.nan,
        contribution_error=float(added.std() / math.sqrt(added.size)) if added.size else math.nan,
        draws=took.size,
        participation=float(took.mean()),
        repeats=max((_correlation(first, second) for first, second in pairs), default=0.0),
        repeats_limit=_limit(out.shape[1], len(pairs)),
        shared=_correlation(out[both], mates[both]) if both.sum() > 2 else None,
        shared_limit=_limit(int(both.sum()), 1) if both.sum() > 2 else None,
    )


def _correlation(first: Array, second: Array) -> float:
    """Absolute; of values that do not vary 0, as there is no noise to share."""
    if first.std() == 0 or second.std() == 0:
        return 0.0
    return abs(float(np.corrcoef(first, second)[0, 1]))


def _limit(count: int, tests: int) -> float:
    """Of the largest of some absolute correlations of independent numbers (Fisher's z)."""
    if count < 4 or tests < 1:
        return 1.0
    return math.tanh(float(norm.isf(LEVEL / (2 * tests))) / math.sqrt(count - 3))
