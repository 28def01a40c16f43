"""Bootstrap draws of a study: patients and trainings with replacement, the same patients for every arm.

In a draw each patient counts as often as drawn, at every site that has the patient, and each training (seed) as often as drawn,
in every arm: arms are compared on the same patients and on trainings of the same seeds, which may share their first weights. So
an interval says what other patients and other trainings could have shown.

Patients are drawn within groups that were seen at the same sites, which keeps the number of patients of each site; a patient who
is alone in a group is drawn with the largest group that shares a site. Few trainings tell little about their spread: with three,
intervals are somewhat too narrow.

References:
    Efron, Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13 (percentile interval).
    Davison, Hinkley, "Bootstrap Methods and their Application", 1997, section 3.8 (several sources of variation).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nnunet_fedharm.differences.findings import Estimate

Vector = npt.NDArray[np.float64]
Scores = npt.NDArray[np.float64]
"""(seeds, cases)."""

RESAMPLES = 2000


@dataclass(frozen=True)
class Drawn:
    """A number and what it was in each draw.

    Attributes:
        value: of the data; NaN if it is not defined.
        draws: (B,).
    """

    value: float
    draws: Vector

    def __sub__(self, other: Drawn) -> Drawn:
        return Drawn(self.value - other.value, self.draws - other.draws)

    def estimate(self, level: float = 0.95) -> Estimate:
        """With its percentile interval, if there are draws."""
        finite = self.draws[np.isfinite(self.draws)]
        if not np.isfinite(self.value):
            return Estimate(None)
        if not finite.size:
            return Estimate(self.value)
        low, high = np.percentile(finite, [50 * (1 - level), 50 * (1 + level)])
        return Estimate(self.value, float(low), float(high))


def combined(of: Callable[..., Vector], *parts: Drawn) -> Drawn:
    """A function of several numbers, in the data and in each draw; it works on arrays, draws along the last axis."""
    value = of(*(np.array([part.value]) for part in parts))
    return Drawn(float(value[0]), of(*(part.draws for part in parts)))


class Draws:
    """Draws of patients and trainings.

    Args:
        patients: site -> patient of each of its test cases, in the order of the scores.
        resamples: B.
        seed: of everything.
    """

    def __init__(self, patients: Mapping[str, Sequence[str]], *, resamples: int = RESAMPLES, seed: int = 0) -> None:
        self.patients = {site: list(names) for site, names in patients.items()}
        self.names = sorted({name for names in self.patients.values() for name in names})
        self.resamples, self.seed = resamples, seed
        self._place = {name: index for index, name in enumerate(self.names)}
        self._weights = self._draw_patients()

    def site(self, scores: Scores, site: str) -> Drawn:
        """Mean over a site's cases and an arm's trainings.

        Args:
            scores: (seeds, cases); NaN does not count. Arms that are compared have the same seeds.
            site: whose cases.
        """
        places = [self._place[name] for name in self.patients[site]]
        return self._mean(scores, self._weights[:, places])

    def pooled(self, scores: Scores) -> Drawn:
        """Mean over patients and an arm's trainings.

        Args:
            scores: (seeds, patients), in the order of `names`; NaN for a patient who does not count.
        """
        return self._mean(scores, self._weights)

    def by_patient(self, scores: Mapping[str, Scores]) -> Scores:
        """(seeds, patients) mean over a patient's cases at the given sites; NaN for patients without one.

        Args:
            scores: site -> (seeds, cases).
        """
        seeds = len(next(iter(scores.values())))
        total, count = np.zeros((seeds, len(self.names))), np.zeros((seeds, len(self.names)))
        for site, found in scores.items():
            places = [self._place[name] for name in self.patients[site]]
            for case, place in enumerate(places):
                known = np.isfinite(found[:, case])
                total[known, place] += found[known, case]
                count[known, place] += 1
        with np.errstate(invalid="ignore"):
            return np.where(count > 0, total / np.maximum(count, 1), np.nan)

    def _mean(self, scores: Scores, patients: Vector) -> Drawn:
        """Mean of (S, C) under weights (B, C) of patients and (B, S) of trainings."""
        known = np.isfinite(scores)
        filled, trainings = np.where(known, scores, 0.0), self._draw_trainings(len(scores))
        counts = ((trainings @ known.astype(np.float64)) * patients).sum(axis=1)
        sums = ((trainings @ filled) * patients).sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            draws = sums / counts
        if int(known.any(axis=0).sum()) < 2:
            draws = np.full(self.resamples, np.nan)  # one patient: no interval
        value = _mean_of_means(filled, known)
        return Drawn(value, draws)

    def _draw_trainings(self, seeds: int) -> Vector:
        """(B, S) how often each training counts: the same for every arm of so many."""
        generator = np.random.default_rng([self.seed, 2])
        return generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=self.resamples).astype(np.float64)

    def _draw_patients(self) -> Vector:
        """(B, P) how often each patient counts."""
        generator = np.random.default_rng([self.seed, 1])
        weights = np.ones((self.resamples, len(self.names)))
        for group in self._groups():
            places = [self._place[name] for name in group]
            chances = np.full(len(group), 1 / len(group))
            weights[:, places] = generator.multinomial(len(group), chances, size=self.resamples)
        return weights

    def _groups(self) -> list[list[str]]:
        """Patients who were seen at the same sites."""
        sites = {name: frozenset(s for s, names in self.patients.items() if name in names) for name in self.names}
        groups: dict[frozenset[str], list[str]] = {}
        for name in self.names:
            groups.setdefault(sites[name], []).append(name)
        for seen in [seen for seen, group in groups.items() if len(group) == 1]:
            near = [other for other in groups if other != seen and other & seen]
            if near:
                target = max(near, key=lambda other: (len(groups[other]), sorted(other)))
                groups[target] = [*groups[target], *groups.pop(seen)]
        return list(groups.values())


def _mean_of_means(filled: Scores, known: npt.NDArray[np.bool_]) -> float:
    """Over all scores that are there."""
    count = int(known.sum())
    return float(filled.sum() / count) if count else float("nan")
