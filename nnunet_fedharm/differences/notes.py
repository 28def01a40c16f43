"""What could not be computed, and why, in sentences for the page."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nnunet_fedharm.differences.options import StatisticsOptions
from nnunet_fedharm.differences.panel import Panel
from nnunet_fedharm.differences.ranks import RankTests
from nnunet_fedharm.differences.travelling import FEWEST
from nnunet_fedharm.sites.features.table import FeatureTable

APPROXIMATE = 5
"""Patients of a site below which the chi squared distribution of Kruskal-Wallis is a rough guess."""


def general_notes(panel: Panel, tests: RankTests, options: StatisticsOptions) -> list[str]:
    """Sentences on sites and features of one part."""
    notes = []
    if len(panel.sites) == 0:
        return ["No volume was measured here."]
    if len(panel.sites) == 1:
        notes.append(f"Only {panel.sites[0]} was measured here, so there is nothing to compare.")
    patients = panel.patients_of_sites()
    single = [site for site, size in zip(panel.sites, patients, strict=True) if size == 1]
    few = [site for site, size in zip(panel.sites, patients, strict=True) if 1 < size < APPROXIMATE]
    if single and len(panel.sites) > 1:
        notes.append(
            f"{joined(single)}: one patient only, whose spread is unknown; its distances are those of one value."
        )
    if few and len(panel.sites) > 1:
        notes.append(
            f"{joined(few)}: fewer than {APPROXIMATE} patients, so p-values are rough and intervals are too narrow."
        )
    unjudged = [site for code, site in enumerate(panel.sites) if (panel.codes == code).sum() < options.outlier_cases]
    if unjudged:
        notes.append(f"Outliers were not looked for at {joined(unjudged)}: fewer than {options.outlier_cases} volumes.")
    if len(set(zip(panel.codes.tolist(), panel.groups.tolist(), strict=True))) < len(panel.codes):
        notes.append("Several volumes of one patient at one site count as one in tests: their mean.")
    return notes + _feature_notes(panel, tests)


def _feature_notes(panel: Panel, tests: RankTests) -> list[str]:
    if len(panel.sites) < 2:
        return []
    notes = []
    missing = np.isnan(panel.values).any(0)
    constant = np.array([np.ptp(column[np.isfinite(column)]) == 0 for column in panel.values.T], dtype=bool)
    if constant.any():
        notes.append(f"{_features(int(constant.sum()))} not tested: the same value everywhere.")
    if (missing & np.isfinite(tests.p)).any():
        notes.append(
            f"{_features(int((missing & np.isfinite(tests.p)).sum()))} tested without the volumes that lack them."
        )
    untested = ~np.isfinite(tests.p) & ~constant
    if untested.any():
        notes.append(f"{_features(int(untested.sum()))} not tested: too few volumes or sites have them.")
    return notes


def travelling_note(part: FeatureTable) -> str:
    """Why there is no agreement."""
    places: dict[str, set[str]] = {}
    for row in part.rows:
        places.setdefault(row.patient, set()).add(row.site)
    seen = sum(len(sites) > 1 for sites in places.values())
    if not seen:
        return "No patient was seen at two sites, so agreement (CCC, ICC) cannot be estimated."
    return f"Agreement (CCC, ICC) needs {FEWEST} patients seen at the same two sites, with the same features."


def joined(names: Sequence[str]) -> str:
    """ "A", "A and B", "A, B and C"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _features(number: int) -> str:
    return "1 feature" if number == 1 else f"{number} features"
