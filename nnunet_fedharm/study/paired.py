"""Arms against each other, patient by patient, with Holm's correction within each family of questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from nnunet_fedharm.differences.evidence import holm
from nnunet_fedharm.study.draws import Drawn, Draws, Scores, Vector
from nnunet_fedharm.study.findings import Comparison, Equivalence
from nnunet_fedharm.study.matrix import Arm
from nnunet_fedharm.study.results import StudyResults
from nnunet_fedharm.study.signed_rank import equivalence, signed_rank


@dataclass(frozen=True)
class Question:
    """One comparison that is asked: first - second at some sites.

    Attributes:
        measure: whether the second arm segments well enough there to be a measure. Equivalence is asked only then: two arms that
            failed alike are not equally good (ICH E10).
    """

    first: Arm
    second: Arm
    sites: tuple[str, ...]
    measure: bool = True


def compare_family(
    results: StudyResults, draws: Draws, family: str, questions: Sequence[Question], *, margin: float | None = None
) -> list[Comparison]:
    """Answers to the questions whose arms were tested at all their sites with a common seed; the others are left out.

    Args:
        results: finished cells.
        draws: of the study.
        family: name; its tests share a correction.
        questions: in order.
        margin: of equivalence; None does not ask for it.
    """
    answered = [found for item in questions if (found := _compare(results, draws, family, item, margin)) is not None]
    adjusted = holm({index: item.p for index, item in enumerate(answered) if item.p is not None})
    asked = {index: item.equivalence for index, item in enumerate(answered) if item.equivalence is not None}
    equal = holm({index: item.p for index, item in asked.items() if item.p is not None})
    not_worse = holm({index: item.p_not_worse for index, item in asked.items() if item.p_not_worse is not None})
    tested = {
        index: replace(item, p=equal.get(index), p_not_worse=not_worse.get(index)) for index, item in asked.items()
    }
    return [
        replace(item, adjusted=adjusted.get(index), equivalence=tested.get(index))
        for index, item in enumerate(answered)
    ]


def patient_scores(
    results: StudyResults, draws: Draws, arm: Arm, sites: Sequence[str], seeds: Sequence[int]
) -> Scores | None:
    """(seeds, patients) mean Dice over a patient's cases at the sites, in the order of `draws.names`; None if untested."""
    found = {site: scores for site in sites if (scores := results.scores(arm, site, seeds=seeds)) is not None}
    if len(found) < len(sites) or any(len(scores) != len(seeds) for scores in found.values()):
        return None
    return draws.by_patient(found)


def _compare(
    results: StudyResults, draws: Draws, family: str, question: Question, margin: float | None
) -> Comparison | None:
    first, second = question.first, question.second
    seeds = [seed for seed in results.seeds(first) if seed in results.seeds(second)]
    if not seeds or not question.sites:
        return None
    scores = [patient_scores(results, draws, arm, question.sites, seeds) for arm in (first, second)]
    if scores[0] is None or scores[1] is None:
        return None
    # A patient without a score in one arm counts in neither.
    both = np.isfinite(scores[0]).any(axis=0) & np.isfinite(scores[1]).any(axis=0)
    of_first, of_second = (np.where(both, values, np.nan) for values in scores if values is not None)
    change = draws.pooled(of_first) - draws.pooled(of_second)
    paired = np.nanmean(of_first[:, both], axis=0) - np.nanmean(of_second[:, both], axis=0)
    return Comparison(
        family,
        first.name,
        second.name,
        question.sites,
        change.estimate(),
        signed_rank(paired),
        None,
        int(both.sum()),
        len(seeds),
        None if margin is None or not question.measure else _equivalence(paired, change, margin),
    )


def _equivalence(paired: Vector, change: Drawn, margin: float) -> Equivalence:
    sides = equivalence(paired, margin)
    return Equivalence(
        margin, None if sides is None else sides.both, None if sides is None else sides.above, change.estimate(0.9)
    )
