"""Words of the site report: names that a reader knows, numbers as text, and what a classifier's accuracy means."""

from __future__ import annotations

from dataclasses import replace

from nnunet_fedharm.differences.findings import ClassifierFinding, Findings, PartFinding, SiteCard
from nnunet_fedharm.differences.options import SIGNIFICANT
from nnunet_fedharm.differences.summary import main_part
from nnunet_fedharm.evaluation.words import percent, percent_interval, probability
from nnunet_fedharm.sites.features.table import FOREGROUND, IMAGE, SCALES

Key = tuple[str, str, str]
"""Channel, region, intensity scale."""

FAMILIES = {
    "intensity": "intensity: how bright and how spread the grey values are",
    "texture": "texture: how grey values follow each other from voxel to voxel",
    "quality": "image quality: noise, contrast, sharpness, bias field, spacing, coverage",
    "shape": "shape: the control. A scanner hardly changes it; where it differs, patients or contours differ",
}
"""Family -> what it is."""

_REGIONS = {FOREGROUND: "all labels together", IMAGE: "the whole body in the image"}
_SHORT = {FOREGROUND: "all labels", IMAGE: "whole body"}
_SCALES = {SCALES[0]: "after z-score (what nnU-Net sees)", SCALES[1]: "raw values of the files"}


def region_name(region: str) -> str:
    """A region as a reader knows it."""
    return _REGIONS.get(region, region)


def scale_name(scale: str) -> str:
    """An intensity scale as a reader knows it."""
    return _SCALES.get(scale, scale)


def part_name(key: Key) -> str:
    """One line for a channel, region and scale."""
    channel, region, scale = key
    return f"{channel}, {region_name(region)}, {scale_name(scale)}"


def short_part_name(key: Key) -> str:
    """The same in a table."""
    channel, region, scale = key
    return f"{channel}, {_SHORT.get(region, region)}, {scale}"


def keys(findings: Findings) -> list[Key]:
    """Parts of the report, that of the first screen first."""
    found = dict.fromkeys(
        (part.channel, part.region, part.scale) for variant in findings.variants for part in variant.parts
    )
    main = main_part(findings.variants[0].parts) if findings.variants else None
    first = None if main is None else (main.channel, main.region, main.scale)
    return sorted(found, key=lambda key: (key != first, key[2] != SCALES[0], key[1] != FOREGROUND))


def headline(findings: Findings) -> list[tuple[str, PartFinding]]:
    """(variant, finding) of the first screen: the first part, with families that only other parts of its channel have.

    Image quality belongs to the whole image as it is in the file, so no other part has it.
    """
    order = keys(findings)
    if not order:
        return []
    merged = []
    for name, first in parts_of(findings, order[0]):
        families, shares = dict(first.families), dict(first.share_significant)
        for key in order[1:]:
            for part in (
                found for variant, found in parts_of(findings, key) if variant == name and key[0] == order[0][0]
            ):
                families = {**part.families, **families}
                shares = {**part.share_significant, **shares}
        merged.append((name, replace(first, families=families, share_significant=shares)))
    return merged


def parts_of(findings: Findings, key: Key) -> list[tuple[str, PartFinding]]:
    """(variant, its finding) of one part, as scanned first."""
    return [
        (variant.name, part)
        for variant in findings.variants
        for part in variant.parts
        if (part.channel, part.region, part.scale) == key
    ]


def scanner(card: SiteCard) -> str:
    """ "Siemens, 3 T, T1w MPRAGE"."""
    words = [card.vendor, None if card.field is None else f"{card.field:g} T", card.sequence]
    return ", ".join(str(word) for word in words if word) or "scanner not stated in sites.json"


def is_chance(finding: ClassifierFinding) -> bool:
    """Whether the classifier is within its null; a null of few permutations alone does not make it so."""
    if finding.p is None or finding.null_high is None or finding.accuracy.value is None:
        return False
    return finding.p >= SIGNIFICANT and finding.accuracy.value <= finding.null_high


def classifier_sentence(finding: ClassifierFinding) -> str:
    """What one classifier found, in two sentences."""
    words = f"{finding.method[:1].upper()}{finding.method[1:]}: recognises the site of "
    words += f"{percent_interval(finding.accuracy)} of the volumes"
    words += f" (p\u00a0{_equals(finding.p)})" if finding.p is not None else ""
    return f"{words}. {chance_sentence(finding)}"


def chance_sentence(finding: ClassifierFinding) -> str:
    """What guessing gives, and the null."""
    words = f"Guessing gives {percent(finding.chance)}"
    if finding.null_high is not None:
        words += f"; with shuffled sites 95 of 100 runs stay at or below {percent(finding.null_high)}"
    return words + "."


def _equals(p: float) -> str:
    text = probability(p)
    return (text if text.startswith("<") else f"= {text}").replace(" ", "\u00a0")
