"""What the finished cells of a study found, in the form that statistics and report read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_fedharm.sites.files import read_json
from nnunet_fedharm.study.cell_files import (
    COST_FILE,
    ENVIRONMENT_FILE,
    METRICS_FILE,
    QUALITY_FILE,
    cell_folder,
    is_finished,
)
from nnunet_fedharm.study.matrix import Arm, Cell, arms_of, cells_of, control_arm
from nnunet_fedharm.study.settings import check_settings
from nnunet_fedharm.study.study_file import StudyFile
from nnunet_fedharm.study.study_tables import Report

DICE, HD95 = "dice", "hd95_mm"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a cell took.

    Attributes:
        train_s: seconds of the cell's own planning, preprocessing and training.
        predict_s: seconds of prediction per volume.
        shared_s: of planning and preprocessing that was done before for this and other cells; None where it was not recorded.
        adapt_s: of the adaptations to held-out sites, all of them together; None where they were not recorded.
        bytes_up, bytes_down: of weights, all sites together; 0 where nothing is sent.
        epsilon, delta: spent by each patient of the site that spent most; None without differential privacy.
        without_noise: releases about patients that have no epsilon.
        device: where it ran.
        energy_j: of the training, as the counters that can be read tell it; None where there is none. counters: which.
    """

    train_s: float
    predict_s: float
    shared_s: float | None = None
    adapt_s: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    epsilon: float | None = None
    delta: float | None = None
    without_noise: tuple[str, ...] = ()
    device: str = "cpu"
    energy_j: float | None = None
    counters: tuple[str, ...] = ()


@dataclass(frozen=True)
class CellResult:
    """A finished cell.

    Attributes:
        folder: its folder: `predictions/<site>`, and of the first seed `harmonized/<site>`.
        metrics: as `evaluation.segmentation.metrics_of` returns it.
        quality: as `nnunet-fedharm quality` writes it; None without travelling subjects or a harmonizer.
    """

    cell: Cell
    folder: Path
    metrics: Mapping[str, Any]
    cost: Cost
    quality: Mapping[str, Any] | None = None

    def scores(self, site: str, metric: str = DICE) -> dict[str, float]:
        """Case -> mean over labels at one site; NaN where no label is in either image."""
        return {
            case: mean_over_labels(entry["labels"], metric)
            for case, entry in sorted(self.metrics["cases"].items())
            if entry["site"] == site
        }


@dataclass(frozen=True)
class StudyResults:
    """A study and its finished cells."""

    study: StudyFile
    finished: Sequence[CellResult] = field(default_factory=list)

    @cached_property
    def by_arm(self) -> dict[Arm, list[CellResult]]:
        """Arms that have a finished cell, in the study's order; cells by seed."""
        found: dict[Arm, list[CellResult]] = {arm: [] for arm in arms_of(self.study)}
        for result in sorted(self.finished, key=lambda item: item.cell.seed):
            found[result.cell.arm].append(result)
        return {arm: results for arm, results in found.items() if results}

    @property
    def control(self) -> Arm:
        """Plain nnU-Net with its own augmentation."""
        return control_arm(self.study)

    def oracle(self, site: str) -> Arm:
        """Plain nnU-Net on the site's own labels; the control itself where nothing else is labelled."""
        return (
            self.control if self.study.labelled_sites == (site,) else Arm("local", self.control.harmonizer, site=site)
        )

    def seeds(self, arm: Arm) -> tuple[int, ...]:
        """Seeds with a result."""
        return tuple(result.cell.seed for result in self.by_arm.get(arm, []))

    def scores(
        self, arm: Arm, site: str, metric: str = DICE, *, seeds: Sequence[int] | None = None
    ) -> npt.NDArray[np.float64] | None:
        """(seeds, cases) at a site, cases sorted by name: the same for every arm; None if the arm was not tested there."""
        rows = [
            list(result.scores(site, metric).values())
            for result in self.by_arm.get(arm, [])
            if (seeds is None or result.cell.seed in seeds) and result.scores(site, metric)
        ]
        return np.array(rows, dtype=np.float64) if rows else None

    def cases(self, site: str) -> list[str]:
        """Test cases of a site, sorted."""
        return next((list(found) for result in self.finished if (found := result.scores(site))), [])


def mean_over_labels(labels: Mapping[str, Mapping[str, float | None]], metric: str) -> float:
    """Mean of a metric over the labels that are in either image; NaN if none is."""
    values = [float(value) for entry in labels.values() if (value := entry[metric]) is not None]
    return sum(values) / len(values) if values else math.nan


def read_results(study: StudyFile) -> StudyResults:
    """All finished cells.

    Raises:
        DataError: a file of a cell is damaged, or it was made with other settings than study.toml has now.
    """
    for cell in cells_of(study):
        check_settings(study, cell)
    return StudyResults(study, [read_cell(study, cell) for cell in cells_of(study) if is_finished(study, cell)])


def read_cell(study: StudyFile, cell: Cell) -> CellResult:
    """One finished cell."""
    folder = cell_folder(study, cell)
    cost = read_json(folder / COST_FILE, what=f"The cost of the cell {cell.name}")
    quality = folder / QUALITY_FILE
    return CellResult(
        cell,
        folder,
        read_json(folder / METRICS_FILE, what=f"The metrics of the cell {cell.name}"),
        Cost(**{**cost, **{name: tuple(cost.get(name, ())) for name in ("without_noise", "counters")}}),
        read_json(quality, what="The harmonization quality") if quality.is_file() else None,
    )


def fixed_beforehand(results: StudyResults) -> bool:
    """Whether every finished cell was begun with today's margin and least Dice; cells that recorded none had the defaults."""
    asked, defaults = asdict(results.study.report), asdict(Report())
    recorded = [read_environment(cell).get("report", defaults) for cell in results.finished]
    return all(entry.get(name) == asked[name] for entry in recorded for name in ("margin", "least_dice"))


def read_environment(cell: CellResult) -> dict[str, Any]:
    """What a finished cell recorded of versions, machine and report options; empty if it is missing."""
    path = cell.folder / ENVIRONMENT_FILE
    return read_json(path, what="The environment of a cell") if path.is_file() else {}
