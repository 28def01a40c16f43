"""MAMA-MIA, breast DCE-MRI of four collections (Synapse syn60868042): published layout -> cases and sites.

    SOURCE/images/DUKE_001/DUKE_001_0000.nii.gz … _000N.nii.gz      phase 0 is before the contrast agent
    SOURCE/segmentations/{expert,automatic}/DUKE_001.nii.gz
    SOURCE/clinical_and_imaging_info.xlsx                            sheet `dataset_info`
    SOURCE/train_test_splits.csv                                     columns `train_split`, `test_split`

Columns that are read: `patient_id`, `dataset` (DUKE, ISPY1, ISPY2, NACT), `site` (such as "Site AAI", empty where a collection
does not tell), `manufacturer`, `scanner_model`, `field_strength`, `fat_suppressed`.

Sources: folders, file names and phases as in `src/preprocessing.py` of the authors' repository LidiaGarrucho/MAMA-MIA; the
table's columns and values as printed in its `notebooks/display_clinical_data.ipynb`; the splits and `segmentations/automatic`
as public code reads them. The data set itself was not at hand.

References:
    Garrucho et al., "A large-scale multicenter breast cancer DCE-MRI benchmark dataset with expert segmentations",
    Scientific Data 2025, doi:10.1038/s41597-025-04707-4.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from nnunet_fedharm.datasets.convert_cases import ENDING, Chooser, Conversion, Part, SourceCase, describe_sites
from nnunet_fedharm.datasets.convert_tables import Row, by_key, clean, find_column, number, read_table, site_name
from nnunet_fedharm.errors import DataError
from nnunet_fedharm.sites.registry import SiteInfo

NAME = "MAMAMIA"
LABELS = {"background": 0, "tumor": 1}
TABLES = ("clinical_and_imaging_info.csv", "clinical_and_imaging_info.xlsx")
SHEET = "dataset_info"
SPLITS = "train_test_splits.csv"
DEFAULT_PHASES = (0, 1, 2)
_VENDORS = {"siemens": "Siemens", "ge": "GE", "philips": "Philips"}
SiteBy = Literal["centre", "dataset", "manufacturer"]
Segmentations = Literal["expert", "automatic"]


def find_mamamia(
    source: Path,
    *,
    table: Path | None = None,
    phases: Sequence[int] = DEFAULT_PHASES,
    segmentations: Segmentations = "expert",
    site_by: SiteBy = "centre",
    official_split: bool = False,
    skip_missing: bool = False,
    exclude: Sequence[str] = (),
) -> Conversion:
    """Find the patients of a download.

    Args:
        source: the folder with `images` and `segmentations`.
        table: clinical and imaging table; None looks for it in `source`.
        phases: one channel each; 0 is before the contrast agent.
        segmentations: the experts' or the automatic ones.
        site_by: centres where a collection names them, else the collection; or collections; or manufacturers.
        official_split: patients of `test_split` go to imagesTs and labelsTs.
        skip_missing: leave out patients that lack a phase, a segmentation or a row of the table.
        exclude: patients to leave out.

    Raises:
        DataError: no patient, no table, repeated or negative phases, a patient without a phase, segmentation or row.
    """
    if not phases or len(set(phases)) != len(phases) or min(phases) < 0:
        raise DataError(f"--phases must be different numbers from 0 on, got {' '.join(map(str, phases))}.")
    patients = sorted(folder.name for folder in (source / "images").glob("*") if folder.is_dir())
    if not patients:
        raise DataError(
            f"{source / 'images'} holds no patient. Give the folder that holds `images` and `segmentations`."
        )
    table = table or next((source / name for name in TABLES if (source / name).is_file()), source / TABLES[-1])
    rows = _rows(table)
    held_out = _test_patients(source / SPLITS) if official_split else frozenset()
    chooser = Chooser(skip_missing=skip_missing, exclude=exclude)
    cases = []
    for patient in filter(chooser.wants, patients):
        images = _phases(source, patient, phases, chooser)
        label = source / "segmentations" / segmentations / f"{patient}{ENDING}"
        if images and not label.is_file():
            chooser.missing(patient, f"the segmentation {label} is missing", "Download it again.")
        elif images and patient not in rows:
            chooser.missing(patient, f"it has no row in {table}", "Give the table of this release.")
        elif images:
            part: Part = "test" if patient in held_out else "train"
            site = _site(rows[patient], site_by, patient, table)
            cases.append(SourceCase(case=patient, site=site, images=images, label=label, part=part))
    chooser.check_used()
    scanners: dict[str, list[SiteInfo]] = defaultdict(list)
    for case in cases:
        scanners[case.site].append(_scanner(rows[case.case]))
    return Conversion(
        cases=tuple(cases),
        sites=describe_sites(scanners),
        channels=tuple(phase_name(phase) for phase in phases),
        labels=dict(LABELS),
        excluded=chooser.excluded,
        facts={
            "name": NAME,
            "reference": "Garrucho et al., doi:10.1038/s41597-025-04707-4",
            "licence": "CC BY-NC 4.0 and the licences of its collections",
        },
        options={
            "converter": "mamamia",
            "source": str(source.resolve()),
            "phases": list(phases),
            "segmentations": segmentations,
            "site_by": site_by,
            "official_split": official_split,
        },
    )


def phase_name(phase: int) -> str:
    """Channel name of a phase."""
    return "pre-contrast" if phase == 0 else f"post-contrast {phase}"


def _phases(source: Path, patient: str, phases: Sequence[int], chooser: Chooser) -> tuple[Path, ...]:
    """One file per phase; empty where the patient was left out."""
    files = tuple(source / "images" / patient / f"{patient}_{phase:04d}{ENDING}" for phase in phases)
    for phase, file in zip(phases, files, strict=True):
        if not file.is_file():
            n_found = len(list(file.parent.glob(f"{patient}_[0-9][0-9][0-9][0-9]{ENDING}")))
            reason = f"phase {phase} ({phase_name(phase)}) is missing, there is no {file} ({n_found} phases found)"
            chooser.missing(patient, reason, "Choose phases that all patients have with --phases.")
            return ()
    return files


def _rows(table: Path) -> dict[str, Row]:
    rows = read_table(table, sheet=SHEET)
    for name in ("dataset", "site", "manufacturer"):
        find_column(rows, [name], table=table, what=name)
    return by_key(rows, find_column(rows, ["patient_id"], table=table, what="patient"), table=table)


def _site(row: Row, site_by: SiteBy, patient: str, table: Path) -> str:
    if site_by == "manufacturer":
        name = site_name(vendor(row["manufacturer"]) or "")
    else:
        code = row["site"].removeprefix("Site ").removeprefix("site ") if site_by == "centre" else ""
        name = site_name(row["dataset"], code)
    if not name:
        raise DataError(
            f"Case {patient}: {table} leaves {'manufacturer' if site_by == 'manufacturer' else 'dataset'} empty, so its site "
            "is unknown. Fill the cell in or leave the case out with --exclude."
        )
    return name


def _scanner(row: Row) -> SiteInfo:
    field = row.get("field_strength") or row.get("magnetic_field_strength") or ""
    fat = {"1": "fat-suppressed", "0": "not fat-suppressed"}.get(row.get("fat_suppressed", ""), "")
    return SiteInfo(
        vendor=vendor(row["manufacturer"]), field=number(field), sequence=" ".join(filter(None, ["T1w DCE", fat]))
    )


def vendor(manufacturer: str) -> str | None:
    """One spelling of a manufacturer: "SIEMENS" and "Siemens Healthineers" are "Siemens"."""
    words = manufacturer.lower().split()
    return _VENDORS.get(words[0], manufacturer) if words else None


def _test_patients(path: Path) -> frozenset[str]:
    rows = read_table(path)
    column = find_column(rows, ["test_split"], table=path, what="test patients")
    return frozenset(filter(None, (clean(row.get(column, "")) for row in rows)))
