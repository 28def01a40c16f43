"""Did harmonization keep the lesions? Contrast-to-noise ratio, lesion-wise recall, false lesions.

A lesion is a connected component (neighbours by face, edge or corner) of a binary mask.

References:
    Cohen, Luck, Honari, "Distribution matching losses can hallucinate features in medical image translation", MICCAI
    2018: matching distributions adds and removes tumours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.ndimage import binary_dilation, generate_binary_structure, label

from nnunet_fedharm.errors import ShapeError

Image = npt.NDArray[np.floating[Any]]
Mask = npt.NDArray[np.bool_]

RIM_VOXELS = 3
"""Thickness of the shell around a lesion that stands for its surroundings."""

DETECTED_OVERLAP = 0.1
"""Share of a lesion's voxels that a prediction has to cover to count as detected."""


@dataclass(frozen=True)
class LesionCount:
    """Lesions of one volume and what a segmenter made of them.

    Attributes:
        lesions: in the reference.
        found: of these, covered by the prediction to at least DETECTED_OVERLAP.
        false_lesions: components of the prediction that touch no lesion.
    """

    lesions: int
    found: int
    false_lesions: int

    @property
    def recall(self) -> float:
        """found / lesions; NaN for a lesion-free volume."""
        return self.found / self.lesions if self.lesions else float("nan")


def surroundings(lesion: Mask, allowed: Mask, thickness: int = RIM_VOXELS) -> Mask:
    """Shell of `thickness` voxels around a lesion, as far as it is allowed (foreground, no other lesion)."""
    _same_shape(lesion, allowed)
    grown = binary_dilation(lesion, structure=_all_neighbours(lesion.ndim), iterations=thickness)
    return np.asarray(grown & ~lesion & allowed, dtype=bool)


def contrast_to_noise(image: Image, lesion: Mask, around: Mask) -> float:
    """CNR = (mean_lesion - mean_around) / std_around, signed; NaN if a region is empty or the surroundings are flat.

    Does not change with offset and positive gain of the image.

    Raises:
        ShapeError: the shapes differ.
    """
    _same_shape(image, lesion)
    _same_shape(image, around)
    if not lesion.any() or not around.any():
        return float("nan")
    inside, outside = (np.asarray(image[region], dtype=np.float64) for region in (lesion, around))
    noise = float(outside.std())
    return float((inside.mean() - outside.mean()) / noise) if noise > 0 else float("nan")


def count_lesions(reference: Mask, prediction: Mask, *, min_voxels: int = 1) -> LesionCount:
    """Lesion-wise detection in one volume.

    Args:
        reference: true lesions; all False for a lesion-free volume.
        prediction: a segmenter's output on the same grid. The segmenter must not have been trained on what it judges.
        min_voxels: components of the prediction smaller than this do not count as false lesions.

    Raises:
        ShapeError: the shapes differ.
    """
    _same_shape(reference, prediction)
    lesions, n_lesions = label(reference, structure=_all_neighbours(reference.ndim))
    sizes = np.bincount(lesions.ravel(), minlength=n_lesions + 1)[1:]
    covered = np.bincount(lesions[prediction], minlength=n_lesions + 1)[1:]
    found = int((covered >= DETECTED_OVERLAP * sizes).sum()) if n_lesions else 0
    components, n_components = label(prediction, structure=_all_neighbours(reference.ndim))
    touching = np.bincount(components[reference], minlength=n_components + 1)[1:] > 0
    large = np.bincount(components.ravel(), minlength=n_components + 1)[1:] >= min_voxels
    return LesionCount(n_lesions, found, int((large & ~touching).sum()))


def _all_neighbours(ndim: int) -> Mask:
    return np.asarray(generate_binary_structure(ndim, ndim), dtype=bool)


def _same_shape(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> None:
    if first.shape != second.shape:
        raise ShapeError(f"Arrays {first.shape} and {second.shape} have different shapes.")
