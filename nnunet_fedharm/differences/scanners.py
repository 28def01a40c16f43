"""What sites.json says about scanners, as far as it can explain a difference between sites."""

from __future__ import annotations

import re
from collections.abc import Sequence

from nnunet_fedharm.differences.findings import SiteCard

_WEIGHTINGS = ("FLAIR", "DCE", "DWI", "ADC", "SWI", "T2*", "T1", "T2", "PD")
"""Contrasts that a sequence's free text may name; the first one found counts, so that T2-FLAIR is FLAIR."""


def weighting(sequence: str | None) -> str | None:
    """Contrast that a sequence's name begins a word with: "T1w MPRAGE" -> "T1"; None if it names none."""
    for name in _WEIGHTINGS:
        if sequence and re.search(rf"(?<![A-Za-z0-9]){re.escape(name)}", sequence, re.IGNORECASE):
            return name
    return None


def properties(card: SiteCard) -> dict[str, tuple[str, str] | None]:
    """Property -> (value that is compared, words with it), the most telling property first; None where it is not known."""
    contrast = weighting(card.sequence)
    return {
        "contrast": None if contrast is None else (contrast, f"{contrast}-weighted images ({card.sequence})"),
        "field strength": None if card.field is None else (f"{card.field:g}", f"a field of {card.field:g} T"),
        "vendor": None if card.vendor is None else (_plain(card.vendor), f"a {card.vendor} scanner"),
        "sequence": None if card.sequence is None else (_plain(card.sequence), f"the sequence {card.sequence}"),
    }


def only_one_with(site: str, cards: Sequence[SiteCard]) -> str | None:
    """What a site has alone while all others share another value, in words; None if there is nothing, or it is not known."""
    own = next((card for card in cards if card.site == site), None)
    others = [properties(card) for card in cards if card.site != site]
    if own is None or len(others) < 2:
        return None
    for name, mine in properties(own).items():
        theirs = [each[name] for each in others]
        known = {each[0] for each in theirs if each is not None}
        if mine is not None and None not in theirs and len(known) == 1 and mine[0] not in known:
            return mine[1]
    return None


def differing_properties(first: str, second: str, cards: Sequence[SiteCard]) -> list[str]:
    """Properties in which two sites differ, with both values; the sequence only where the contrast is the same."""
    chosen = {card.site: card for card in cards if card.site in (first, second)}
    if len(chosen) < 2:
        return []
    one, two = chosen[first], chosen[second]
    pairs = {name: (mine, properties(two)[name]) for name, mine in properties(one).items()}
    differing = [name for name, (mine, theirs) in pairs.items() if mine and theirs and mine[0] != theirs[0]]
    shown = {
        "contrast": f"contrast ({one.sequence}, {two.sequence})",
        "field strength": f"field strength ({_tesla(one)}, {_tesla(two)})",
        "vendor": f"vendor ({one.vendor}, {two.vendor})",
        "sequence": f"sequence ({one.sequence}, {two.sequence})",
    }
    return [shown[name] for name in differing if not (name == "sequence" and "contrast" in differing)]


def _tesla(card: SiteCard) -> str:
    return "" if card.field is None else f"{card.field:g} T"


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
