"""What a site measures and keeps for its report, and what of it counts: one record for each patient."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_fedharm.differences.findings import to_json
from nnunet_fedharm.differences.panel import by_patient, panel_of
from nnunet_fedharm.errors import DataError
from nnunet_fedharm.federation.report.messages import MOST_FEATURES, MOST_PARTS, Part
from nnunet_fedharm.federation.site import Site
from nnunet_fedharm.sites.features.table import IMAGE, SCALES, Failure, FeatureTable, Values, family_of
from nnunet_fedharm.sites.files import labelled_cases, read_dataset_json, unlabelled_cases, write_json
from nnunet_fedharm.sites.registry import SITES_FILE, SiteInfo, SitesFile

FEATURES_FILE, FAILURES_FILE = "features.csv", "failures.json"


@dataclass(frozen=True)
class Home:
    """What a site measured.

    Attributes:
        settings: everything that the features depend on; the same at all sites, or the report is refused.
        numbers: cases, patients, labelled and failed cases; sent without noise only.
    """

    table: FeatureTable
    failures: tuple[Failure, ...]
    settings: dict[str, Any]
    numbers: dict[str, int]


@dataclass(frozen=True)
class Records:
    """One row for each patient: the mean of the patient's cases.

    Attributes:
        values: (n, F); NaN where none of the patient's cases has the feature.
        patients: (n,) names; never sent.
    """

    values: Values
    patients: tuple[str, ...]

    def none(self) -> Records:
        """No patient, the same features."""
        return Records(self.values[:0], ())


def report_folder(site: Site, run_id: str) -> Path:
    """Where everything of one report lies."""
    return site.folder / "site-report" / run_id


def own_table(site: Site, raw: Path, options: Mapping[str, Any], folder: Path) -> Home:
    """Measure the site's cases, from the cache where they were measured before, and keep the table in `folder`."""
    from nnunet_fedharm.sites.features.extraction import measure_dataset
    from nnunet_fedharm.sites.features.options import FeatureOptions
    from nnunet_fedharm.sites.features.table_files import write_table

    description = read_dataset_json(raw, site=site.name)
    labelled, unlabelled = labelled_cases(raw, description), unlabelled_cases(raw, description)
    # Always all scales, which cost little: another choice of scales then finds everything in the cache.
    chosen = FeatureOptions(
        image_region=bool(options["image_region"]),
        channels=tuple(options["channels"]) or None,
    )
    found, failures = measure_dataset(
        raw,
        registry=own_registry(site, raw, [files.case for files in (*labelled, *unlabelled)]),
        options=chosen,
        cache=site.folder / "features",
        num_processes=site.num_processes,
    )
    table = FeatureTable(tuple(replace(row, site=site.name) for row in found.rows), found.names, found.values)
    folder.mkdir(parents=True, exist_ok=True)
    write_table(table, folder / FEATURES_FILE)
    write_json({"failures": to_json(list(failures))}, folder / FAILURES_FILE)
    home = [row for row in table.rows if not row.travelling]
    numbers = {
        "n_cases": len({row.case for row in home}),
        "n_patients": len({row.patient for row in home}),
        "n_labelled": len(labelled),
        "n_failed": len({failure.case for failure in failures}),
    }
    return Home(table, tuple(failures), json.loads(json.dumps(chosen.to_dict())), numbers)


def own_registry(site: Site, raw: Path, cases: list[str]) -> SitesFile:
    """All cases are this site's, whatever name its own sites.json uses; patients and scanner as there."""
    path = raw / SITES_FILE
    given = SitesFile.load(path) if path.is_file() else SitesFile()
    info = given.sites.get(site.name) or next(iter(given.sites.values()), SiteInfo())
    return SitesFile({site.name: info}, dict.fromkeys(cases, site.name), given.patients)


def scanner_of(site: Site, raw: Path) -> dict[str, Any]:
    """Vendor, field and sequence of the site's sites.json; None where it does not say."""
    info = own_registry(site, raw, []).sites[site.name]
    return {"vendor": info.vendor, "field": info.field, "sequence": info.sequence}


def table_of_run(folder: Path) -> FeatureTable:
    """The table that `own_table` kept.

    Raises:
        DataError: the site did not measure in this run.
    """
    from nnunet_fedharm.sites.features.table_files import read_table

    if not (folder / FEATURES_FILE).is_file():
        raise DataError("This site has not measured its features in this run. Start the report again.")
    return read_table(folder / FEATURES_FILE)


def parts_of(
    table: FeatureTable, options: Mapping[str, Any], keys: Iterable[tuple[str, str, str]] | None = None
) -> list[Part]:
    """Parts of the table with the scales, regions and features that were asked for; all where none are named.

    Args:
        keys: (channel, region, scale) in the place of those that occur.
    """
    keys = table.parts if keys is None else keys
    scales, regions, features = (set(options[name]) for name in ("scales", "regions", "features"))
    names = tuple(name for name in table.names if not features or name in features or family_of(name) in features)
    keys = [key for key in sorted(keys) if (not regions or key[1] in regions) and key[2] in scales]
    return [Part(*key, names[:MOST_FEATURES]) for key in keys][:MOST_PARTS] if names else []


def keys_beforehand(
    description: Mapping[str, Any], options: Mapping[str, Any], *, labelled: bool, unlabelled: bool
) -> list[tuple[str, str, str]]:
    """(channel, region, scale) that dataset.json and the options let expect, whether or not any case has them.

    With noise a site names these: which regions its patients really have, one of them alone may decide.
    """
    from nnunet_fedharm.sites.features.regions import label_regions

    channels = options["channels"] or [str(name) for name in description["channel_names"].values()]
    regions = list(label_regions(description["labels"])) if labelled else []
    keys = [(channel, region, scale) for channel in channels for region in regions for scale in SCALES]
    body = SCALES if options["image_region"] or unlabelled else SCALES[1:]  # image quality stands with the raw scale
    return keys + [(channel, IMAGE, scale) for channel in channels for scale in body]


def load_records(table: FeatureTable, part: Part) -> Records:
    """Records of a part; features that the table does not have are missing everywhere."""
    panel = by_patient(panel_of(table.part(*part.key)))
    values = np.full((len(panel.patients), len(part.names)), np.nan)
    position = {name: index for index, name in enumerate(panel.names)}
    for index, name in enumerate(part.names):
        if name in position:
            values[:, index] = panel.values[:, position[name]]
    return Records(values, panel.patients)


def enough_patients(site: Site, records: Records, options: Mapping[str, Any]) -> bool:
    """Whether a part has as many patients as the site and the run ask for."""
    return len(records.patients) >= max(site.min_patients, int(options.get("min_patients", 0)))
