"""What a study found, as data: written by the statistics, read by sentences, page and tables.

Everything here becomes JSON with `differences.findings.to_json`. Arms are named as their folders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nnunet_fedharm.differences.findings import Estimate
from nnunet_fedharm.differences.options import SIGNIFICANT

FEWEST_SEEDS = 3
"""Trainings of an arm from which sentences speak of methods; with fewer they are called exploratory."""

BETTER, WORSE, UNCLEAR = "better", "worse", "unclear"


@dataclass(frozen=True)
class GapFinding:
    """Share of the gap between control and oracle that an arm recovers.

    Attributes:
        sites: over which gains and gaps are summed.
        recovered: None where the gap itself is not certain, for a ratio to nothing says nothing.
        gap: mean over the sites of oracle - control.
    """

    sites: tuple[str, ...]
    recovered: Estimate | None
    gap: Estimate


@dataclass(frozen=True)
class ArmFinding:
    """One arm.

    Attributes:
        arm: its name.
        title: for readers.
        kind: harmonizer or baseline. mode: central, federated or local. epsilon: asked for, or None.
        seeds: trainings with a result.
        dice, hd95_mm: site -> mean over cases and trainings.
        worst_site: with the lowest mean Dice; worst: the lowest site mean, in each draw of whatever site it is there.
        target: mean over the target sites of Dice; None if one was not tested.
        gap: None for arms without it: control, oracle, and arms that miss a target site.
        seed_means: Dice over the target sites (else all tested ones) of each training.
    """

    arm: str
    title: str
    kind: str
    mode: str
    augmentation: bool
    epsilon: float | None
    site: str
    seeds: int
    dice: dict[str, Estimate]
    hd95_mm: dict[str, Estimate]
    worst_site: str | None
    worst: Estimate
    target: Estimate | None
    gap: GapFinding | None
    seed_means: list[float] = field(default_factory=list)


def failed_at(arm: ArmFinding, sites: Sequence[str], least_dice: float) -> tuple[str, ...]:
    """Sites where an arm's mean Dice is unknown or below `least_dice`: a mean over sites would hide one that failed."""
    dice = {site: estimate.value for site, estimate in arm.dice.items()}
    return tuple(site for site in sites if (value := dice.get(site)) is None or value < least_dice)


@dataclass(frozen=True)
class Equivalence:
    """Is the mean difference within a margin?

    Attributes:
        margin: of Dice, on either side.
        p: of TOST, against a mean difference at or beyond the margin on any side.
        p_not_worse: of its lower test alone, against a mean difference of -margin or less (non-inferiority).
            Both adjusted by Holm within the family.
        interval: 90% bootstrap interval over patients and trainings, which has to keep within the margin too: t tests know
            the patients only.
    """

    margin: float
    p: float | None
    p_not_worse: float | None
    interval: Estimate

    @property
    def shown(self) -> bool:
        """Equally good within the margin."""
        low, high = self.interval.low, self.interval.high
        inside = low is not None and high is not None and -self.margin < low and high < self.margin
        return inside and self.p is not None and self.p < SIGNIFICANT

    @property
    def not_worse(self) -> bool:
        """Not worse by the margin or more, whatever the other side is."""
        low = self.interval.low
        inside = low is not None and -self.margin < low
        return inside and self.p_not_worse is not None and self.p_not_worse < SIGNIFICANT


@dataclass(frozen=True)
class Comparison:
    """Two arms, paired by patient.

    Attributes:
        family: tests that share a Holm correction.
        first, second: arms; the difference is first - second.
        sites: whose patients.
        difference: mean over patients of their difference in Dice, 95% bootstrap interval over patients and trainings.
        p: Wilcoxon signed-rank of the patients' differences, each a mean over trainings. adjusted: by Holm.
        patients, seeds: how many; seeds that both arms have.
        equivalence: where it was asked.
    """

    family: str
    first: str
    second: str
    sites: tuple[str, ...]
    difference: Estimate
    p: float | None
    adjusted: float | None
    patients: int
    seeds: int
    equivalence: Equivalence | None = None

    @property
    def verdict(self) -> str:
        """better, worse or unclear: the adjusted p is small and the interval lies on one side of 0."""
        low, high = self.difference.low, self.difference.high
        if self.adjusted is None or self.adjusted >= SIGNIFICANT or low is None or high is None:
            return UNCLEAR
        return BETTER if low > 0 else WORSE if high < 0 else UNCLEAR

    @property
    def exploratory(self) -> bool:
        """Too few trainings to speak of methods."""
        return self.seeds < FEWEST_SEEDS


