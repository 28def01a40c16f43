"""The cases of a raw dataset that features are measured on: whose they are, and of which patient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_fedharm.errors import DataError
from nnunet_fedharm.sites.files import CaseFiles, cases_in, labelled_cases, unlabelled_cases
from nnunet_fedharm.sites.registry import SITES_FILE, SitesFile

TRAVELLING_IMAGES, TRAVELLING_LABELS = "imagesTravelling", "labelsTravelling"


@dataclass(frozen=True)
class ListedCase:
    """A case on disk.

    Attributes:
        files: where it lies.
        site, patient, travelling: as in `table.Row`.
    """

    files: CaseFiles
    site: str
    patient: str
    travelling: bool = False


def list_cases(raw_dataset: Path, dataset_json: Mapping[str, Any], registry: SitesFile) -> list[ListedCase]:
    """Labelled, unlabelled and travelling cases of a raw dataset, in this order, sorted by identifier.

    imagesTs is not read.

    Raises:
        DataError: a case without a site, two cases of one name, a travelling subject of no site or of several patients.
    """
    home = [*labelled_cases(raw_dataset, dataset_json), *unlabelled_cases(raw_dataset, dataset_json)]
    for case in home:
        if case.case not in registry.cases:
            raise DataError(
                f"{SITES_FILE} does not say which site case {case.case} comes from. Add the case to `cases`."
            )
    listed = [ListedCase(case, registry.cases[case.case], registry.patient_of(case.case)) for case in home]
    labels = raw_dataset / TRAVELLING_LABELS
    away = cases_in(raw_dataset / TRAVELLING_IMAGES, dataset_json, labels=labels if labels.is_dir() else None)
    listed += [_travelling(case, registry) for case in away]
    names: set[str] = set()
    for item in listed:
        if item.files.case in names:
            raise DataError(
                f"Site {item.site}, case {item.files.case}: {raw_dataset} has two cases of this name. Rename or remove one."
            )
        names.add(item.files.case)
    return listed


def spread_cases(listed: Sequence[ListedCase], per_site: int) -> list[ListedCase]:
    """At most so many cases of each site: one a patient, spread evenly over their names, labelled ones first.

    Travelling subjects come first, at most `per_site` of them, with all their scans: their comparison needs the same patients
    everywhere. The rest is drawn by name and not at random, so that a second call chooses the same.

    Args:
        listed: as `list_cases` returns them; the order stays.
    """
    travelled = sorted({item.patient for item in listed if item.travelling})
    chosen_travellers = set(_spread(travelled, per_site))
    chosen = {item.files.case for item in listed if item.patient in chosen_travellers}
    for site in dict.fromkeys(item.site for item in listed):
        home = [item for item in listed if item.site == site and not item.travelling]
        room = per_site - len({item.patient for item in home if item.files.case in chosen})
        for labelled in (True, False):
            first: dict[str, str] = {}
            for item in sorted(home, key=lambda item: item.files.case):
                if (item.files.label is not None) == labelled and item.patient not in chosen_travellers:
                    first.setdefault(item.patient, item.files.case)
            taken = {item.patient for item in home if item.files.case in chosen}
            more = _spread([case for patient, case in first.items() if patient not in taken], max(0, room))
            chosen.update(more)
            room -= len(more)
    return [item for item in listed if item.files.case in chosen]


def _spread(names: Sequence[str], most: int) -> list[str]:
    """At most so many, first and last among them, with even steps between."""
    indices = np.linspace(0, len(names) - 1, min(len(names), most)).round().astype(int)
    return [names[index] for index in dict.fromkeys(indices.tolist())]


def missing_cases(raw_dataset: Path, registry: SitesFile, listed: Sequence[ListedCase], ending: str) -> list[str]:
    """Cases of `cases` in sites.json that have no image, imagesTs included; sorted."""
    held_out = raw_dataset / "imagesTs"
    found = {item.files.case for item in listed}
    return sorted(
        case for case in registry.cases if case not in found and not (held_out / f"{case}_0000{ending}").exists()
    )


def _travelling(case: CaseFiles, registry: SitesFile) -> ListedCase:
    site = registry.site_of(case.case)
    if site is None:
        raise DataError(
            f"{case.images[0]} is no travelling subject: its name has to be <SITE>_<SUBJECT> with a site of {SITES_FILE} "
            f"({', '.join(registry.sites)}). Rename or remove the file."
        )
    return ListedCase(case, site, registry.patient_of(case.case), travelling=True)
