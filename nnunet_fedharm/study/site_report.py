"""How different a study's sites are: its first question, measured once on a bounded number of cases.

`site-report/` in the study's folder is what `nnunet-fedharm sites report --cases-per-site N --no-slices` writes, but for raw
intensities: networks see z-scores, and the answer is about these. One that lies there already, of more cases or with pictures,
is taken as it is.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from nnunet_fedharm.differences.findings import Findings
from nnunet_fedharm.differences.findings_file import from_json
from nnunet_fedharm.differences.options import StatisticsOptions
from nnunet_fedharm.errors import DataError, FedHarmError
from nnunet_fedharm.evaluation.site_report.build import CACHE, ReportOptions, build_report
from nnunet_fedharm.evaluation.site_report.files import write_report
from nnunet_fedharm.federation.durable import file_lock
from nnunet_fedharm.sites.features.cases import list_cases, spread_cases
from nnunet_fedharm.sites.features.extraction import measure_dataset
from nnunet_fedharm.sites.features.options import FeatureOptions
from nnunet_fedharm.sites.files import read_dataset_json, read_json
from nnunet_fedharm.study.study_file import StudyFile

FOLDER, LOCK = "site-report", "site-report.lock"
NUMBERS = ("findings.json", "report.json")
"""Names under which the folder may hold the report's numbers."""
SCALES = ("z-score",)
STATISTICS = StatisticsOptions()
PART_S = 25.0
"""Seconds of these statistics for one part (channel, region, scale) on a slow core: nearly all are nulls, whatever the cases."""


def site_report_missing(study: StudyFile) -> bool:
    """Whether study.toml asks for a site report and there is none."""
    return study.subject.site_report_cases > 0 and _numbers(study.folder) is None


def make_site_report(study: StudyFile, *, show: Callable[[str], None]) -> None:
    """Measure and compare the sites, if that is missing; cases that were measured before a stop are not measured again.

    What is in the way is told and stops nothing: the trainings do not depend on it, and the next `study run` tries again.

    Args:
        show: receives a line when it begins and when it ends.
    """
    if not site_report_missing(study):
        return
    with file_lock(study.folder / LOCK, wait_s=0.0) as mine:
        if not mine:
            show("Another process measures how different the sites are.")
            return
        if not site_report_missing(study):
            return
        most, began = study.subject.site_report_cases, time.monotonic()
        show(f"How different the sites are is measured, on at most {most} cases of each.")
        options = ReportOptions(
            features=FeatureOptions(scales=SCALES),
            statistics=STATISTICS,
            slices=False,
            cases_per_site=most,
            num_processes=study.training.num_processes,
        )
        folder = study.folder / FOLDER
        try:
            report = build_report(study.raw_dataset, folder, options=options)
            if not any(table.rows for table in report.tables.values()):
                raise DataError(f"no case could be measured. {report.findings.failures[0].reason}")
            write_report(report.findings, folder, tables=report.tables)
        except FedHarmError as error:
            show(f"How different the sites are was not measured: {error}")
            return
        show(f"The site report: {folder / 'report.html'}, after {(time.monotonic() - began) / 60:.1f} min")


def seconds_of_site_report(study: StudyFile) -> float:
    """What it will take, by one case that is measured for it.

    Raises:
        FedHarmError: it cannot be measured; its sentence.
    """
    description = read_dataset_json(study.raw_dataset, site="study")
    chosen = spread_cases(list_cases(study.raw_dataset, description, study.registry), study.subject.site_report_cases)
    # One without a label has the whole body measured, and then every case has.
    one = next((case for case in chosen if case.files.label is None), chosen[len(chosen) // 2])
    whole_body = any(case.files.label is None for case in chosen)
    with tempfile.TemporaryDirectory() as cache:
        began = time.monotonic()
        table, failures = measure_dataset(
            study.raw_dataset,
            registry=study.registry,
            options=FeatureOptions(scales=SCALES, image_region=whole_body),
            cache=Path(cache),
            num_processes=1,
            cases=[one.files.case],
        )
        seconds = time.monotonic() - began
    if failures and not table.rows:
        raise DataError(f"{failures[0].case} could not be measured: {failures[0].reason}")
    kept = len(list((study.folder / FOLDER / CACHE).glob("*.json")))
    measuring = seconds * max(0, len(chosen) - kept)
    return (measuring + PART_S * len(table.rows)) / max(1, study.training.num_processes)


def read_site_report(study: Path) -> Findings | None:
    """Numbers of the site report in the study's folder; None if there is none.

    Raises:
        DataError: it cannot be read.
    """
    path = _numbers(study)
    return None if path is None else from_json(Findings, read_json(path, what="The site report"))


def _numbers(study: Path) -> Path | None:
    return next((path for name in NUMBERS if (path := study / FOLDER / name).is_file()), None)