@dataclass(frozen=True)
class ControlFinding:
    """A check whose answer is known beforehand.

    Attributes:
        name: what is checked. passed: None where it cannot be told.
        words: one sentence with the numbers.
    """

    name: str
    passed: bool | None
    words: str


@dataclass(frozen=True)
class CostFinding:
    """What an arm took: means over its trainings.

    Attributes:
        bytes_up, bytes_down: of weights, all sites together.
        epsilon: the largest that any training spent; delta: its chance to fail.
        without_noise: releases about patients that have no epsilon.
        shared_s, adapt_s: as in `results.Cost`, of the trainings that recorded them; None where none did.
        energy_j: of the trainings that were measured; None where none was. counters: what was read.
    """

    arm: str
    train_s: float
    predict_s: float
    bytes_up: int
    bytes_down: int
    epsilon: float | None
    delta: float | None
    without_noise: tuple[str, ...]
    devices: tuple[str, ...]
    energy_j: float | None = None
    counters: tuple[str, ...] = ()
    shared_s: float | None = None
    adapt_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class StudyFindings:
    """Everything on the page but pictures.

    Attributes:
        targets: sites that the questions are about: those without labels, or all where every site has labels.
        held_out: those of them that took part in no central or federated training, as a new hospital.
        patients: site -> test patients; patients_total counts one who is at several sites once.
        control: name of its arm; oracles: site -> arm on the site's own labels.
        against_control: every arm that is no oracle and not private, over the targets together.
        at_each_site: the same at each target.
        against_augment: central harmonizers against strong random augmentation, over the targets.
        federated: federated against central of the same kind, with equivalence, over the targets where central has learned to
            segment (`failed_at`); over all of them where it has at none.
        gap_tests: own labels against the control at each site that has an oracle.
        private: each private arm against the same without privacy, over the targets where that one has learned; else over all.
        private_at_labels: the same over the sites whose labels were used, where these are others.
        points: federated arm -> (site, central, federated) Dice of each case at the targets, means over common trainings.
        at_reference: harmonizers against plain nnU-Net of their mode at the reference site, with equivalence; against the
            control where plain nnU-Net of their mode has no result.
        quality: arm -> as `nnunet-fedharm quality` writes it, of the first seed.
        missing: cells of the study file that have no result.
        notes: sentences on what was not measured though the dataset or [report] asks for it.
    """

    name: str
    dataset: str
    created: str
    configuration: str
    sites: tuple[str, ...]
    labelled: tuple[str, ...]
    reference: str
    targets: tuple[str, ...]
    patients: dict[str, int]
    patients_total: int
    control: str
    oracles: dict[str, str]
    arms: list[ArmFinding]
    gaps: dict[str, Estimate]
    against_control: list[Comparison]
    at_each_site: list[Comparison]
    against_augment: list[Comparison]
    federated: list[Comparison]
    points: dict[str, list[tuple[str, float, float]]]
    private: list[Comparison]
    at_reference: list[Comparison]
    controls: list[ControlFinding]
    costs: list[CostFinding]
    quality: Mapping[str, Any]
    epsilons: tuple[float, ...]
    modes: tuple[str, ...]
    missing: list[str]
    settings: dict[str, Any]
    held_out: tuple[str, ...] = ()
    gap_tests: list[Comparison] = field(default_factory=list)
    private_at_labels: list[Comparison] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def arm(self, name: str) -> ArmFinding:
        """An arm by name."""
        return next(item for item in self.arms if item.arm == name)

    def failed_at(self, name: str) -> tuple[str, ...]:
        """Target sites that an arm segments too badly to be a measure for another one there."""
        return failed_at(self.arm(name), self.targets, self.least_dice)

    def failed(self, name: str) -> bool:
        """Whether it does so at all of them."""
        return self.failed_at(name) == self.targets

    @property
    def least_dice(self) -> float:
        """Mean Dice below which an arm has not learned to segment."""
        return float(self.settings["least_dice"])

    @property
    def control_dice(self) -> float | None:
        """Mean Dice of the control over the sites whose labels it was trained with."""
        found = [self.arm(self.control).dice.get(site) for site in self.labelled]
        values = [estimate.value for estimate in found if estimate is not None and estimate.value is not None]
        return sum(values) / len(values) if values else None
