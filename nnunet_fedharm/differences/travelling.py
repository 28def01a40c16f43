"""Travelling subjects: do features of the same patients agree between sites?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt

from nnunet_fedharm.differences.agreement import GOOD, concordance, intraclass_correlation, share_at_least
from nnunet_fedharm.differences.findings import AgreementFinding, Estimate
from nnunet_fedharm.differences.options import StatisticsOptions
from nnunet_fedharm.differences.panel import CONTROL, without_rounding
from nnunet_fedharm.differences.ranks import median_over
from nnunet_fedharm.sites.features.table import FeatureTable, family_of

Values = npt.NDArray[np.float64]
Coefficient = Callable[[Values], Values]
"""(patients, sites, F) -> (F,)."""

FEWEST = 3
"""Patients below which agreement is not estimated."""


def agreement_findings(part: FeatureTable, options: StatisticsOptions, *, purpose: str) -> list[AgreementFinding]:
    """CCC of each two sites and ICC(2,1) of all sites together, over all features but the control and by family.

    Args:
        part: one channel, region and scale; only patients seen at two sites or more count.
        options: seed and draws.
        purpose: of the random draws.
    """
    values, sites = travelling_values(part)
    found: list[AgreementFinding] = []
    for pair in combinations(range(len(sites)), 2):
        found += _findings(values[:, pair], [sites[i] for i in pair], "CCC", _ccc, part.names, options, purpose)
    if len(sites) > 2:
        found += _findings(values, sites, "ICC(2,1)", intraclass_correlation, part.names, options, purpose)
    return found


def travelling_values(part: FeatureTable) -> tuple[Values, list[str]]:
    """(patients, sites, F) of the patients who were seen at two sites or more, patients and sites sorted, and the sites.

    Scans at home and travelling ones count alike, several of a patient at one site as their mean; NaN where the patient
    was not.
    """
    scans: dict[str, dict[str, list[int]]] = {}
    for index, row in enumerate(part.rows):
        scans.setdefault(row.patient, {}).setdefault(row.site, []).append(index)
    seen = {patient: scans[patient] for patient in sorted(scans) if len(scans[patient]) > 1}
    sites = sorted({site for places in seen.values() for site in places})
    measured = without_rounding(np.where(np.isfinite(part.values), part.values, np.nan))
    values = np.full((len(seen), len(sites), len(part.names)), np.nan)
    for position, places in enumerate(seen.values()):
        for site, rows in places.items():
            values[position, sites.index(site)] = measured[sorted(rows, key=lambda row: part.rows[row].case)].mean(0)
    return values, sites


def _findings(
    values: Values,
    sites: Sequence[str],
    measure: str,
    coefficient: Coefficient,
    names: Sequence[str],
    options: StatisticsOptions,
    purpose: str,
) -> list[AgreementFinding]:
    """Of the patients that were at all these sites; none if they are too few."""
    seen = values[np.all(np.isfinite(values).any(axis=2), axis=1)]
    usable = np.isfinite(seen).all(axis=(0, 1))
    if len(seen) < FEWEST or not usable.any():
        return []
    families = np.array([family_of(name) for name in names], dtype=str)[usable]
    table = seen[:, :, usable]
    generator = options.generator(purpose, measure, *sites)
    drawn = [table[generator.integers(0, len(table), len(table))] for _ in range(options.bootstrap)]
    point, draws = coefficient(table), np.array([coefficient(each) for each in drawn]).reshape(-1, table.shape[2])
    chosen = {"all": families != CONTROL} | {str(name): families == name for name in dict.fromkeys(families)}
    return [
        AgreementFinding(
            sites=tuple(sites),
            measure=measure,
            family=family,
            median=_estimate(point[keep], draws[:, keep]),
            share_good=_number(share_at_least(point[keep], GOOD)),
            n_patients=len(table),
            n_features=int(np.isfinite(point[keep]).sum()),
        )
        for family, keep in chosen.items()
        if np.isfinite(point[keep]).any()
    ]


def _estimate(point: Values, draws: Values) -> Estimate:
    """Median over features with percentiles over draws of patients."""
    medians = median_over(draws)
    medians = medians[np.isfinite(medians)]
    if len(medians) < 2:
        return Estimate(float(median_over(point)))
    low, high = np.percentile(medians, [2.5, 97.5])
    return Estimate(float(median_over(point)), float(low), float(high))


def _ccc(table: Values) -> Values:
    return concordance(table[:, 0], table[:, 1])


def _number(value: float) -> float | None:
    return value if np.isfinite(value) else None
