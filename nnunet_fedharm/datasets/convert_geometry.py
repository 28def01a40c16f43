"""Do the files of a case lie on the same grid? Read from NIfTI headers, without voxels.

nnU-Net refuses files whose spacings differ by more than `numpy.allclose`'s 1e-5, so rounding in headers (0.7031 for 0.703125)
stops it. Such noise is mended by writing the file again with the first channel's geometry; more is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
from nibabel.filebasedimages import ImageFileError

from nnunet_fedharm.datasets.convert_cases import SourceCase
from nnunet_fedharm.errors import DataError

SPACING_TOLERANCE = 1e-3
"""Relative."""
DIRECTION_TOLERANCE = 1e-2
"""Largest difference of a direction cosine."""
ORIGIN_TOLERANCE = 0.1
"""In voxels of the finest axis."""
_AS_GOOD_AS_EQUAL = 1e-6


@dataclass(frozen=True)
class Grid:
    """Where voxels lie.

    Attributes:
        shape: voxels per axis.
        affine: voxel -> mm, (4, 4).
    """

    shape: tuple[int, ...]
    affine: npt.NDArray[np.float64]

    @property
    def spacing_mm(self) -> npt.NDArray[np.float64]:
        return np.asarray(np.linalg.norm(self.affine[:3, :3], axis=0))

    @property
    def direction(self) -> npt.NDArray[np.float64]:
        return np.asarray(self.affine[:3, :3] / self.spacing_mm)

    @property
    def origin_mm(self) -> npt.NDArray[np.float64]:
        return self.affine[:3, 3]


def read_grid(path: Path, *, case: str) -> Grid:
    """Grid of a NIfTI file.

    Raises:
        DataError: not a readable NIfTI file, not a volume, or a spacing of zero.
    """
    try:
        # Any: nibabel has no types.
        image: Any = nibabel.load(path)
    except (OSError, EOFError, ImageFileError, ValueError) as error:
        raise DataError(f"Case {case}: {path} cannot be read ({error}). Download the file again.") from error
    grid = Grid(tuple(int(size) for size in image.shape), np.asarray(image.affine, dtype=np.float64))
    if len(grid.shape) != 3 or not (grid.spacing_mm > 0).all():
        raise DataError(
            f"Case {case}: {path} has the shape {grid.shape} and spacing {grid.spacing_mm.round(4).tolist()} mm; "
            "a volume of three axes is needed. Export the file again."
        )
    return grid


def files_to_mend(case: SourceCase) -> frozenset[Path]:
    """Files whose header differs from the first channel's by rounding only, and which are to be written again.

    Raises:
        DataError: a channel or the label lies on another grid; the message names the file, what differs and what to do.
    """
    reference = read_grid(case.images[0], case=case.case)
    others = [*case.images[1:], *([] if case.label is None else [case.label])]
    return frozenset(path for path in others if _differs(reference, read_grid(path, case=case.case), path, case))


def _differs(reference: Grid, other: Grid, path: Path, case: SourceCase) -> bool:
    def refuse(what: str, found: Any, expected: Any) -> None:
        kind = "label" if path == case.label else "channel"
        raise DataError(
            f"Case {case.case}: the {kind} {path} has another {what} ({found}) than {case.images[0]} ({expected}). "
            "Resample it onto the first channel, or leave the case out with --exclude."
        )

    if reference.shape != other.shape:
        refuse("shape", other.shape, reference.shape)
    if not np.allclose(other.spacing_mm, reference.spacing_mm, rtol=SPACING_TOLERANCE, atol=0):
        refuse("spacing in mm", other.spacing_mm.round(5).tolist(), reference.spacing_mm.round(5).tolist())
    if np.abs(other.direction - reference.direction).max() > DIRECTION_TOLERANCE:
        refuse("direction", other.direction.round(4).tolist(), reference.direction.round(4).tolist())
    if np.abs(other.origin_mm - reference.origin_mm).max() > ORIGIN_TOLERANCE * reference.spacing_mm.min():
        refuse("origin in mm", other.origin_mm.round(4).tolist(), reference.origin_mm.round(4).tolist())
    return not np.allclose(other.affine, reference.affine, rtol=_AS_GOOD_AS_EQUAL, atol=_AS_GOOD_AS_EQUAL)
