"""Is the anatomy still where it was? Correlations of intensity gradients.

References:
    Penney, Weese, Little, Desmedt, Hill, Hawkes, "A comparison of similarity measures for use in 2-D-3-D medical image
    registration", IEEE TMI 1998 (gradient correlation).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.ndimage import binary_erosion

from nnunet_fedharm.errors import ShapeError

Image = npt.NDArray[np.floating[Any]]
Mask = npt.NDArray[np.bool_]


def gradient_correlation(first: Image, second: Image, mask: Mask, spacing_mm: Sequence[float]) -> float:
    """Mean over the axes i of corr_M(d first / d x_i, d second / d x_i), in [-1, 1].

    Signed: 1 for images that differ by offset and gain, -1 for an inverted contrast. Axes without a gradient in either
    image (a single slice) do not count; NaN if none is left.

    Args:
        first: any number of axes.
        second: same shape.
        mask: voxels that count; its outermost layer does not, since differences there reach outside.
        spacing_mm: one per axis.

    Raises:
        ShapeError: shapes or number of axes differ.
    """
    inner = _inner(first, second, mask, spacing_mm)
    values = [
        correlation(a[inner], b[inner])
        for a, b in zip(_gradients(first, spacing_mm), _gradients(second, spacing_mm), strict=True)
    ]
    counted = [value for value in values if not np.isnan(value)]
    return float(np.mean(counted)) if counted else float("nan")


def edge_correlation(first: Image, second: Image, mask: Mask, spacing_mm: Sequence[float]) -> float:
    """corr_M(|grad first|, |grad second|): are edges at the same places and of the same relative strength?

    Blind to the contrast's sign, so it may compare an input with its harmonized self where the harmonizer has to
    invert the contrast. Arguments and errors as `gradient_correlation`.
    """
    inner = _inner(first, second, mask, spacing_mm)
    norms = [np.sqrt(sum(part**2 for part in _gradients(image, spacing_mm))) for image in (first, second)]
    return correlation(np.asarray(norms[0])[inner], np.asarray(norms[1])[inner])


def correlation(first: Image, second: Image) -> float:
    """Pearson's correlation of two equally long vectors; NaN if one is constant."""
    a, b = (np.asarray(values, dtype=np.float64) - np.mean(values) for values in (first, second))
    product = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(np.clip(a @ b / product, -1.0, 1.0)) if product > 0 else float("nan")


def _gradients(image: Image, spacing_mm: Sequence[float]) -> list[npt.NDArray[np.float64]]:
    """Central differences per mm, one array per axis that has more than one voxel."""
    values = np.asarray(image, dtype=np.float64)
    axes = [axis for axis, size in enumerate(image.shape) if size > 1]
    return [np.asarray(np.gradient(values, spacing_mm[axis], axis=axis)) for axis in axes]


def _inner(first: Image, second: Image, mask: Mask, spacing_mm: Sequence[float]) -> Mask:
    """The mask without its outermost layer."""
    if not first.shape == second.shape == mask.shape or len(spacing_mm) != first.ndim:
        raise ShapeError(
            f"Images {first.shape} and {second.shape}, mask {mask.shape} and spacing {tuple(spacing_mm)} do not fit."
        )
    cross = np.zeros((3,) * mask.ndim, dtype=bool)
    for axis, size in enumerate(mask.shape):
        if size > 1:
            cross[tuple(slice(None) if other == axis else 1 for other in range(mask.ndim))] = True
    cross[(1,) * mask.ndim] = True
    return np.asarray(binary_erosion(mask, structure=cross, border_value=1), dtype=bool)
