"""From finished cells to the report's folder.

report.html      the page, self-contained
report.pdf       the page printed, where a browser is installed
study.json       every number on it
tables/*.csv     arms, comparisons, cases, costs, controls
methods.md       methods section with citations; references.bib: their entries
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from nnunet_fedharm.differences.findings import to_json
from nnunet_fedharm.errors import DataError, SetupError
from nnunet_fedharm.sites.files import write_text
from nnunet_fedharm.study.cell_card import write_cell_card
from nnunet_fedharm.study.report.answers import answer_all
from nnunet_fedharm.study.report.files import write_tables
from nnunet_fedharm.study.report.methods import methods
from nnunet_fedharm.study.report.page import Extras, render_study
from nnunet_fedharm.study.report.pdf import print_pdf
from nnunet_fedharm.study.report.pictures import before_and_after, label_names
from nnunet_fedharm.study.report.references import bibtex
from nnunet_fedharm.study.results import StudyResults
from nnunet_fedharm.study.site_report import read_site_report
from nnunet_fedharm.study.statistics import analyse

PAGE, PDF, JSON, METHODS, REFERENCES = "report.html", "report.pdf", "study.json", "methods.md", "references.bib"


def write_report(
    results: StudyResults, folder: Path, *, pdf: bool = True, show: Callable[[str], None] = lambda line: None
) -> Path:
    """Compute everything and write all files, and a model card into each finished cell's folder.

    Args:
        results: finished cells, at least one.
        folder: made where missing.
        pdf: print the page, if a browser is installed.
        show: receives a sentence where there is no PDF.

    Returns:
        The page.

    Raises:
        DataError: no cell of the control is finished, or the site report cannot be read.
        SetupError: the folder cannot be written.
    """
    if results.control not in results.by_arm:
        raise DataError(
            f"The control {results.control.name} has no result yet, and every number is told against it. Run its cells first: "
            f"`nnunet-fedharm study run {results.study.folder} --only {results.control.name}_seed`."
        )
    found = analyse(results)
    sites = read_site_report(results.study.folder)
    strips, notes = before_and_after(results)
    written = methods(results, found, sites)
    extras = Extras(sites, strips, notes, label_names(results), written, bibtex(written))
    content = {**to_json(found), "answers": to_json(answer_all(found, sites))}
    for cell in results.finished:
        write_cell_card(results.study, cell)
    page = folder / PAGE
    _remove(folder / PDF)  # of a former report: where no new one is printed, it would stand beside other numbers
    write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", folder / JSON)
    write_tables(results, found, folder / "tables")
    write_text(written, folder / METHODS)
    write_text(extras.bibtex, folder / REFERENCES)
    write_text(render_study(found, extras), page)
    reason = print_pdf(page, folder / PDF) if pdf else None
    if reason is not None:
        show(reason)
    return page


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise SetupError(
            f"Cannot replace {path}: {error.strerror}. Close or remove it, or choose another folder."
        ) from error
