"""Slices of the site report: where they are cut, which volumes are typical, and one window for all sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from scipy.spatial.distance import cdist

from nnunet_fedharm.evaluation.pictures import data_uri, grey_picture
from nnunet_fedharm.evaluation.planes import plane_of, square_pixels
from nnunet_fedharm.evaluation.volumes import read_images, read_segmentation, reader_for
from nnunet_fedharm.sites.features.table import FeatureTable
from nnunet_fedharm.sites.files import CaseFiles
from nnunet_fedharm.sites.parallel import map_cases

Array = npt.NDArray[np.float32]
Piece = TypeVar("Piece")

TYPICAL = 3
"""Volumes of a site on the page."""

PICTURE_SIZE = 200
"""Longest side of a picture in pixels."""

CLASSIFIED_SIZE = 48
"""Height and width of the slices that a classifier looks at."""

SHARES = (0.005, 0.995)
"""Quantiles of all shown slices that become black and white."""


@dataclass(frozen=True)
class CentralSlice:
    """One slice of one channel.

    Attributes:
        image: (H, W) standard deviations from the volume's mean, turned as a reader expects it: front or head up,
            the patient's right on the left.
        spacing_mm: of rows and columns.
    """

    image: Array
    spacing_mm: tuple[float, float]


@dataclass(frozen=True)
class TypicalSlices:
    """Pictures of one channel.

    Attributes:
        channel: name.
        window: standard deviations that are black and white in all of them.
        pictures: variant -> site -> data addresses, the most typical volume first; the same volumes in every variant.
    """

    channel: str
    window: tuple[float, float]
    pictures: dict[str, dict[str, list[str]]]


def central_slices(
    cases: Sequence[CaseFiles], dataset_json: Mapping[str, Any], *, num_processes: int
) -> dict[tuple[str, str], CentralSlice]:
    """The slice through the middle of the labels (else of the image) of each volume.

    Args:
        cases: their label may be None.
        dataset_json: names the channels and the reader.
        num_processes: side by side.

    Returns:
        (case, channel) -> slice; a case that cannot be read is left out, for the measurement lists it.
    """
    return _cut_all(_cut_or_none, cases, dataset_json, num_processes)


def small_slices(
    cases: Sequence[CaseFiles], dataset_json: Mapping[str, Any], *, num_processes: int
) -> dict[tuple[str, str], Array]:
    """The same as a network wants them: all CLASSIFIED_SIZE pixels high and wide, so that thousands fit into memory."""
    return _cut_all(_small_or_none, cases, dataset_json, num_processes)


def _cut_all(
    cut: Callable[..., list[Piece]], cases: Sequence[CaseFiles], dataset_json: Mapping[str, Any], num_processes: int
) -> dict[tuple[str, str], Piece]:
    work = partial(cut, dataset_json=dict(dataset_json))
    found = map_cases(work, cases, num_processes=num_processes, description="cut slices")
    names = [str(name) for name in dataset_json["channel_names"].values()]
    return {
        (case.case, name): piece
        for case, pieces in zip(cases, found, strict=True)
        for name, piece in zip(names, pieces, strict=False)
    }


def of_one_size(image: Array) -> Array:
    """(CLASSIFIED_SIZE, CLASSIFIED_SIZE) of an image of any size."""
    from scipy.ndimage import zoom

    factors = [CLASSIFIED_SIZE / size for size in image.shape]
    return np.asarray(zoom(image, factors, order=1, grid_mode=True, mode="nearest"), np.float32)


def typical_cases(table: FeatureTable, site: str, count: int = TYPICAL) -> list[str]:
    """The cases of a site with the smallest summed distance to its other cases, the most typical first.

    Distances are Euclidean between features in standard deviations of the site; features that are missing for a case or do
    not vary are left out. Travelling subjects do not count.

    Args:
        table: rows of one channel, region and scale.
        site: whose cases.
        count: at most so many.
    """
    own = table.where(lambda row: row.site == site and not row.travelling)
    if not own.rows:
        own = table.where(lambda row: row.site == site)
    if not own.rows:
        return []
    values = own.values[:, np.isfinite(own.values).all(axis=0)]
    spread = values.std(axis=0)
    scaled = (values - values.mean(axis=0))[:, spread > 0] / spread[spread > 0]
    apart = cdist(scaled, scaled).sum(axis=1)
    return [own.rows[int(index)].case for index in np.argsort(apart, kind="stable")[:count]]


def typical_slices(
    channel: str, cases: Mapping[str, Sequence[str]], slices: Mapping[str, Mapping[tuple[str, str], CentralSlice]]
) -> TypicalSlices:
    """Pictures of the chosen cases in one window.

    Args:
        channel: name.
        cases: site -> chosen cases.
        slices: variant -> (case, channel) -> slice.
    """
    shown = {
        variant: {
            site: [found[case, channel] for case in chosen if (case, channel) in found]
            for site, chosen in cases.items()
        }
        for variant, found in slices.items()
    }
    values = [piece.image.ravel() for by_site in shown.values() for pieces in by_site.values() for piece in pieces]
    low, high = np.quantile(np.concatenate(values), SHARES) if values else (-2.0, 2.0)
    window = float(low), max(float(high), float(low) + 1e-3)
    pictures = {
        variant: {site: [_picture(piece, window) for piece in pieces] for site, pieces in by_site.items()}
        for variant, by_site in shown.items()
    }
    return TypicalSlices(channel, window, pictures)


def _cut_or_none(case: CaseFiles, *, dataset_json: dict[str, Any]) -> list[CentralSlice]:
    from nnunet_fedharm.errors import DataError

    try:
        return _cut(case, dataset_json)
    except DataError:
        return []


def _small_or_none(case: CaseFiles, *, dataset_json: dict[str, Any]) -> list[Array]:
    return [of_one_size(piece.image) for piece in _cut_or_none(case, dataset_json=dataset_json)]


def _cut(case: CaseFiles, dataset_json: dict[str, Any]) -> list[CentralSlice]:
    reader = reader_for(dataset_json, case.images[0])
    volume, properties = read_images(case.images, reader)
    label = None
    if case.label is not None and case.label.is_file():
        label = read_segmentation(case.label, reader).array
    plane = plane_of(properties)
    index = volume.shape[plane.axis + 1] // 2
    if label is not None and (label > 0).any():
        inside = np.flatnonzero((label > 0).any(axis=tuple(a for a in range(3) if a != plane.axis)))
        index = int(inside[len(inside) // 2])
    pieces = []
    for channel in volume:
        mask = channel != 0
        values = channel[mask] if mask.any() else channel
        z = (channel - values.mean()) / max(float(values.std()), 1e-8)
        pieces.append(CentralSlice(np.ascontiguousarray(plane.cut(z, index), np.float32), plane.spacing_mm))
    return pieces


def _picture(piece: CentralSlice, window: tuple[float, float]) -> str:
    """Square pixels, the longest side PICTURE_SIZE."""
    image = square_pixels(piece.image, piece.spacing_mm, PICTURE_SIZE)
    return data_uri(grey_picture(image, np.ones(image.shape, dtype=bool), window), scale=1)
