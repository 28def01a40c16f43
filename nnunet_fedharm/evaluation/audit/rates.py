"""How well a score tells members from non-members, and the epsilon that follows.

| symbol | here |
|---|---|
| AUC | chance that a member's score is above a non-member's, ties half |
| TPR, FPR | share of members, of non-members, with a score above a threshold |

    epsilon >= max(ln((TPR - delta) / FPR), ln((1 - FPR - delta) / (1 - TPR))),   TPR at its lower, FPR at its upper exact limit

Intervals treat cases as independent draws. Cases of one training share one model, so this is the usual approximation and no
proof. `one_run` needs none, but needs members that a coin has chosen.

References:
    Kairouz, Oh, Viswanath, "The Composition Theorem for Differential Privacy", ICML 2015 (rates under DP);
    Clopper, Pearson, Biometrika 1934 (exact limits);
    Carlini et al., "Membership Inference Attacks From First Principles", S&P 2022 (TPR at low FPR);
    Dong, Roth, Su, "Gaussian Differential Privacy", JRSS-B 2022 (rates under Gaussian noise);
    Nasr et al., "Tight Auditing of Differentially Private Machine Learning", USENIX Security 2023 (audits by them).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import beta, norm, rankdata

from nnunet_fedharm.errors import DataError

Values = npt.NDArray[np.floating[Any]]

RESAMPLES = 2000
LOW_RATES = (0.01, 0.05, 0.1)
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
"""Of all scores together, members or not: the thresholds at which epsilon is bounded, fixed before the attack."""


@dataclass(frozen=True)
class Separation:
    """One score's power.

    Attributes:
        name: of the attack.
        auc, auc_low, auc_high: with its 95% bootstrap interval over cases.
        p_value: chance of such an AUC with members and non-members shuffled, one-sided.
        tpr_at: false positive rate -> true positive rate; None where there are too few non-members for that rate.
        epsilon_low: lower bound at `confidence`, over all thresholds; 0: nothing is shown.
        roc: (FPR, TPR) points.
    """

    name: str
    auc: float
    auc_low: float
    auc_high: float
    p_value: float
    tpr_at: dict[float, float | None]
    epsilon_low: float
    roc: list[tuple[float, float]]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def separation(
    name: str, members: Values, others: Values, *, delta: float, confidence: float = 0.95, tests: int = 1, seed: int = 0
) -> Separation:
    """Everything about one score.

    Args:
        name: of the attack.
        members, others: scores, higher for members.
        delta: of the claim.
        confidence: of the bound on epsilon.
        tests: attacks that are tried side by side; they share the error of the bound.
        seed: of bootstrap and permutations.

    Raises:
        DataError: fewer than two cases on a side, or a score that is not a number.
    """
    for side, values in (("members", members), ("non-members", others)):
        if len(values) < 2:
            raise DataError(f"There are {len(values)} {side}; the attack needs at least 2 of each.")
        if not np.isfinite(values).all():
            raise DataError(f"The attack {name!r} gave no number for one of the {side}.")
    generator = np.random.default_rng(seed)
    low, high = _bootstrap(members, others, generator)
    return Separation(
        name,
        auc(members, others),
        low,
        high,
        _permutation(members, others, generator),
        {rate: tpr_at(members, others, rate) for rate in LOW_RATES},
        epsilon_lower_bound(members, others, delta=delta, confidence=1 - (1 - confidence) / tests),
        roc(members, others),
    )


def auc(members: Values, others: Values) -> float:
    """Mann-Whitney's statistic as a share."""
    ranks = rankdata(np.concatenate([members, others]))
    n, m = len(members), len(others)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def roc(members: Values, others: Values) -> list[tuple[float, float]]:
    """(FPR, TPR) at every threshold, from (0, 0) to (1, 1)."""
    points = [(0.0, 0.0)]
    for threshold in np.unique(np.concatenate([members, others]))[::-1]:
        points.append((float(np.mean(others >= threshold)), float(np.mean(members >= threshold))))
    return points


