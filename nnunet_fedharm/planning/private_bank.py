"""Styles of all sites whose images lie in one place, for a training under differential privacy.

They are drawn once for these cases and this noise and kept beside the preprocessed cases, as the fingerprint is, so that
planning again costs nothing and a training that was stopped finds the styles that it began with.

A patient is in the style of the own site alone, so all styles together cost what one does. Who was scanned at m sites
is in m styles: their noise is sqrt(m) times as large then.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from nnunet_fedharm.harmonizers.style import Style
from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.planning.drawn_once import drawn_once, ledger_of
from nnunet_fedharm.planning.private_style import neutral_style, style_release
from nnunet_fedharm.planning.style import preprocessed_cases, style_by_site
from nnunet_fedharm.privacy.options import PrivacyOptions
from nnunet_fedharm.sites.registry import SitesFile

_SHAPED_BY = ("data_identifier", "spacing", "normalization_schemes", "use_mask_for_norm")
"""Of a configuration: what its preprocessed images depend on."""


def private_bank(
    root: NnunetRoot,
    dataset_name: str,
    plans: Mapping[str, Any],
    configuration: str,
    *,
    sites: SitesFile,
    privacy: PrivacyOptions,
    styled: bool,
) -> dict[str, Style]:
    """Site -> noisy style, entered in the ledger before they are used.

    Args:
        styled: whether the harmonizer reads styles; else they are all the same, and say nothing about anybody.

    Raises:
        PlanError: nothing is preprocessed for these plans.
        PrivacyError: the budget does not hold them.
    """
    cases = preprocessed_cases(root, dataset_name, plans, configuration)
    if not styled:
        channels = len(plans["configurations"][configuration]["normalization_schemes"])
        counts = {site: sum(sites.cases.get(case) == site for case in cases) for site in sites.sites}
        return {site: neutral_style(channels, count) for site, count in counts.items() if count}
    ledger = ledger_of(root)
    if not privacy.style_noise:
        styles = style_by_site(root, dataset_name, plans, configuration, sites=sites)
        for site in styles:
            ledger.record(style_release(site, 0.0))
        return styles
    path = root.preprocessed / dataset_name / f"private_styles_{configuration}_{privacy.style_noise:.6g}.json"

    def draw() -> dict[str, Any]:
        noise = privacy.style_noise * math.sqrt(most_sites_of_a_patient(cases, sites))
        drawn = style_by_site(root, dataset_name, plans, configuration, sites=sites, noise_multiplier=noise)
        return {site: style.to_dict() for site, style in drawn.items()}

    kept = drawn_once(
        path,
        "styles",
        _digest(cases, sites, plans["configurations"][configuration]),
        release=style_release("all sites", privacy.style_noise),
        budget=privacy.budget,
        ledger=ledger,
        draw=draw,
    )
    return {site: Style.from_dict(style) for site, style in kept.items()}


def most_sites_of_a_patient(cases: Mapping[str, Any], sites: SitesFile) -> int:
    """Largest number of sites at which one patient was scanned."""
    homes: dict[str, set[str]] = {}
    for case in cases:
        homes.setdefault(sites.patient_of(case), set()).add(sites.cases.get(case, ""))
    return max(len(own) for own in homes.values())


def _digest(cases: Mapping[str, Any], sites: SitesFile, configuration: Mapping[str, Any]) -> str:
    """Whose images these are, and how they were preprocessed; stays here."""
    whose = sorted((case, sites.cases.get(case), sites.patient_of(case)) for case in cases)
    shaped = {name: configuration.get(name) for name in _SHAPED_BY}
    return hashlib.sha256(json.dumps([whose, shaped], sort_keys=True, default=str).encode()).hexdigest()
