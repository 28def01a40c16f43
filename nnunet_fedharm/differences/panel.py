"""The volumes of one part in the form that statistics need: arrays in an order that does not depend on the table's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from nnunet_fedharm.sites.features.table import FeatureTable, Values, family_of

Codes = npt.NDArray[np.intp]

CONTROL = "shape"
"""Family that no scanner changes: reported beside the others, kept out of every verdict over all features."""
_ROUNDING, _NOTHING = 1e-9, 1e-12
"""Range over largest size, and largest size, up to which a feature counts as constant."""
_MISSING = 0.5
"""Share of features that a volume may lack before the methods that need all of them leave it out."""


@dataclass(frozen=True)
class Panel:
    """Volumes x features with their sites and patients.

    Attributes:
        sites: k names, sorted.
        codes: (n,) site of each volume.
        cases, patients: (n,) names.
        names: (F,) features.
        values: (n, F); NaN where a feature does not exist.
    """

    sites: tuple[str, ...]
    codes: Codes
    cases: tuple[str, ...]
    patients: tuple[str, ...]
    names: tuple[str, ...]
    values: Values

    @cached_property
    def groups(self) -> Codes:
        """(n,) patient of each volume as a number from 0."""
        numbers: Codes = np.unique(np.asarray(self.patients, dtype=str), return_inverse=True)[1].reshape(-1)
        return numbers

    @cached_property
    def families(self) -> npt.NDArray[np.str_]:
        """(F,) family of each feature."""
        return np.array([family_of(name) for name in self.names], dtype=str)

    def rows(self, keep: npt.NDArray[np.bool_]) -> Panel:
        """The volumes for which `keep` (n,) is true; sites without volumes go."""
        codes = self.codes[keep]
        left = np.unique(codes)
        return Panel(
            tuple(self.sites[code] for code in left),
            np.searchsorted(left, codes),
            tuple(case for case, kept in zip(self.cases, keep, strict=True) if kept),
            tuple(patient for patient, kept in zip(self.patients, keep, strict=True) if kept),
            self.names,
            self.values[keep],
        )

    def columns(self, keep: npt.NDArray[np.bool_]) -> Panel:
        """The features for which `keep` (F,) is true."""
        names = tuple(name for name, kept in zip(self.names, keep, strict=True) if kept)
        return replace(self, names=names, values=self.values[:, keep])

    def patients_of_sites(self) -> Codes:
        """(k,) different patients of each site."""
        return np.array([len(set(self.groups[self.codes == code].tolist())) for code in range(len(self.sites))], int)

    def with_patients(self, least: int) -> Panel:
        """The sites that have at least so many patients."""
        return self.rows(np.isin(self.codes, np.flatnonzero(self.patients_of_sites() >= least)))


def panel_of(part: FeatureTable) -> Panel:
    """Panel of one part without travelling scans, sorted by site, patient and case; without features that no volume has."""
    rows = [(row.site, row.patient, row.case, index) for index, row in enumerate(part.rows) if not row.travelling]
    rows.sort()
    values = np.asarray(part.values[[row[3] for row in rows]], dtype=np.float64).reshape(len(rows), len(part.names))
    values = without_rounding(np.where(np.isfinite(values), values, np.nan))
    found = _panel(rows, part.names, values)
    return found.columns(np.asarray(np.isfinite(values).any(0), dtype=bool))


def without_rounding(values: Values) -> Values:
    """(n, F) values with columns made constant that vary by rounding only: the mean of a z-scored image is no feature."""
    cleaned = values.copy()
    for column in cleaned.T:
        known = np.isfinite(column)
        if known.any():
            size = float(np.abs(column[known]).max())
            if size <= _NOTHING or np.ptp(column[known]) <= _ROUNDING * size:
                column[known] = float(np.median(column[known]))
    return cleaned


def case_panel(table: FeatureTable, channel: str) -> Panel:
    """Every case of a channel once, without travelling scans and without features."""
    rows = sorted(
        {(row.site, row.patient, row.case, 0) for row in table.rows if row.channel == channel and not row.travelling}
    )
    return _panel(rows, (), np.zeros((len(rows), 0)))


def _panel(rows: Sequence[tuple[str, str, str, int]], names: tuple[str, ...], values: Values) -> Panel:
    """Panel of (site, patient, case, ...) in this order."""
    sites = sorted({row[0] for row in rows})
    codes = np.array([sites.index(row[0]) for row in rows], dtype=np.intp)
    return Panel(tuple(sites), codes, tuple(row[2] for row in rows), tuple(row[1] for row in rows), names, values)


def by_patient(panel: Panel) -> Panel:
    """One row per patient and site: the mean of the patient's volumes there, so that tests count patients."""
    pairs = np.stack([panel.codes, panel.groups], axis=1)
    unique, member = np.unique(pairs, axis=0, return_inverse=True)
    if len(unique) == len(pairs):
        return panel
    belongs = np.eye(len(unique))[:, member.reshape(-1)]
    finite = np.isfinite(panel.values)
    count = belongs @ finite
    total = belongs @ np.where(finite, panel.values, 0.0)
    first = [int(np.flatnonzero(row)[0]) for row in belongs]
    names = tuple(panel.patients[index] for index in first)
    values = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return Panel(panel.sites, unique[:, 0], names, names, panel.names, values)


def judged(names: Sequence[str]) -> npt.NDArray[np.bool_]:
    """(F,) features that verdicts over all features rest on: all but the control; all if there are no others."""
    keep = np.array([family_of(name) != CONTROL for name in names], dtype=bool)
    return keep if keep.any() else np.ones(len(names), dtype=bool)


def complete(panel: Panel) -> tuple[Panel, list[str]]:
    """What methods on all features at once can use, and sentences on what they cannot.

    Kept are judged features that are finite for every volume and vary, after volumes without most features are left out.
    """
    chosen = panel.columns(judged(panel.names))
    missing = np.isnan(chosen.values)
    poor = missing.mean(1) > _MISSING if chosen.names else np.zeros(len(chosen.cases), dtype=bool)
    kept = chosen.rows(~poor)
    gone = missing[~poor].any(0)
    flat = ~gone & (np.ptp(kept.values, axis=0) == 0 if len(kept.cases) else True)
    notes = []
    if poor.any():
        notes.append(
            f"{_count(int(poor.sum()), 'volume')} without most features left out of classifiers and embedding."
        )
    if gone.any():
        notes.append(
            f"{_count(int(gone.sum()), 'feature')} missing for some volumes left out of classifiers and embedding."
        )
    return kept.columns(~gone & ~flat), notes


def _count(number: int, thing: str) -> str:
    return f"1 {thing}" if number == 1 else f"{number} {thing}s"
