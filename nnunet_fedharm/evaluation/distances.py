"""Overlap and surface distance of two binary masks.

Conventions where a mask is empty (Maier-Hein et al. leave them to the benchmark, so they are stated here and written
into every metrics file):

| reference | prediction | Dice | HD95 |
|---|---|---|---|
| empty | empty | NaN, as nnU-Net; not counted in any mean | NaN, not counted |
| one of the two empty | | 0 | the image's diagonal in mm, the largest distance that the image admits |

References:
    Maier-Hein, Reinke et al., "Metrics reloaded", Nature Methods 2024.
    Huttenlocher et al., "Comparing images using the Hausdorff distance", IEEE TPAMI 1993.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.ndimage import binary_erosion, distance_transform_edt, generate_binary_structure

from nnunet_fedharm.errors import ShapeError

Mask = npt.NDArray[np.bool_]

CONVENTIONS = {
    "dice": "2|A&B| / (|A|+|B|); NaN (null, not counted) if both masks are empty, 0 if one is",
    "hd95_mm": (
        "largest of the two directed 95th percentiles of surface distances in mm; NaN (null, not counted) if both "
        "masks are empty, the image's diagonal if one is"
    ),
}


def dice(reference: Mask, prediction: Mask) -> float:
    """Dice overlap, 2|A&B| / (|A|+|B|); NaN if both masks are empty.

    Raises:
        ShapeError: the shapes differ.
    """
    _same_shape(reference, prediction)
    total = int(reference.sum()) + int(prediction.sum())
    return float(2 * int((reference & prediction).sum()) / total) if total else float("nan")


def hausdorff_distance_95(reference: Mask, prediction: Mask, spacing_mm: Sequence[float]) -> float:
    """95% Hausdorff distance in mm: max(P95 d(a, B), P95 d(b, A)) over the surface voxels a of A and b of B.

    A surface voxel is a voxel of the mask with at least one face neighbour outside the mask; what lies beyond the
    image's edge counts as outside.

    Args:
        reference: mask A, any number of axes.
        prediction: mask B, same shape.
        spacing_mm: distance between voxel centres, one per axis in the array's order.

    Raises:
        ShapeError: the shapes differ, or the spacing has another length.
    """
    _same_shape(reference, prediction)
    if len(spacing_mm) != reference.ndim:
        raise ShapeError(f"Spacing {tuple(spacing_mm)} does not fit an image of shape {reference.shape}.")
    if not reference.any() and not prediction.any():
        return float("nan")
    if not reference.any() or not prediction.any():
        return image_diagonal(reference.shape, spacing_mm)
    window = _common_window(reference | prediction)
    edges = [_surface(mask[window]) for mask in (reference, prediction)]
    to_reference, to_prediction = (distance_transform_edt(~edge, sampling=spacing_mm) for edge in edges)
    return float(max(np.percentile(to_prediction[edges[0]], 95), np.percentile(to_reference[edges[1]], 95)))


def image_diagonal(shape: Sequence[int], spacing_mm: Sequence[float]) -> float:
    """Distance in mm between the centres of two opposite corner voxels."""
    return float(np.linalg.norm((np.asarray(shape) - 1) * np.asarray(spacing_mm, dtype=float)))


def _surface(mask: Mask) -> Mask:
    """Voxels of the mask that one erosion with the face-connected cross removes."""
    # The window is tight, so without padding scipy's border_value=0 marks the window's edge, as beyond the image.
    eroded = binary_erosion(mask, structure=generate_binary_structure(mask.ndim, 1), border_value=0)
    return np.asarray(mask & ~eroded, dtype=bool)


def _common_window(mask: Mask) -> tuple[slice, ...]:
    """Tight box around the mask: every surface voxel lies inside, so distances between surfaces do not change."""
    window = []
    for axis in range(mask.ndim):
        inside = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        window.append(slice(int(inside[0]), int(inside[-1]) + 1))
    return tuple(window)


def _same_shape(reference: Mask, prediction: Mask) -> None:
    if reference.shape != prediction.shape:
        raise ShapeError(f"Reference {reference.shape} and prediction {prediction.shape} have different shapes.")
