"""The answer in plain sentences, for a physician's first screen; nothing is said that the tests do not carry.

| sentence | said when |
|---|---|
| sites differ | features (q, shape aside), pairs (kernel p, Holm) or classifiers (p, Bonferroni) pass .05 / kinds of tests |
| a site stands apart | the intervals of its distances to all others lie above those of all other distances |
| two sites differ | their kernel test has p < .05 after Holm; else they are only called furthest apart |
| mostly in a family | the interval of its median effect lies above those of all other families |
| a scanner property may explain it | that site, or one of the two, is alone with it, and all others have another one in common |

Sites with fewer than five patients are named as too small and take part in no such sentence.
"""

from __future__ import annotations

from collections.abc import Sequence

from nnunet_fedharm.differences.evidence import (
    Evidence,
    corrected_p,
    evidence_of,
    high,
    judged_classifiers,
    low,
    number,
    stands_apart,
)
from nnunet_fedharm.differences.findings import (
    ALL_SITES,
    Findings,
    PairFinding,
    PartFinding,
    SiteCard,
)
from nnunet_fedharm.differences.notes import APPROXIMATE, joined
from nnunet_fedharm.differences.options import SIGNIFICANT
from nnunet_fedharm.differences.panel import CONTROL
from nnunet_fedharm.differences.scanners import differing_properties, only_one_with
from nnunet_fedharm.sites.features.table import FOREGROUND, SCALES


def describe(findings: Findings) -> list[str]:
    """Sentences on a report: what differs as scanned, and what is left of it in each further variant."""
    if not findings.variants:
        return ["Nothing was measured."]
    sentences = summarize(findings.variants[0].parts, findings.sites)
    before = main_part(findings.variants[0].parts)
    for variant in findings.variants[1:]:
        same = [part for part in variant.parts if before is not None and _key(part) == _key(before)]
        if before is not None and same:
            sentences.append(_change(before, same[0], variant.name))
    return sentences


def summarize(parts: Sequence[PartFinding], cards: Sequence[SiteCard]) -> list[str]:
    """Two to six sentences on the parts of one variant.

    Args:
        parts: of all channels, regions and scales.
        cards: scanners and numbers of patients.
    """
    part = main_part(parts)
    if part is None or not part.n:
        return ["Nothing was measured."]
    if set(part.n) == {ALL_SITES}:
        return _of_sums(part)
    if len(part.n) < 2:
        return [f"Only one site ({next(iter(part.n))}) was measured, so there is nothing to compare."]
    patients = _patients(part, cards)
    large = [site for site in part.n if patients[site] >= APPROXIMATE]
    if len(large) < 2:
        sizes = joined([f"{site} {patients[site]}" for site in part.n])
        return [
            f"The sites are too small to be compared: {sizes} patients. Two sites with {APPROXIMATE} or more are needed to tell "
            "a scanner's mark from the differences between patients."
        ]
    evidence = evidence_of(part, large)
    small = [site for site in part.n if site not in large]
    closing = [f"{joined(small)}: fewer than {APPROXIMATE} patients, too few to be judged."] if small else []
    if not evidence.found:
        return [*_nothing(evidence, min(patients[site] for site in large)), *closing]
    where = f" in {part.channel}" if len({each.channel for each in parts}) > 1 else ""
    return [
        *_furthest(part, evidence, cards, where),
        *_families(part),
        *_recognition(part),
        *_control(part),
        *closing,
    ]


def _of_sums(part: PartFinding) -> list[str]:
    """What the server knows where sites send nothing but masked parts of sums."""
    even = " even after z-score" if part.scale == SCALES[0] else ""
    differing = _families(part)
    first = f"The sites differ{even}." if differing else "No difference between the sites was found."
    closing = "How far each site is from the others only the site knows: the server saw sums over all of them."
    return [first, *differing, *_control(part), closing]


def main_part(parts: Sequence[PartFinding]) -> PartFinding | None:
    """The part that a first screen is about: z-scored foreground, of the channel whose sites are furthest apart."""
    if not parts:
        return None
    rank = min((part.scale != SCALES[0], part.region != FOREGROUND) for part in parts)
    same = [part for part in parts if (part.scale != SCALES[0], part.region != FOREGROUND) == rank]
    return max(same, key=lambda part: max((number(pair.wasserstein.value) for pair in part.pairs), default=-1.0))


def _nothing(evidence: Evidence, smallest: int) -> list[str]:
    said = []
    if evidence.share is not None:
        said.append("no feature passes the false discovery level of 5%")
    if evidence.recognised is not None:
        said.append("no classifier recognises the site better than chance")
    reason = f": {joined(said)}" if said else ""
    return [
        f"No difference between the sites was found{reason}. "
        f"With {smallest} patients at the smallest site, a small one can go unnoticed."
    ]


