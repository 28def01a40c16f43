"""Before and after: one test case of each site, scanned, harmonized, and segmented by each arm.

The case is the one whose Dice with the control is the median of its site's, among cases with all files: chosen by a rule, neither
the best nor the worst. The slice is the one with the most labelled pixels. Intensities are in standard deviations of the scan, in
one window for all pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_fedharm.errors import DataError
from nnunet_fedharm.evaluation.labels import Targets
from nnunet_fedharm.evaluation.pictures import LABEL_COLOURS, data_uri, grey_picture, overlay
from nnunet_fedharm.evaluation.planes import Plane, plane_of, square_pixels
from nnunet_fedharm.evaluation.volumes import read_images, read_segmentation, reader_for
from nnunet_fedharm.sites.files import read_dataset_json
from nnunet_fedharm.study.matrix import Arm
from nnunet_fedharm.study.report.names import kind_name
from nnunet_fedharm.study.results import CellResult, StudyResults
from nnunet_fedharm.study.statistics import is_harmonizer

Array = npt.NDArray[Any]

PICTURE_SIZE = 180
"""Longest side in pixels."""
MOST_HARMONIZERS = 3
SHARES = (0.005, 0.995)
"""Quantiles of all shown pixels that become black and white."""


@dataclass(frozen=True)
class SiteStrip:
    """One site's pictures: (caption, data address), from left to right."""

    site: str
    dice: str
    columns: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class _Piece:
    """One picture before its window is known; labels None: the image alone."""

    caption: str
    image: Array
    labels: Array | None


def before_and_after(results: StudyResults) -> tuple[list[SiteStrip], list[str]]:
    """Strips of the sites, and sentences on sites that have none."""
    arms = _shown(results)
    found: dict[str, tuple[str, list[_Piece]]] = {}
    notes = []
    for site in results.study.sites:
        try:
            strip = _site(results, site, arms)
        except DataError as error:
            notes.append(f"No pictures of {site}: {error}")
            continue
        if strip is None:
            notes.append(f"No pictures of {site}: no test case has its scan, its label and every prediction on disk.")
        else:
            found[site] = strip
    pixels = [piece.image.ravel() for _, pieces in found.values() for piece in pieces]
    low, high = np.quantile(np.concatenate(pixels), SHARES) if pixels else (0.0, 1.0)
    window = float(low), max(float(high), float(low) + 1e-3)
    strips = [
        SiteStrip(site, dice, [(piece.caption, _picture(piece, window)) for piece in pieces])
        for site, (dice, pieces) in found.items()
    ]
    return strips, notes


def label_names(results: StudyResults) -> list[str]:
    """Names of the label values 1, 2, ... for the colour key; at most as many as there are colours.

    A value of several regions has the name of the smallest one, which lies inside the others: of an enhancing tumor inside a
    tumor core inside a whole tumor. A value of none has its number.
    """
    regions = Targets.from_dataset_json(read_dataset_json(results.study.raw_dataset, site="study")).regions
    names: dict[int, str] = {}
    for name in sorted(regions, key=lambda name: -len(regions[name])):
        names |= dict.fromkeys(regions[name], name)
    return [names.get(value, str(value)) for value in range(1, min(max(names), len(LABEL_COLOURS)) + 1)]


def _shown(results: StudyResults) -> list[CellResult]:
    """First trainings of the control and of the first harmonizers, central ones before federated ones."""
    arms = [arm for arm in results.by_arm if is_harmonizer(arm) and arm.epsilon is None]
    chosen: dict[str, Arm] = {}
    for arm in sorted(arms, key=lambda arm: arm.mode != "central"):
        chosen.setdefault(arm.harmonizer, arm)
    wanted = [results.control, *list(chosen.values())[:MOST_HARMONIZERS]]
    return [_first(results, arm) for arm in wanted if arm in results.by_arm]


def _first(results: StudyResults, arm: Arm) -> CellResult:
    """Of the study's first seed, whose harmonized volumes are kept, if it is finished."""
    cells, first = results.by_arm[arm], results.study.subject.seeds[0]
    return next((cell for cell in cells if cell.cell.seed == first), cells[0])


