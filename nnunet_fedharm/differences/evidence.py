"""What the tests of one part carry together, for sentences that claim no more.

References:
    Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 1979.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from nnunet_fedharm.differences.findings import ClassifierFinding, Estimate, PairFinding, PartFinding
from nnunet_fedharm.differences.options import SIGNIFICANT
from nnunet_fedharm.differences.panel import CONTROL

K = TypeVar("K")


@dataclass(frozen=True)
class Evidence:
    """What one part's tests carry.

    Attributes:
        sites: large enough to be judged.
        pairs: of these sites, furthest apart first.
        tested: (first, second) whose kernel test is significant after Holm.
        share: of features other than shape with q < .05; None if none was tested.
        recognised: whether a classifier beats its null; None if none was trained against one.
        found: whether sites differ at all, at 5% over all kinds of tests together.
    """

    sites: list[str]
    pairs: list[PairFinding]
    tested: set[tuple[str, str]]
    share: float | None
    recognised: bool | None
    found: bool


def evidence_of(part: PartFinding, large: Sequence[str]) -> Evidence:
    """Evidence of one part.

    Args:
        part: any, also a federated one, whose pairs have no kernel test.
        large: sites with enough patients to be judged; pairs with others are left out.
    """
    pairs = [pair for pair in part.pairs if pair.first in large and pair.second in large]
    adjusted = holm({(pair.first, pair.second): pair.mmd_p for pair in pairs if pair.mmd_p is not None})
    counted = [item.q for item in part.features if item.family != CONTROL and item.q is not None]
    judged = judged_classifiers(part)
    recognition = [corrected_p(item, judged) for item in judged]
    kinds = [values for values in (counted, list(adjusted.values()), recognition) if values]
    return Evidence(
        sites=list(large),
        pairs=sorted(pairs, key=lambda pair: -number(pair.wasserstein.value)),
        tested={pair for pair, p in adjusted.items() if p < SIGNIFICANT},
        share=sum(q < SIGNIFICANT for q in counted) / len(counted) if counted else None,
        recognised=min(recognition) <= SIGNIFICANT if recognition else None,
        found=any(min(values) <= SIGNIFICANT / len(kinds) + 1e-12 for values in kinds),
    )


def holm(p: Mapping[K, float]) -> dict[K, float]:
    """p adjusted for the number of tests (Holm 1979); equal p stay equal."""
    adjusted, reached = {}, 0.0
    for rank, (test, value) in enumerate(sorted(p.items(), key=lambda item: item[1])):
        reached = max(reached, min(1.0, value * (len(p) - rank)))
        adjusted[test] = reached
    return adjusted


def stands_apart(evidence: Evidence) -> str | None:
    """The site whose distances to all others are certainly larger than all others'; None if there is none."""
    if len(evidence.sites) < 3:
        return None
    for site in evidence.sites:
        own = [pair for pair in evidence.pairs if site in (pair.first, pair.second)]
        rest = [pair for pair in evidence.pairs if site not in (pair.first, pair.second)]
        tested = all((pair.first, pair.second) in evidence.tested for pair in own)
        if tested and min(low(pair.wasserstein) for pair in own) > max(high(pair.wasserstein) for pair in rest):
            return site
    return None


def judged_classifiers(part: PartFinding) -> list[ClassifierFinding]:
    """Classifiers with a null that is large enough for a significant p."""
    enough = [item for item in part.classifiers if 1 / (1 + item.permutations) <= SIGNIFICANT]
    return [item for item in enough if item.p is not None and item.accuracy.value is not None]


def corrected_p(item: ClassifierFinding, judged: Sequence[ClassifierFinding]) -> float:
    """p times the classifiers that were tried (Bonferroni), less a rounding error, so that 3 x 1/60 is at 5%."""
    return 1.0 if item.p is None else min(1.0, item.p * len(judged) - 1e-12)


def number(value: float | None) -> float:
    """The number; -1 for none, below every distance, effect and accuracy that counts."""
    return -1.0 if value is None else value


def low(estimate: Estimate) -> float:
    """Lower end; below everything without an interval, so that nothing is claimed."""
    return float("-inf") if estimate.low is None else estimate.low


def high(estimate: Estimate) -> float:
    """Upper end; above everything without an interval."""
    return float("inf") if estimate.high is None else estimate.high
