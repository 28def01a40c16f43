"""Lower bound on epsilon from one run with many canaries.

Each of m canaries is put into the run with probability 1/2, independently. The auditor sees the output, guesses "in" or "out" for
r of them and abstains on the others. If the run is (epsilon, delta)-DP in adding or removing one canary, the number W of right
guesses obeys, for every v,

    P[W >= v] <= P[B >= v] + 2 m delta max_{1 <= i <= v} P[v > B >= v - i] / i,   B ~ Binomial(r, e^epsilon / (1 + e^epsilon)).

So an epsilon whose right side is below 1 - confidence is refuted. Nothing but the coins is assumed to be independent, so the
bound holds whatever the scores are. Scores and numbers of guesses that are tried side by side share the error (Bonferroni).

References:
    Steinke, Nasr, Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS 2023, theorem 5.2 and corollary 5.4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import bdtrc, expit, gammaln, log_expit

from nnunet_fedharm.errors import PrivacyError

Scores = npt.NDArray[np.floating[Any]]
Bits = npt.NDArray[np.bool_]

GUESSED_SHARES = (0.02, 0.1, 0.25, 0.5, 1.0)
"""Shares of the canaries that are guessed, half of them as in and half as out; fixed before the run."""
CONFIDENCE = 0.95
DELTA_BY_CANARY = 0.01
"""Delta times canaries, at most: with more, the theorem's last term leaves nothing to be shown."""
_HIGHEST = 60.0
"""Epsilon above which nobody asks."""


@dataclass(frozen=True)
class OneRun:
    """The best of the tried guesses.

    Attributes:
        canaries, included: how many there were, and how many of them were put in.
        score: name of the score that guessed best.
        guesses, correct: of that score.
        epsilon_low: with `confidence`, over all tried guesses together, epsilon is at least this; 0: nothing is shown.
        most: the largest lower bound that these canaries could have shown, all guesses right.
        delta, confidence: of both bounds.
        tried: correct guesses and bound of each score and number of guesses.
    """

    canaries: int
    included: int
    score: str
    guesses: int
    correct: int
    epsilon_low: float
    most: float
    delta: float
    confidence: float
    tried: tuple[dict[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def audited_delta(delta: float, canaries: int) -> float:
    """The delta to audit at: the claim's, or a smaller one where that would hide everything.

    A mechanism whose noise is known has an epsilon at every delta, so the accountant is asked for the one at this delta.
    """
    return min(delta, DELTA_BY_CANARY / canaries)


def p_value(canaries: int, guesses: int, correct: int, *, epsilon: float, delta: float) -> float:
    """Chance of at least so many right guesses under (epsilon, delta)-DP, at most.

    Raises:
        PrivacyError: not 0 <= correct <= guesses <= canaries, or epsilon or delta out of range.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise PrivacyError(f"{correct} right of {guesses} guesses on {canaries} canaries cannot be.")
    if not (epsilon >= 0 and 0 <= delta < 1):
        raise PrivacyError(f"Epsilon must not be negative and delta lie in [0, 1), got {epsilon} and {delta}.")
    tail = 1.0 if correct == 0 else float(bdtrc(correct - 1, guesses, expit(epsilon)))
    if delta == 0 or correct == 0:
        return min(1.0, tail)
    # P[v > B >= v - i] for i = 1 ... v
    below = np.cumsum(_binomial(np.arange(correct - 1, -1, -1), guesses, epsilon))
    slope = float(np.max(below / np.arange(1, correct + 1)))
    return min(1.0, tail + 2 * canaries * delta * slope)


def _binomial(counts: npt.NDArray[np.int_], trials: int, epsilon: float) -> npt.NDArray[np.float64]:
    """Chances of these counts among `trials` whose log odds are epsilon."""
    choices = gammaln(trials + 1) - gammaln(counts + 1) - gammaln(trials - counts + 1)
    logs = choices + counts * log_expit(epsilon) + (trials - counts) * log_expit(-epsilon)
    return np.asarray(np.exp(logs), dtype=np.float64)


@lru_cache(maxsize=4096)
def epsilon_lower_bound(
    canaries: int, guesses: int, correct: int, *, delta: float, confidence: float = CONFIDENCE
) -> float:
    """Largest epsilon that is refuted at this confidence, rounded down; 0 if none is.

    Raises:
        PrivacyError: see `p_value`.
    """

    def refuted(epsilon: float) -> bool:
        return p_value(canaries, guesses, correct, epsilon=epsilon, delta=delta) < 1 - confidence

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while high < _HIGHEST and refuted(high):
        low, high = high, 2 * high
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def count_correct(scores: Scores, included: Bits, guesses: int) -> int:
    """Right guesses if the highest half of `guesses` scores are taken for in and the lowest half for out."""
    order = np.argsort(scores, kind="stable")
    above = guesses // 2
    below = guesses - above
    return int(included[order[len(order) - above :]].sum() + (~included[order[:below]]).sum())


def audit_scores(
    scores: Mapping[str, Scores],
    included: Bits,
    *,
    delta: float,
    confidence: float = CONFIDENCE,
    shares: Sequence[float] = GUESSED_SHARES,
) -> OneRun:
    """Guess by every score and share, and bound epsilon by the best of them.

    Args:
        scores: name -> one number per canary, higher for canaries that look as if they were in.
        included: one bit per canary.
        delta: of the claim.
        confidence: of the bound, over all guesses that are tried.
        shares: of the canaries that are guessed.

    Raises:
        PrivacyError: fewer than two canaries, a score that is not a number, or delta out of range.
    """
    count = len(included)
    if count < 2:
        raise PrivacyError(f"An audit needs at least 2 canaries, got {count}.")
    for name, values in scores.items():
        if not np.isfinite(values).all():
            raise PrivacyError(
                f"The score {name!r} of a canary is not a number; the run has diverged. Audit fewer steps."
            )
    numbers = sorted({max(1, round(share * count)) for share in shares})
    each = 1 - (1 - confidence) / (len(numbers) * len(scores))
    tried: list[dict[str, Any]] = []
    for name, values in scores.items():
        for guesses in numbers:
            correct = count_correct(values, included, guesses)
            bound = epsilon_lower_bound(count, guesses, correct, delta=delta, confidence=each)
            tried.append({"score": name, "guesses": guesses, "correct": correct, "epsilon_low": bound})
    best = max(tried, key=lambda entry: (entry["epsilon_low"], entry["correct"] / entry["guesses"], entry["guesses"]))
    most = max(epsilon_lower_bound(count, r, r, delta=delta, confidence=each) for r in numbers)
    return OneRun(
        count, int(included.sum()), best["score"], best["guesses"], best["correct"], best["epsilon_low"], most, delta,
        confidence, tuple(tried),
    )  # fmt: skip
