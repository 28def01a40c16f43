"""From folders of images, labels and predictions to the content of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.filebasedimages import ImageFileError

from nnunet_fedharm.errors import DataError
from nnunet_fedharm.evaluation.charts import Line
from nnunet_fedharm.evaluation.page import SitePictures
from nnunet_fedharm.evaluation.pictures import data_uri, density, errors, grey_picture, overlay

Volume = npt.NDArray[np.floating[Any]]
HISTOGRAM_EDGES = np.linspace(-4.0, 2.5, 53)


@dataclass(frozen=True)
class SiteFolders:
    """One site's held-out cases.

    Attributes:
        site, note: name and a few words.
        images: CASE_0000.nii.gz as scanned.
        harmonized: the same names, harmonized.
        labels: CASE.nii.gz.
        predictions: harmonizer kind -> folder of CASE.nii.gz.
    """

    site: str
    note: str
    images: Path
    harmonized: Path
    labels: Path
    predictions: Mapping[str, Path]

    @property
    def cases(self) -> list[str]:
        """Case identifiers, sorted."""
        return sorted(path.name.removesuffix(".nii.gz") for path in self.labels.glob("*.nii.gz"))


def read_volume(path: Path) -> Volume:
    """Voxels of a NIfTI file.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        return np.asarray(nib.load(path).dataobj)
    except (OSError, ImageFileError) as error:
        raise DataError(f"Cannot read {path}: {error}") from error


def before_and_after(sites: Sequence[SiteFolders]) -> list[SitePictures]:
    """As scanned and harmonized, of each site's first case."""
    rows = []
    for site in sites:
        before, after, mask = _scored_pair(site, site.cases[0])
        cut, window = _middle(mask), _window(mask)
        pictures = [grey_picture(_axial(volume, cut, window), _axial(mask, cut, window)) for volume in (before, after)]
        columns = [("as scanned", data_uri(pictures[0])), ("harmonized", data_uri(pictures[1]))]
        rows.append(SitePictures(site.site, site.note, columns))
    return rows


def labels_and_errors(sites: Sequence[SiteFolders]) -> list[SitePictures]:
    """Expert label, then each kind's prediction and its wrong voxels, of each site's first case."""
    rows = []
    for site in sites:
        case = site.cases[0]
        image, _, mask = _scored_pair(site, case)
        cut, window = _middle(mask), _window(mask)
        grey = grey_picture(_axial(image, cut, window), _axial(mask, cut, window))
        label = _axial(read_volume(site.labels / f"{case}.nii.gz"), cut, window).astype(int)
        columns = [("true label", data_uri(overlay(grey, label)))]
        for kind, folder in site.predictions.items():
            prediction = _axial(read_volume(folder / f"{case}.nii.gz"), cut, window).astype(int)
            columns.append((f"prediction, {kind}", data_uri(overlay(grey, prediction))))
            columns.append((f"wrong voxels, {kind}", data_uri(errors(grey, label, prediction))))
        rows.append(SitePictures(site.site, site.note, columns))
    return rows


def histograms(sites: Sequence[SiteFolders]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Mean histogram of each site's cases inside the brain, as scanned and harmonized, on the case's own scale."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {"as scanned": {}, "harmonized": {}}
    centres = (HISTOGRAM_EDGES[1:] + HISTOGRAM_EDGES[:-1]) / 2
    for site in sites:
        pairs = [_scored_pair(site, case) for case in site.cases]
        for index, name in enumerate(found):
            volumes = [(before, after)[index][mask] for before, after, mask in pairs]
            heights = density(volumes, HISTOGRAM_EDGES)
            found[name][site.site] = list(zip(centres.tolist(), heights, strict=True))
    return found


def training_lines(events: Mapping[str, Sequence[Mapping[str, Any]]], phase: str, value: str) -> list[Line]:
    """A line per harmonizer kind of one value over the rounds of a phase, from the federation's event log."""
    lines = []
    for index, (kind, log) in enumerate(events.items()):
        rounds = [event for event in log if event.get("event") == "round_end" and event.get("phase") == phase]
        points = [(float(event["round"]), float(event[value])) for event in rounds if event.get(value) is not None]
        if points:
            lines.append(Line(kind, f"series-{index + 1}", points))
    return lines


def traffic(events: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """Bytes that a run's rounds sent to the sites and back."""
    rounds = [event for event in events if event.get("event") == "round_end"]
    down, up = (sum(int(event.get(name) or 0) for event in rounds) for name in ("bytes_down", "bytes_up"))
    return down, up


def _scored_pair(site: SiteFolders, case: str) -> tuple[Volume, Volume, npt.NDArray[np.bool_]]:
    """As scanned and harmonized, both in standard deviations of the scan from its mean, and the mask of the scan."""
    before = read_volume(site.images / f"{case}_0000.nii.gz").astype(np.float64)
    after = read_volume(site.harmonized / f"{case}_0000.nii.gz").astype(np.float64)
    mask = before != 0
    mean, deviation = before[mask].mean(), max(float(before[mask].std()), 1e-8)
    return (before - mean) / deviation, (after - mean) / deviation, mask


def _middle(mask: npt.NDArray[np.bool_]) -> int:
    """Third axis' slice a little above the middle of the mask: in a brain, at the ventricles."""
    inside = np.flatnonzero(mask.any(axis=(0, 1)))
    return int(inside[0] + 0.52 * (inside[-1] - inside[0]))


def _window(mask: npt.NDArray[np.bool_], margin: int = 2) -> tuple[slice, slice]:
    """Box around the mask in the first two axes."""
    window = []
    for axis in (0, 1):
        inside = np.flatnonzero(mask.any(axis=(1 - axis, 2)))
        window.append(slice(max(0, int(inside[0]) - margin), int(inside[-1]) + 1 + margin))
    return window[0], window[1]


def _axial(volume: npt.NDArray[Any], cut: int, window: tuple[slice, slice]) -> npt.NDArray[Any]:
    return np.rot90(volume[window[0], window[1], cut])
