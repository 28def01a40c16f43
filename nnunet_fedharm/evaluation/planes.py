"""Slices of volumes as a reader expects them: front or head up, the patient's right on the left, square pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Directions = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Plane:
    """How volumes of one geometry are cut.

    Attributes:
        axis: array axis that is cut across.
        rows, columns: array axes that become rows and columns.
        turn: step (1 or -1) along each of them.
        spacing_mm: of rows and columns.
    """

    axis: int
    rows: int
    columns: int
    turn: tuple[int, int]
    spacing_mm: tuple[float, float]

    def cut(self, volume: npt.NDArray[Any], index: int) -> npt.NDArray[Any]:
        """(H, W) of a (Z, Y, X) volume at a place along the axis."""
        piece = np.moveaxis(volume, (self.axis, self.rows, self.columns), (0, 1, 2))[index]
        return piece[:: self.turn[0], :: self.turn[1]]


def plane_of(properties: Mapping[str, Any]) -> Plane:
    """The plane of the sharpest slices.

    Args:
        properties: of nnU-Net's reader.
    """
    spacing = [float(value) for value in properties["spacing"]]
    # Thick slices are looked at in their plane.
    axis = int(np.argmax(spacing)) if max(spacing) > 1.01 * min(spacing) else 0
    rows, columns, turn = upright(axis, directions_of(properties))
    return Plane(axis, rows, columns, turn, (spacing[rows], spacing[columns]))


def directions_of(properties: Mapping[str, Any]) -> Directions:
    """(3, 3): row k is the direction in which array axis k runs, toward the patient's (left, back, head)."""
    itk, nifti = properties.get("sitk_stuff"), properties.get("nibabel_stuff")
    if itk and len(itk.get("direction", ())) == 9:
        return np.reshape(itk["direction"], (3, 3)).T[::-1]
    if (nifti and "reoriented_affine" in nifti) or (nifti and "original_affine" in nifti):
        affine = np.asarray(nifti.get("reoriented_affine", nifti["original_affine"]))[:3, :3]
        return (np.diag([-1.0, -1.0, 1.0]) @ affine).T[::-1]
    return np.eye(3)[::-1]


def upright(axis: int, directions: Directions) -> tuple[int, int, tuple[int, int]]:
    """Which array axes become rows and columns, and the step (1 or -1) along each.

    Args:
        axis: the array axis that is cut across.
        directions: of the array axes.
    """
    rest = [other for other in range(3) if other != axis]
    world = [int(np.argmax(np.abs(directions[other]))) for other in rest]
    rows, columns = rest if world[0] > world[1] else rest[::-1]

    def runs(array_axis: int) -> float:
        return float(directions[array_axis][np.argmax(np.abs(directions[array_axis]))])

    # Down the rows toward the back, or toward the feet; along the columns toward the left or the back.
    upward = int(np.argmax(np.abs(directions[rows]))) == 2
    return rows, columns, (-1 if (runs(rows) > 0) == upward else 1, 1 if runs(columns) > 0 else -1)


def square_pixels(
    piece: npt.NDArray[Any], spacing_mm: tuple[float, float], longest: int, *, order: int = 1
) -> npt.NDArray[Any]:
    """A slice with square pixels, its longest side of a given size.

    Args:
        piece: (H, W).
        spacing_mm: of rows and columns.
        longest: pixels.
        order: of the interpolation; 0 keeps labels whole.
    """
    from scipy.ndimage import zoom

    size = np.array(piece.shape) * np.array(spacing_mm)
    target = np.maximum(np.rint(longest * size / size.max()), 1)
    return np.asarray(zoom(piece, target / np.array(piece.shape), order=order, grid_mode=True, mode="nearest"))