def _site(results: StudyResults, site: str, cells: Sequence[CellResult]) -> tuple[str, list[_Piece]] | None:
    description = read_dataset_json(results.study.raw_dataset, site=site)
    ending, channels = str(description["file_ending"]), len(description["channel_names"])
    test = results.study.folder / "data" / "test" / site
    plain = [cell for cell in cells if not is_harmonizer(cell.cell.arm)]
    if not plain:
        return None
    case = _median_case(plain[0].scores(site), lambda name: _files(test, cells, site, name, ending))
    if case is None:
        return None
    reader = reader_for(description, test / "images" / f"{case}_0000{ending}")
    volume, properties = read_images(_channels(test / "images", case, ending, channels), reader)
    plane, expert = plane_of(properties), read_segmentation(test / "labels" / f"{case}{ending}", reader).array
    index = _slice_of(expert, plane)
    mask = volume[0] != 0
    inside = volume[0][mask] if mask.any() else volume[0]
    mean, deviation = float(inside.mean()), max(float(inside.std()), 1e-8)

    def piece(caption: str, image: Array, labels: Array | None) -> _Piece:
        cut = square_pixels(plane.cut((image - mean) / deviation, index), plane.spacing_mm, PICTURE_SIZE)
        if labels is None:
            return _Piece(caption, cut, None)
        own = plane.cut(np.maximum(labels, 0), index)
        return _Piece(caption, cut, square_pixels(own, plane.spacing_mm, PICTURE_SIZE, order=0))

    pieces = [piece("scan", volume[0], None), piece("expert", volume[0], expert)]
    for cell in cells:
        predicted = read_segmentation(cell.folder / "predictions" / site / f"{case}{ending}", reader).array
        name, image = kind_name(cell.cell.arm.harmonizer), volume[0]
        if is_harmonizer(cell.cell.arm):
            image = read_images(_channels(cell.folder / "harmonized" / site, case, ending, channels), reader)[0][0]
            pieces.append(piece(f"{name}, {cell.cell.arm.mode}: harmonized", image, None))
        pieces.append(piece(f"{name}: prediction", image, predicted))
    shown = [f"{kind_name(cell.cell.arm.harmonizer)} {cell.scores(site)[case]:.2f}" for cell in cells]
    return f"Dice: {', '.join(shown)}", pieces


def _median_case(scores: Mapping[str, float], complete: Any) -> str | None:
    """The lower median, so that it is a case."""
    known = sorted((value, case) for case, value in scores.items() if np.isfinite(value) and complete(case))
    return known[(len(known) - 1) // 2][1] if known else None


def _files(test: Path, cells: Sequence[CellResult], site: str, case: str, ending: str) -> bool:
    """Whether everything of a case is on disk; the reference's images may be left unharmonized."""
    needed = [test / "images" / f"{case}_0000{ending}", test / "labels" / f"{case}{ending}"]
    for cell in cells:
        needed.append(cell.folder / "predictions" / site / f"{case}{ending}")
        if is_harmonizer(cell.cell.arm):
            needed.append(cell.folder / "harmonized" / site / f"{case}_0000{ending}")
    return all(path.is_file() for path in needed)


def _channels(folder: Path, case: str, ending: str, channels: int) -> list[Path]:
    return [folder / f"{case}_{channel:04d}{ending}" for channel in range(channels)]


def _slice_of(labels: Array, plane: Plane) -> int:
    """With the most labelled pixels; the middle where nothing is labelled."""
    others = tuple(axis for axis in range(3) if axis != plane.axis)
    area = (labels > 0).sum(axis=others)
    return int(np.argmax(area)) if area.any() else labels.shape[plane.axis] // 2


def _picture(piece: _Piece, window: tuple[float, float]) -> str:
    grey = grey_picture(piece.image, np.ones(piece.image.shape, dtype=bool), window)
    return data_uri(grey if piece.labels is None else overlay(grey, np.asarray(piece.labels, dtype=int)), scale=1)
