"""Files of the site report: the page, everything on it as JSON, a line per feature as CSV, and the features themselves."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from nnunet_fedharm.differences.findings import EmbeddingFinding, Findings, PartFinding, to_json
from nnunet_fedharm.differences.summary import describe
from nnunet_fedharm.evaluation.site_report.page import render_site_report
from nnunet_fedharm.evaluation.site_report.slices import TypicalSlices
from nnunet_fedharm.sites.features.table import FeatureTable
from nnunet_fedharm.sites.features.table_files import write_table
from nnunet_fedharm.sites.files import write_text

PAGE, JSON, DIFFERENCES, FEATURES = "report.html", "report.json", "differences.csv", "features.csv"


def write_report(
    findings: Findings,
    folder: Path,
    *,
    tables: Mapping[str, FeatureTable] | None = None,
    slices: Sequence[TypicalSlices] = (),
) -> Path:
    """Write all files of a report.

    Args:
        findings: pooled or federated; of a federated report nothing about a single case is written, whatever it holds.
        folder: made where missing.
        tables: variant -> its features; none in a federation.
        slices: pictures; none in a federation.

    Returns:
        The page.

    Raises:
        SetupError: the folder cannot be written.
    """
    if findings.mode == "federated":
        findings, tables, slices = without_cases(findings), {}, ()
    page = folder / PAGE
    write_text(differences_csv(findings), folder / DIFFERENCES)
    for index, (variant, table) in enumerate((tables or {}).items()):
        write_table(table, folder / (FEATURES if index == 0 else f"features_{_file_name(variant)}.csv"))
    write_text(render_site_report(findings, sentences=describe(findings), slices=slices), page)
    # Last: a folder with it holds a whole report.
    write_text(json.dumps(to_json(findings), indent=1, allow_nan=False) + "\n", folder / JSON)
    return page


def differences_csv(findings: Findings) -> str:
    """A line per variant, part and feature."""
    sites = [card.site for card in findings.sites]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    head = ["variant", "channel", "region", "scale", "feature", "family", "n", "p", "q", "eta_squared", "low", "high"]
    writer.writerow([*head, *(f"median {site}" for site in sites)])
    for variant in findings.variants:
        for part in variant.parts:
            for item in part.features:
                effect = [item.effect.value, item.effect.low, item.effect.high]
                medians = [item.medians.get(site) for site in sites]
                numbers = ["" if value is None else repr(value) for value in (item.p, item.q, *effect, *medians)]
                writer.writerow(
                    [variant.name, part.channel, part.region, part.scale, item.name, item.family, item.n, *numbers]
                )
    return text.getvalue()


def without_cases(findings: Findings) -> Findings:
    """The same without anything about a single case: points, outliers, names in failures."""
    return replace(
        findings,
        variants=[
            replace(variant, parts=[_part_without_cases(part) for part in variant.parts])
            for variant in findings.variants
        ],
        failures=[replace(item, case="") for item in findings.failures],
    )


def _part_without_cases(part: PartFinding) -> PartFinding:
    embedding: EmbeddingFinding | None = None if part.embedding is None else replace(part.embedding, points=[])
    return replace(part, embedding=embedding, outliers=[])


def _file_name(variant: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", variant).strip("_")
