"""BraTS 2021, Task 1 (RSNA-ASNR-MICCAI): published layout -> cases and sites.

    SOURCE/[folder/]BraTS2021_00000/BraTS2021_00000_{t1,t1ce,t2,flair,seg}.nii.gz

The institution of each case stands in a table that is published with the data: `BraTS21-17_Mapping.csv` of the challenge
(columns `BraTS2021`, `Cohort Name (if publicly available)`, `Site No (represents the originating institution)`) or
`BraTS2021_MappingToTCIA.xlsx` of TCIA (columns `BraTS2021 ID`, `Data Collection (as on TCIA+additional)`, `Site ID`).

Sources: channels, their order and the labels (1 necrotic core -> 2, 2 oedema -> 1, 4 enhancing tumour -> 3) are those of
nnU-Net's own `Dataset137_BraTS21.py`; label values as the challenge's data page explains them; the columns as public code
reads them. The tables themselves were not at hand. They say nothing about vendor and field strength, so sites.json does not.

References:
    Baid et al., "The RSNA-ASNR-MICCAI BraTS 2021 Benchmark", arXiv:2107.02314.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from nnunet_fedharm.datasets.convert_cases import ENDING, Chooser, Conversion, Part, SourceCase, describe_sites
from nnunet_fedharm.datasets.convert_tables import by_key, find_column, read_table, site_name
from nnunet_fedharm.errors import DataError
from nnunet_fedharm.sites.registry import SiteInfo

NAME = "BraTS2021"
CHANNELS = {"t1": "T1", "t1ce": "T1ce", "t2": "T2", "flair": "Flair"}
REMAP = {0: 0, 1: 2, 2: 1, 4: 3}
LABELS = {"background": 0, "oedema": 1, "necrotic core": 2, "enhancing tumor": 3}
REGIONS = {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": [3]}
TABLES = ("BraTS21-17_Mapping.csv", "BraTS2021_MappingToTCIA.csv", "BraTS2021_MappingToTCIA.xlsx")
CASE_COLUMNS = ("BraTS2021", "BraTS2021 ID")
INSTITUTION_COLUMNS = ("Site No (represents the originating institution)", "Site ID")
COLLECTION_COLUMNS = ("Cohort Name (if publicly available)", "Data Collection (as on TCIA+additional)")
SiteBy = Literal["institution", "collection"]


def find_brats(
    source: Path,
    *,
    table: Path | None = None,
    site_by: SiteBy = "institution",
    regions: bool = False,
    unlabelled: bool = False,
    skip_missing: bool = False,
    exclude: Sequence[str] = (),
) -> Conversion:
    """Find the cases of a download.

    Args:
        source: folder of the cases, or one or two levels above it.
        table: the mapping table; None looks for it in `source` and below.
        site_by: sites are originating institutions (`site-01`) or data collections (`UPENN-GBM`).
        regions: nnU-Net's overlapping regions (whole tumor, tumor core, enhancing tumor) instead of plain labels.
        unlabelled: cases without a segmentation (the validation set) go to imagesUnlabelled.
        skip_missing: leave out cases that lack a file or a site.
        exclude: cases to leave out.

    Raises:
        DataError: no case, no table, a case without a channel, segmentation or site.
    """
    folders = case_folders(source)
    table = table or find_table(source)
    site_of = _sites(table, site_by)
    chooser = Chooser(skip_missing=skip_missing, exclude=exclude)
    cases = []
    for case, folder in folders.items():
        found = (
            _case(case, folder, site_of, chooser, unlabelled=unlabelled, table=table) if chooser.wants(case) else None
        )
        cases += [found] if found else []
    chooser.check_used()
    facts: dict[str, Any] = {
        "name": NAME,
        "reference": "Baid et al., arXiv:2107.02314",
        "licence": "see https://www.synapse.org/#!Synapse:syn25829067/wiki/610863",
    }
    info = SiteInfo(sequence="T1w, T1w with gadolinium, T2w, FLAIR")
    return Conversion(
        cases=tuple(cases),
        sites=describe_sites({case.site: [info] for case in cases}),
        channels=tuple(CHANNELS.values()),
        labels=dict(REGIONS if regions else LABELS),
        remap=dict(REMAP),
        excluded=chooser.excluded,
        facts={**facts, "regions_class_order": [1, 2, 3]} if regions else facts,
        options={"converter": "brats2021", "source": str(source.resolve()), "site_by": site_by, "regions": regions},
    )


def case_folders(source: Path) -> dict[str, Path]:
    """Case -> folder, sorted.

    Raises:
        DataError: no case at all, or the same case twice.
    """
    found: dict[str, Path] = {}
    for pattern in ("BraTS2021_*", "*/BraTS2021_*", "*/*/BraTS2021_*"):
        for folder in sorted(source.glob(pattern)):
            if not folder.is_dir() or not folder.name.removeprefix("BraTS2021_").isdigit():
                continue
            if folder.name in found:
                raise DataError(
                    f"Case {folder.name} lies in {found[folder.name]} and in {folder}. Give the folder of one."
                )
            found[folder.name] = folder
    if not found:
        raise DataError(
            f"{source} holds no folder BraTS2021_<number>. Give the folder that the training data unpack to."
        )
    return dict(sorted(found.items()))


def find_table(source: Path) -> Path:
    """The mapping table in `source`, one level above or up to two below; CSV before Excel.

    Raises:
        DataError: there is none.
    """
    for name in TABLES:
        for place in (source, source.parent):
            if (place / name).is_file():
                return place / name
        for found in sorted([*source.glob(f"*/{name}"), *source.glob(f"*/*/{name}")]):
            return found
    raise DataError(
        f"{source} has no table that says which institution a case is from ({', '.join(TABLES)}). "
        "Download it with the data, or name it with --table."
    )


def _sites(table: Path, site_by: SiteBy) -> dict[str, str]:
    rows = read_table(table)
    key = find_column(rows, CASE_COLUMNS, table=table, what="case")
    names = INSTITUTION_COLUMNS if site_by == "institution" else COLLECTION_COLUMNS
    column = find_column(rows, names, table=table, what=site_by)
    found = {case: row.get(column, "") for case, row in by_key(rows, key, table=table).items()}
    if site_by == "collection":
        return {case: site_name(value) for case, value in found.items()}
    return {case: site_name("site", value.zfill(2)) if value else "" for case, value in found.items()}


def _case(
    case: str, folder: Path, site_of: dict[str, str], chooser: Chooser, *, unlabelled: bool, table: Path
) -> SourceCase | None:
    images = [folder / f"{case}_{channel}{ENDING}" for channel in CHANNELS]
    for channel, image in zip(CHANNELS, images, strict=True):
        if not image.is_file():
            chooser.missing(case, f"channel {channel} is missing, there is no {image}", "Download the case again.")
            return None
    label: Path | None = folder / f"{case}_seg{ENDING}"
    part: Part = "train"
    if label is not None and not label.is_file():
        if not unlabelled:
            remedy = "Download it again, or take cases without labels with --unlabelled."
            chooser.missing(case, f"the segmentation {label} is missing", remedy)
            return None
        label, part = None, "unlabelled"
    if not site_of.get(case):
        chooser.missing(case, f"{table} does not say which site it is from", "Give the table of this release.")
        return None
    return SourceCase(case=case, site=site_of[case], images=tuple(images), label=label, part=part)