def _furthest(part: PartFinding, evidence: Evidence, cards: Sequence[SiteCard], where: str) -> list[str]:
    """Which sites, how far, and what their scanners have to do with it."""
    even = " even after z-score" if part.scale == SCALES[0] else ""
    if not evidence.pairs:
        return [f"The sites differ{where}{even}."]
    apart = stands_apart(evidence)
    if apart is not None:
        own = [pair for pair in evidence.pairs if apart in (pair.first, pair.second)]
        words = (
            f"{apart} differs from all other sites more than these differ among each other{where}{even}: {_size(own)}."
        )
        return [words, _explained([apart], evidence.sites, cards) or _none_alone(apart, cards)]
    first = evidence.pairs[0]
    names = f"{first.first} and {first.second}"
    if len(evidence.sites) == 2:
        words = f"{names} differ{where}{even}: {_size([first])}."
    elif (first.first, first.second) in evidence.tested:
        words = f"{names} differ most{where}{even}: {_size([first])}."
    else:
        words = f"The sites differ{where}{even}; {names} are furthest apart: {_size([first])}."
    alone = _explained([first.first, first.second], evidence.sites, cards)
    properties = differing_properties(first.first, first.second, cards)
    return [words, alone or (f"Their scanners differ in {joined(properties)}." if properties else _unknown(cards))]


def _explained(named: Sequence[str], sites: Sequence[str], cards: Sequence[SiteCard]) -> str:
    """What one of the named sites has alone among the judged sites; "" if there is nothing."""
    judged = [card for card in cards if card.site in sites]
    found = [f"{site} is the only site with {alone}" for site in named if (alone := only_one_with(site, judged))]
    return f"{joined(found)}, which may explain it." if found else ""


def _none_alone(site: str, cards: Sequence[SiteCard]) -> str:
    return f"sites.json names no property of a scanner that only {site} has." if _known(cards) else _unknown(cards)


def _known(cards: Sequence[SiteCard]) -> bool:
    return any(card.vendor or card.field or card.sequence for card in cards)


def _unknown(cards: Sequence[SiteCard]) -> str:
    return f"sites.json {'names no difference between their' if _known(cards) else 'says nothing about'} scanners."


def _size(pairs: Sequence[PairFinding]) -> str:
    """How far, in words."""
    distances = sorted(number(pair.wasserstein.value) for pair in pairs)
    shown = (
        f"{distances[0]:.1f}"
        if f"{distances[0]:.1f}" == f"{distances[-1]:.1f}"
        else f"{distances[0]:.1f} to {distances[-1]:.1f}"
    )
    return f"half of the features differ by {shown} standard deviations or more"


def _families(part: PartFinding) -> list[str]:
    """In what, with the share of features."""
    known = {name: each for name, each in part.families.items() if name != CONTROL and each.value is not None}
    shares = {name: part.share_significant.get(name, 0.0) for name in known}
    differing = sorted((name for name in known if shares[name] > 0), key=lambda name: -number(known[name].value))
    if not differing:
        return []
    first = differing[0]
    listed = joined([f"{shares[name]:.0%} of the {name} features" for name in differing])
    others = [known[name] for name in known if name != first]
    if others and low(known[first]) > max(high(each) for each in others):
        return [f"They differ mostly in {first}: {listed} differ significantly."]
    return [f"{listed} differ significantly."]


def _recognition(part: PartFinding) -> list[str]:
    judged = judged_classifiers(part)
    if not judged:
        return []
    beating = [item for item in judged if corrected_p(item, judged) <= SIGNIFICANT]
    if not beating:
        # Nulls of few permutations allow no p that would count after the correction: they say nothing either way.
        told = any(len(judged) / (1 + item.permutations) <= SIGNIFICANT + 1e-12 for item in judged)
        return ["A classifier does not recognise the site better than chance."] if told else []
    best = max(beating, key=lambda item: number(item.accuracy.value))
    source = "slices" if "slices" in best.method else "features"
    return [
        f"A classifier recognises the site of {best.accuracy.value:.0%} of the volumes by their {source} "
        f"(guessing: {best.chance:.0%})."
    ]


def _control(part: PartFinding) -> list[str]:
    share = part.share_significant.get(CONTROL)
    if share is None:
        return []
    if share > 0:
        return [
            f"Shape, which scanners hardly change, differs too ({share:.0%} of its features): patients, voxel sizes or contours "
            "differ as well, not only scanners."
        ]
    return ["Shape, which scanners hardly change, shows no significant difference."]


def _change(before: PartFinding, after: PartFinding, name: str) -> str:
    """What is left of the differences; says nothing about anatomy that may be lost."""
    shares = [evidence_of(part, list(part.n)).share for part in (before, after)]
    words = []
    if shares[0] is not None and shares[1] is not None:
        words.append(f"{shares[1]:.0%} of the features differ significantly ({shares[0]:.0%} as scanned)")
    found = {item.method: item for item in before.classifiers}
    for item in after.classifiers:
        same = found.get(item.method)
        if same is not None and item.accuracy.value is not None and same.accuracy.value is not None:
            words.append(
                f"a classifier recognises {item.accuracy.value:.0%} of the volumes ({same.accuracy.value:.0%})"
            )
            break
    return f"{name[:1].upper()}{name[1:]}: {joined(words)}." if words else f"{name}: nothing to compare."


def _patients(part: PartFinding, cards: Sequence[SiteCard]) -> dict[str, int]:
    """Site -> patients at most: no more than measured cases, no more than the site's card counts."""
    counted = {card.site: card.n_patients for card in cards}
    return {site: min(n, counted.get(site, n)) for site, n in part.n.items()}


def _key(part: PartFinding) -> tuple[str, str, str]:
    return part.channel, part.region, part.scale
