"""What the site report says, as data: written by the statistics (pooled or federated), read by the page.

Everything here becomes JSON with `to_json`; a number that does not exist is None, never NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from nnunet_fedharm.sites.features.table import Failure as Failure  # measured where images are read, listed here

ALL_SITES = "all sites"
"""In the place of a site's name where a federation knows sums over all sites only."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval; None where it cannot be estimated."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class FeatureFinding:
    """One feature between all sites.

    Attributes:
        name, family: `glcm_Contrast`, "texture".
        p, q: of the Kruskal-Wallis test, and after Benjamini-Hochberg over the features of this part.
        effect: eta squared of ranks, (H - k + 1) / (n - k), with a bootstrap interval by patient.
        medians: site -> median.
        n: cases that have the feature.
        histogram: site -> shares of the common bins; edges: (bins + 1,).
    """

    name: str
    family: str
    p: float | None
    q: float | None
    effect: Estimate
    medians: dict[str, float]
    n: int
    edges: list[float] = field(default_factory=list)
    histogram: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class PairFinding:
    """Two sites.

    Attributes:
        first, second: sites.
        ks: median over features of the Kolmogorov-Smirnov distance, in [0, 1].
        wasserstein: median over features of the first Wasserstein distance, in standard deviations over all sites together.
        mmd: unbiased squared maximum mean discrepancy; mmd_p: its permutation p. None where it was not computed.
        by_family: family -> median Wasserstein distance.
        features: features with the largest Wasserstein distance, at most ten: (name, distance).
    """

    first: str
    second: str
    ks: Estimate
    wasserstein: Estimate
    mmd: float | None = None
    mmd_p: float | None = None
    by_family: dict[str, float] = field(default_factory=dict)
    features: list[tuple[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class ClassifierFinding:
    """Can the site be told from the images?

    Attributes:
        method: "random forest on features", "linear discriminant on features", "CNN on slices".
        accuracy: balanced accuracy, patient-grouped cross-validation.
        chance: 1 / sites. null_mean, null_high: mean and 95th percentile with permuted sites. p: permutation p.
        permutations: how many.
        confusion: true site -> predicted site -> volumes.
        features: most important ones: (name, importance); empty where the method has none.
    """

    method: str
    accuracy: Estimate
    chance: float
    null_mean: float | None
    null_high: float | None
    p: float | None
    permutations: int
    confusion: dict[str, dict[str, int]]
    n: int
    features: list[tuple[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class EmbeddingFinding:
    """Volumes in a plane.

    Attributes:
        method: "PCA".
        axes: two labels, with the explained share of variance.
        points: (site, x, y, case); empty in a federation, where no case leaves a site.
        ellipses: site -> (mean x, mean y, semi-axis, semi-axis, angle in degrees), 95% of a normal distribution.
    """

    method: str
    axes: tuple[str, str]
    points: list[tuple[str, float, float, str]]
    ellipses: dict[str, tuple[float, float, float, float, float]]


@dataclass(frozen=True)
class AgreementFinding:
    """Travelling subjects: the same patients at two or more sites.

    Attributes:
        sites: which sites; two for CCC, all for ICC.
        measure: "CCC" or "ICC(2,1)".
        family: of features, or "all".
        median: over features, with a bootstrap interval by patient.
        share_good: share of features at .75 or above.
        n_patients, n_features: what it was computed from.
    """

    sites: tuple[str, ...]
    measure: str
    family: str
    median: Estimate
    share_good: float | None
    n_patients: int
    n_features: int


@dataclass(frozen=True)
class CombatFinding:
    """Held-out ComBat: what correcting the features alone could do. Fitted on other patients than it is judged on.

    Attributes:
        classifier: of the corrected features.
        share_significant: features with q < .05, before and after.
        effect: median eta squared, before and after.
        note: why it is missing or limited, else "".
    """

    classifier: ClassifierFinding | None
    share_significant: tuple[float | None, float | None]
    effect: tuple[float | None, float | None]
    note: str = ""


@dataclass(frozen=True)
class OutlierFinding:
    """A case unlike the others of its own site.

    Attributes:
        score: largest robust z-score, |x - median| / (1.4826 MAD), over features whose site has enough cases.
        features: the three most deviating: (name, signed robust z).
    """

    site: str
    case: str
    score: float
    features: list[tuple[str, float]]


@dataclass(frozen=True)
class PartFinding:
    """All statistics of one channel, region and intensity scale.

    Attributes:
        n: site -> cases that were measured.
        families: family -> median eta squared over its features.
        share_significant: family -> share of features with q < .05.
        notes: what could not be computed and why, in sentences for the page.
    """

    channel: str
    region: str
    scale: str
    n: dict[str, int]
    families: dict[str, Estimate]
    share_significant: dict[str, float]
    features: list[FeatureFinding]
    pairs: list[PairFinding]
    classifiers: list[ClassifierFinding]
    embedding: EmbeddingFinding | None
    agreement: list[AgreementFinding]
    combat: CombatFinding | None
    outliers: list[OutlierFinding]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class VariantFinding:
    """The same cases in one state: "as scanned", or "harmonized by MODEL"."""

    name: str
    parts: list[PartFinding]


@dataclass(frozen=True)
class SiteCard:
    """One row of the scanner table; n_patients counts a travelling subject at each of its sites."""

    site: str
    vendor: str | None
    field: float | None
    sequence: str | None
    n_cases: int
    n_patients: int
    n_labelled: int


@dataclass(frozen=True)
class Findings:
    """The whole report.

    Attributes:
        mode: "pooled" or "federated".
        settings: everything that the numbers depend on: package versions, bins, resampling, permutations, seed.
        variants: as scanned first.
        shared: federated only: (message, what it holds, bytes) of everything that left a site.
    """

    dataset: str
    created: str
    mode: str
    settings: dict[str, Any]
    sites: list[SiteCard]
    variants: list[VariantFinding]
    failures: list[Failure]
    shared: list[tuple[str, str, int]] = field(default_factory=list)


def to_json(value: Any) -> Any:
    """Plain JSON values; NaN and infinity become None."""
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: to_json(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, dict):
        return {str(key): to_json(content) for key, content in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(content) for content in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
