"""Tests of paired differences between two arms, one difference a patient.

| test | null hypothesis | how |
|---|---|---|
| `signed_rank` | differences are symmetric about 0 | Wilcoxon's signed ranks, exact for any zeros and ties |
| `equivalence` | the mean difference is at or beyond the margin | two one-sided t tests (TOST) |

Zeros are ranked with the others and then left out (Pratt); ties share their middle rank. The null distribution is that of these
ranks with signs thrown by a coin, computed in full, so p is exact where `scipy.stats.wilcoxon` would approximate. Beyond
EXACT_UP_TO differences scipy's normal approximation is taken.

References:
    Wilcoxon, "Individual comparisons by ranking methods", Biometrics Bulletin 1945.
    Pratt, "Remarks on zeros and ties in the Wilcoxon signed rank procedures", JASA 1959.
    Schuirmann, "A comparison of the two one-sided tests procedure and the power approach for assessing the equivalence of
    average bioavailability", J. Pharmacokinet. Biopharm. 1987.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

Vector = npt.NDArray[np.float64]

EXACT_UP_TO = 400
"""Differences; the exact distribution of so many takes some tenths of a second."""

ROUNDED_TO = 12
"""Decimals within which two differences are tied: what is below comes from adding in another order."""


@dataclass(frozen=True)
class OneSided:
    """Two one-sided tests.

    Attributes:
        above: p against a mean difference of -margin or less.
        below: p against a mean difference of +margin or more.
    """

    above: float
    below: float

    @property
    def both(self) -> float:
        """p of equivalence: both have to be rejected."""
        return max(self.above, self.below)


def signed_rank(differences: Vector) -> float | None:
    """Two-sided p of Wilcoxon's signed-rank test; None with nothing to test, 1 if all differences are 0.

    Args:
        differences: (n,), one a patient.
    """
    found = np.round(differences, ROUNDED_TO)
    if not found.size:
        return None
    if not found.any():
        return 1.0
    if found.size > EXACT_UP_TO:
        return float(stats.wilcoxon(found, zero_method="pratt", correction=True, method="approx").pvalue)
    # Middle ranks are whole or half numbers: twice the ranks are whole, and so are all sums of them.
    doubled = np.rint(2 * stats.rankdata(np.abs(found))).astype(np.int64)[found != 0]
    positive = int(doubled[found[found != 0] > 0].sum())
    distribution = _sums_by_coin(doubled)
    centre, sums = doubled.sum() / 2, np.arange(len(distribution))
    return min(1.0, float(distribution[np.abs(sums - centre) >= abs(positive - centre) - 1e-9].sum()))


def equivalence(differences: Vector, margin: float) -> OneSided | None:
    """TOST of the mean difference against [-margin, margin]; None with fewer than two patients.

    Args:
        differences: (n,), one a patient.
        margin: positive.
    """
    if differences.size < 2:
        return None
    mean, error = float(differences.mean()), float(differences.std(ddof=1)) / differences.size**0.5
    if error < 1e-12:  # all patients alike: nothing is left to chance
        return OneSided(float(mean <= -margin), float(mean >= margin))
    freedom = differences.size - 1
    above, below = (mean + margin) / error, (mean - margin) / error
    return OneSided(float(stats.t.sf(above, freedom)), float(stats.t.cdf(below, freedom)))


def _sums_by_coin(ranks: npt.NDArray[np.int64]) -> Vector:
    """(sum + 1,) chance of each sum of those ranks that a fair coin picks."""
    chances = np.zeros(int(ranks.sum()) + 1)
    chances[0], reached = 1.0, 0
    for rank in ranks:
        shifted = chances[: reached + 1].copy()
        chances[: reached + 1] /= 2
        chances[rank : reached + rank + 1] += shifted / 2
        reached += int(rank)
    return chances
