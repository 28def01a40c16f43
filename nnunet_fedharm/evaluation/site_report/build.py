"""The site report of pooled data: measure, compare, harmonize and compare again.

`build_report` reads images and returns what `site_report_files.write_report` writes. A federated report has the same findings
from aggregates, and is written by the same function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nnunet_fedharm import __version__
from nnunet_fedharm.differences.findings import Failure, Findings, PartFinding, SiteCard, VariantFinding
from nnunet_fedharm.differences.options import Progress, StatisticsOptions
from nnunet_fedharm.differences.statistics import find_differences
from nnunet_fedharm.errors import DataError
from nnunet_fedharm.evaluation.site_report.models import harmonize_cases, model_folders
from nnunet_fedharm.evaluation.site_report.slices import (
    Array,
    TypicalSlices,
    central_slices,
    small_slices,
    typical_cases,
    typical_slices,
)
from nnunet_fedharm.evaluation.site_report.words import keys
from nnunet_fedharm.sites.features.cases import ListedCase, list_cases, spread_cases
from nnunet_fedharm.sites.features.extraction import measure_dataset
from nnunet_fedharm.sites.features.options import FeatureOptions
from nnunet_fedharm.sites.features.table import FeatureTable
from nnunet_fedharm.sites.files import CaseFiles, read_dataset_json
from nnunet_fedharm.sites.registry import SITES_FILE, SitesFile

AS_SCANNED = "as scanned"
CACHE, HARMONIZED = "cache", "harmonized"
"""Folders beside the report: measured features, and volumes of models."""

Cut = Mapping[tuple[str, str], Array]


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """What is measured and how it is compared."""

    features: FeatureOptions = field(default_factory=FeatureOptions)
    statistics: StatisticsOptions = field(default_factory=StatisticsOptions)
    slices: bool = True
    """Pictures of typical volumes, and a classifier that looks at slices."""
    cases_per_site: int | None = None
    """Measure at most so many cases of each site, see `spread_cases`; None: all."""
    num_processes: int = 1
    device: str = "cpu"
    """Where harmonizers run."""

    def __post_init__(self) -> None:
        if self.cases_per_site is not None and self.cases_per_site < 1:
            raise DataError(f"At least one case of each site has to be measured, got {self.cases_per_site}.")


@dataclass(frozen=True)
class SiteReport:
    """Everything that is written.

    Attributes:
        findings: numbers and words.
        tables: variant -> features.
        slices: pictures, one set per channel.
    """

    findings: Findings
    tables: dict[str, FeatureTable]
    slices: list[TypicalSlices]


@dataclass(frozen=True)
class _Measured:
    """One variant."""

    table: FeatureTable
    failures: list[Failure]
    cut: Cut
    notes: list[str]
    cases: Mapping[str, CaseFiles]


def build_report(
    raw_dataset: Path,
    folder: Path,
    *,
    models: Sequence[str] = (),
    options: ReportOptions,
    progress: Progress | None = None,
) -> SiteReport:
    """Measure a raw dataset with sites.json, as scanned and as each model harmonizes it.

    Args:
        raw_dataset: with dataset.json and sites.json.
        folder: of the report; measured features and harmonized volumes are kept there and not made twice.
        models: results folders; `{site}` in one stands for the site's name.
        options: see there.
        progress: told what is being computed.

    Raises:
        DataError: the dataset or a model cannot be used; one case that cannot be read is listed instead.
        SetupError: pyradiomics is not installed, or the folder cannot be written.
    """
    dataset_json = read_dataset_json(raw_dataset, site=raw_dataset.name)
    registry = SitesFile.load(raw_dataset / SITES_FILE)
    listed = list_cases(raw_dataset, dataset_json, registry)
    if options.cases_per_site is not None:
        listed = spread_cases(listed, options.cases_per_site)
    sites = list(dict.fromkeys(item.site for item in listed))
    for model in models:
        model_folders(model, sites)
    wanted = options.features.channels or tuple(str(name) for name in dataset_json["channel_names"].values())
    measured = _measure_all(raw_dataset, folder, models, options, listed, dataset_json, registry)
    channels = [name for name in wanted if any(row.channel == name for row in measured[AS_SCANNED].table.rows)]
    findings = Findings(
        dataset=raw_dataset.resolve().name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        mode="pooled",
        settings=_settings(options, models),
        sites=_cards(registry, listed, sites),
        variants=[VariantFinding(name, _compare(found, options, progress)) for name, found in measured.items()],
        failures=list(dict.fromkeys(failure for found in measured.values() for failure in found.failures)),
    )
    return SiteReport(
        findings,
        {name: found.table for name, found in measured.items()},
        _pictures(findings, measured, channels, dataset_json, options.num_processes) if options.slices else [],
    )


def _measure_all(
    raw_dataset: Path,
    folder: Path,
    models: Sequence[str],
    options: ReportOptions,
    listed: Sequence[ListedCase],
    dataset_json: Mapping[str, Any],
    registry: SitesFile,
) -> dict[str, _Measured]:
    """Variant -> its features and slices."""
    sites = {item.files.case: item.site for item in listed}
    scans = [item.files for item in listed]

    def measure(cases: Sequence[CaseFiles], images: Mapping[str, Sequence[Path]] | None) -> _Measured:
        table, failures = measure_dataset(
            raw_dataset,
            registry=registry,
            options=options.features,
            cache=folder / CACHE,
            num_processes=options.num_processes,
            images=images,
            cases=sites,
        )
        cut = small_slices(cases, dataset_json, num_processes=options.num_processes) if options.slices else {}
        return _Measured(table, failures, cut, [], {case.case: case for case in cases})

    measured = {AS_SCANNED: measure(scans, None)}
    for model in models:
        found = harmonize_cases(model, scans, sites, folder / HARMONIZED, device=options.device)
        again = measure(found.cases, {case.case: case.images for case in found.cases})
        name = found.name if found.name not in measured else f"{found.name} ({Path(model).name})"
        measured[name] = replace(again, failures=again.failures + found.failures, notes=found.notes)
    return measured


def _compare(found: _Measured, options: ReportOptions, progress: Progress | None) -> list[PartFinding]:
    parts = find_differences(
        found.table,
        options=options.statistics,
        slices=found.cut if options.slices else None,
        progress=progress,
        num_processes=options.num_processes,
    )
    return [replace(part, notes=[*found.notes, *part.notes]) for part in parts]


def _pictures(
    findings: Findings,
    measured: Mapping[str, _Measured],
    channels: Sequence[str],
    dataset_json: Mapping[str, Any],
    num_processes: int,
) -> list[TypicalSlices]:
    """Typical volumes as their features as scanned say, of each channel in the region of the first screen."""
    first = keys(findings)
    if not first:
        return []
    _, region, scale = first[0]
    table = measured[AS_SCANNED].table
    chosen: dict[str, dict[str, list[str]]] = {}
    for channel in channels:
        own = table.part(channel, region, scale)
        chosen[channel] = {card.site: typical_cases(own, card.site) for card in findings.sites}
    names = sorted({case for by_site in chosen.values() for cases in by_site.values() for case in cases})
    cut = {
        variant: central_slices(
            [found.cases[name] for name in names if name in found.cases],
            dataset_json,
            num_processes=num_processes,
        )
        for variant, found in measured.items()
    }
    return [typical_slices(channel, by_site, cut) for channel, by_site in chosen.items()]


def _cards(registry: SitesFile, listed: Sequence[ListedCase], sites: Sequence[str]) -> list[SiteCard]:
    cards = []
    for site in (name for name in registry.sites if name in sites):
        own = [item for item in listed if item.site == site]
        info = registry.sites[site]
        cards.append(
            SiteCard(
                site,
                info.vendor,
                info.field,
                info.sequence,
                n_cases=len(own),
                n_patients=len({item.patient for item in own}),
                n_labelled=sum(item.files.label is not None and not item.travelling for item in own),
            )
        )
    return cards


def _settings(options: ReportOptions, models: Sequence[str]) -> dict[str, Any]:
    return {
        "nnunet_fedharm": __version__,
        "models": [Path(model).name for model in models],
        "cases_per_site": options.cases_per_site,
        "features": options.features.to_dict(),
        "statistics": options.statistics.to_dict(),
    }
