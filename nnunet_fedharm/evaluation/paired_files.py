"""Which harmonized volume belongs to which truth, and the files of each pair, checked before anything is measured."""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.filebasedimages import ImageFileError

from nnunet_fedharm.errors import DataError
from nnunet_fedharm.evaluation.volumes import GEOMETRY_TOLERANCE
from nnunet_fedharm.sites.files import read_json

ONE_SITE = "all"
_IMAGE_NAME = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})(?P<ending>\.nii(\.gz)?)")


@dataclass(frozen=True)
class Pair:
    """One subject at one site, and the same subject at the reference site.

    Attributes:
        case: identifier of the volume that was harmonized.
        reference: identifier of the truth; also names the patient.
        site: where the case was scanned.
    """

    case: str
    reference: str
    site: str


@dataclass(frozen=True)
class Volume:
    """An image and its grid.

    Attributes:
        path: the file.
        array: voxels as stored, axes (x, y, z); an axis of one voxel at the end is dropped.
        affine: (4, 4), voxel indices to mm.
        spacing_mm: one per axis of `array`.
    """

    path: Path
    array: npt.NDArray[np.float32]
    affine: npt.NDArray[np.float64]
    spacing_mm: tuple[float, ...]


def find_pairs(
    before: Path, reference: Path, *, pairs_file: Path | None = None, sites: Mapping[str, str] | None = None
) -> list[Pair]:
    """The pairs to measure.

    Args:
        before: folder of images `CASE_0000.nii.gz`.
        reference: folder of the truths.
        pairs_file: JSON object, case -> reference case, or case -> {"reference": ..., "site": ...}; without it the
            truth has the name of the case.
        sites: case -> site, for pairs that state no site; None puts them into one site.

    Returns:
        Sorted by site, then case.

    Raises:
        DataError: a folder without images, a malformed pairs file, a case without a site, or one patient twice at a site.
    """
    for folder in (before, reference):
        if not images_in(folder):
            raise DataError(f"{folder} holds no image named CASE_0000.nii.gz. Check the path.")
    if pairs_file is None:
        stated: dict[str, Any] = {case: case for case in images_in(before)}
    else:
        stated = read_json(pairs_file, what="The pairs file")
    if not stated:
        raise DataError(f"The pairs file {pairs_file} is empty. Write one entry case -> reference case per volume.")
    pairs = [_pair(case, entry, sites, pairs_file) for case, entry in stated.items()]
    _check_unique(pairs)
    return sorted(pairs, key=lambda pair: (pair.site, pair.case))


def images_in(folder: Path) -> dict[str, dict[str, Path]]:
    """Case -> channel ("0000") -> file, of a folder as nnU-Net names images.

    Raises:
        DataError: the folder does not exist.
    """
    if not folder.is_dir():
        raise DataError(f"The folder {folder} does not exist.")
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()):
        match = _IMAGE_NAME.fullmatch(path.name)
        if match and not path.name.startswith("."):
            found.setdefault(match["case"], {})[match["channel"]] = path
    return found


def channels_of(case: str, folder: Path, expected: Sequence[str] | None = None) -> dict[str, Path]:
    """Files of a case: the expected channels, or all that are there.

    Raises:
        DataError: an expected channel is missing, or there is none; the message names the missing file.
    """
    if expected is None:
        # Not images_in: for every pair anew, that would read the whole folder with a regular expression.
        names = sorted(path.name for path in folder.glob(f"{glob.escape(case)}_[0-9][0-9][0-9][0-9].nii*"))
        expected = [match["channel"] for name in names if (match := _IMAGE_NAME.fullmatch(name))] or ["0000"]
    found = {}
    for channel in expected:
        paths = [folder / f"{case}_{channel}{ending}" for ending in (".nii.gz", ".nii")]
        existing = [path for path in paths if path.is_file()]
        if not existing:
            raise DataError(f"{paths[0]} is missing. Write it, or leave the case out of --pairs.")
        found[channel] = existing[0]
    return found


def segmentation_file(folder: Path, *cases: str) -> Path:
    """The first file CASE.nii.gz or CASE.nii that is there.

    Raises:
        DataError: none is; the message names the file that was looked for first.
    """
    for case in cases:
        for ending in (".nii.gz", ".nii"):
            if (folder / f"{case}{ending}").is_file():
                return folder / f"{case}{ending}"
    raise DataError(f"{folder} holds no {' or '.join(f'{case}.nii.gz' for case in dict.fromkeys(cases))}.")


def read_volume(path: Path) -> Volume:
    """Read one NIfTI file.

    Raises:
        DataError: the file cannot be read, has more than three axes, or holds NaN or infinity; the message names it.
    """
    try:
        image: Any = nib.load(path)
        array = np.asarray(image.dataobj, dtype=np.float32)
    except (OSError, EOFError, ValueError, ImageFileError) as error:
        raise DataError(f"Cannot read {path}: {error}") from error
    zooms = tuple(float(value) for value in image.header.get_zooms())
    while array.ndim > 2 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3):
        raise DataError(f"{path} has shape {array.shape}; one file has to hold one channel in two or three dimensions.")
    if not np.isfinite(array).all():
        raise DataError(f"{path} holds NaN or infinity. Mend the file or write it anew.")
    return Volume(path, array, np.asarray(image.affine, dtype=np.float64), zooms[: array.ndim])


def read_like(path: Path, grid: Volume) -> Volume:
    """Read a file that has to lie on a given grid.

    Raises:
        DataError: as `read_volume`, or shape or affine differ; the message names both files and both values.
    """
    volume = read_volume(path)
    if volume.array.shape != grid.array.shape:
        raise DataError(
            f"{path} has shape {volume.array.shape}, but {grid.path} has {grid.array.shape}. Write it on that grid."
        )
    if not np.allclose(volume.affine, grid.affine, rtol=0, atol=GEOMETRY_TOLERANCE):
        largest = float(np.abs(volume.affine - grid.affine).max())
        raise DataError(
            f"{path} lies elsewhere in space than {grid.path}: their affines differ by up to {largest:g}. "
            "Resample or register it first."
        )
    return volume


def _pair(case: str, entry: Any, sites: Mapping[str, str] | None, pairs_file: Path | None) -> Pair:
    content = {"reference": entry} if isinstance(entry, str) else entry
    if not isinstance(content, Mapping) or not isinstance(content.get("reference"), str):
        raise DataError(
            f"{pairs_file}: the entry of {case} has to be the name of its reference case, or an object with the keys "
            "reference and (optional) site."
        )
    unknown = sorted(set(content) - {"reference", "site"})
    if unknown:
        raise DataError(f"{pairs_file}: {case} has the unknown key {unknown[0]!r}. Known keys: reference, site.")
    site = content.get("site") or (ONE_SITE if sites is None else sites.get(case))
    if site is None:
        raise DataError(
            f"No site is known for case {case}. Add it to the sites file, or state its site in the pairs file."
        )
    return Pair(case, content["reference"], str(site))


def _check_unique(pairs: Sequence[Pair]) -> None:
    seen: dict[tuple[str, str], str] = {}
    for pair in pairs:
        other = seen.setdefault((pair.reference, pair.site), pair.case)
        if other != pair.case:
            raise DataError(
                f"Cases {other} and {pair.case} are both patient {pair.reference} at site {pair.site}. State their sites "
                "in the pairs file or with --sites, or leave one out."
            )