def tpr_at(members: Values, others: Values, rate: float) -> float | None:
    """Largest TPR with at most that FPR; None if even one false positive of so few non-members is more than that."""
    if rate * len(others) < 1:
        return None
    return max(tpr for fpr, tpr in roc(members, others) if fpr <= rate + 1e-12)


def clopper_pearson(count: int, total: int, level: float) -> tuple[float, float]:
    """Exact one-sided limits of a rate, lower and upper, each wrong with a chance of at most `level`."""
    low = 0.0 if count == 0 else float(beta.ppf(level, count, total - count + 1))
    high = 1.0 if count == total else float(beta.ppf(1 - level, count + 1, total - count))
    return low, high


def epsilon_lower_bound(members: Values, others: Values, *, delta: float, confidence: float) -> float:
    """Best bound over QUANTILES and both directions, which share the error; 0 if none is above it."""
    best = 0.0
    for tpr, fpr in _limits(members, others, confidence):
        best = max(best, _log_ratio(tpr - delta, fpr), _log_ratio(1 - fpr - delta, 1 - tpr))
    return best


def gaussian_lower_bound(members: Values, others: Values, *, confidence: float) -> float:
    """Bound on mu, the distance in noises of a Gaussian mechanism's answers: no such mechanism has

        TPR > Phi(Phi^-1(FPR) + mu)

    Finer than epsilon's bound, and against the claim of Gaussian noise alone (Dong, Roth, Su 2022; Nasr et al. 2023). The
    limits are those of `epsilon_lower_bound`, so both bounds hold together at `confidence`.
    """
    found = [norm.ppf(tpr) - norm.ppf(fpr) for tpr, fpr in _limits(members, others, confidence) if tpr > 0 and fpr < 1]
    return max(0.0, *map(float, found)) if found else 0.0


def _limits(members: Values, others: Values, confidence: float) -> list[tuple[float, float]]:
    """(lower limit of TPR, upper limit of FPR) at each of QUANTILES, wrong anywhere with a chance of 1 - confidence."""
    # At each threshold both directions use the same two limits: two statements.
    level, found = (1 - confidence) / (2 * len(QUANTILES)), []
    for threshold in np.quantile(np.concatenate([members, others]), QUANTILES):
        hits, alarms = int(np.sum(members > threshold)), int(np.sum(others > threshold))
        low, high = clopper_pearson(hits, len(members), level)[0], clopper_pearson(alarms, len(others), level)[1]
        found.append((low, high))
    return found


def largest_bound(members: int, others: int, *, delta: float, confidence: float) -> float:
    """The bound of a perfect attack on so many cases: no claim above it can be refuted with them."""
    return epsilon_lower_bound(
        np.arange(members) + float(others), np.arange(others) * 1.0, delta=delta, confidence=confidence
    )


def _log_ratio(first: float, second: float) -> float:
    return math.log(first / second) if first > 0 and second > 0 else 0.0


def _bootstrap(members: Values, others: Values, generator: np.random.Generator) -> tuple[float, float]:
    """Percentile interval of the AUC; members and non-members are drawn apart, as counts of how often each was drawn."""
    above = (members[:, None] > others) + 0.5 * (members[:, None] == others)
    n, m = above.shape
    rows = generator.multinomial(n, np.full(n, 1 / n), RESAMPLES)
    columns = generator.multinomial(m, np.full(m, 1 / m), RESAMPLES)
    values = ((rows @ above) * columns).sum(axis=1) / (n * m)
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _permutation(members: Values, others: Values, generator: np.random.Generator) -> float:
    """(1 + permutations that reach the AUC) / (1 + permutations): never 0."""
    n, found = len(members), auc(members, others)
    ranks = np.tile(rankdata(np.concatenate([members, others])), (RESAMPLES, 1))
    sums = generator.permuted(ranks, axis=1)[:, :n].sum(axis=1)
    reached = (sums - n * (n + 1) / 2) / (n * len(others)) >= found - 1e-12
    return float((1 + reached.sum()) / (1 + RESAMPLES))
