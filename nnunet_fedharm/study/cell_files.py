"""Where a cell of a study keeps what."""

from __future__ import annotations

from pathlib import Path

from nnunet_fedharm.study.matrix import Cell
from nnunet_fedharm.study.study_file import StudyFile

METRICS_FILE, COST_FILE, QUALITY_FILE, ENVIRONMENT_FILE = (
    "metrics.json",
    "cost.json",
    "quality.json",
    "environment.json",
)


def cell_folder(study: StudyFile, cell: Cell) -> Path:
    """Where a cell keeps everything."""
    return study.folder / "cells" / cell.name


def is_finished(study: StudyFile, cell: Cell) -> bool:
    """Whether its metrics are there; they are written last."""
    return (cell_folder(study, cell) / METRICS_FILE).is_file()
