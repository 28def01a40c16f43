"""How close an image is to a truth on the same grid: nRMSE, PSNR and windowed SSIM inside a mask.

| symbol | variable | meaning |
|---|---|---|
| a | `truth` | the same subject at the reference site |
| y | `image` | the subject at another site, as scanned or harmonized |
| M | `mask` | voxels that count |
| L | `data_range` | max - min of a in M |

MR intensities have no unit, and nnU-Net z-scores every volume, so an affine change is no site effect to it. Callers
z-score both volumes over M first (`zscore_inside`); then nRMSE is 0 for equal images, 1 for a flat one, sqrt(2) for an
unrelated one and 2 for an inverted one.

References:
    Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from error visibility to structural similarity", IEEE
    TIP 2004. One SSIM over a whole volume without windows, seen in the field, is another and much kinder number.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.ndimage import binary_fill_holes
from skimage.metrics import structural_similarity

from nnunet_fedharm.errors import ShapeError

Image = npt.NDArray[np.floating[Any]]
Mask = npt.NDArray[np.bool_]

SSIM_WINDOW = 7
"""Voxels per axis of the uniform SSIM window, scikit-image's default."""


def foreground_mask(image: Image) -> Mask:
    """Voxels that are not zero, holes filled: nnU-Net's rule for the foreground of one channel."""
    return np.asarray(binary_fill_holes(image != 0), dtype=bool)


def zscore_inside(image: Image, mask: Mask) -> npt.NDArray[np.float64]:
    """(image - mean) / std over the mask, 0 outside; a flat image becomes 0 everywhere.

    Raises:
        ShapeError: the shapes differ, or the mask is empty.
    """
    _check(image, image, mask)
    values = np.asarray(image[mask], dtype=np.float64)
    scaled = np.zeros(image.shape, dtype=np.float64)
    scaled[mask] = (values - values.mean()) / max(float(values.std()), 1e-8)
    return scaled


def nrmse(truth: Image, image: Image, mask: Mask) -> float:
    """sqrt(mean_M (y - a)^2) / std_M(a); NaN if the truth is flat.

    Raises:
        ShapeError: the shapes differ, or the mask is empty.
    """
    _check(truth, image, mask)
    deviation = float(np.std(truth[mask]))
    return _root_mean_square(truth, image, mask) / deviation if deviation > 0 else float("nan")


def psnr(truth: Image, image: Image, mask: Mask) -> float:
    """20 log10(L / sqrt(mean_M (y - a)^2)) in dB; infinite for equal images, NaN if the truth is flat.

    Raises:
        ShapeError: the shapes differ, or the mask is empty.
    """
    _check(truth, image, mask)
    data_range, error = float(np.ptp(truth[mask])), _root_mean_square(truth, image, mask)
    if data_range == 0:
        return float("nan")
    return float(20 * np.log10(data_range / error)) if error > 0 else float("inf")


def windowed_ssim(truth: Image, image: Image, mask: Mask) -> float:
    """Mean over M of the local SSIM map, computed in windows of SSIM_WINDOW voxels per axis.

        SSIM = (2 m_a m_y + c1)(2 s_ay + c2) / ((m_a^2 + m_y^2 + c1)(s_a^2 + s_y^2 + c2)),   c_i = (k_i L)^2

    with local means m and sample covariances s, k = (.01, .03). SSIM is made for intensities >= 0: on z-scores the
    inverted contrast of a volume has both factors negative and would look alike. So both volumes are shifted by the
    truth's minimum in M, and the image is clipped to the truth's range [0, L]. An axis shorter than the window makes the
    volume a stack of slices along it, each with its own two-dimensional windows.

    Args:
        truth: any number of axes; what lies outside the mask counts as the truth's minimum in both volumes.
        image: same shape.
        mask: voxels whose SSIM counts.

    Raises:
        ShapeError: the shapes differ, the mask is empty, or more than one axis is shorter than the window.
    """
    _check(truth, image, mask)
    short = [axis for axis, size in enumerate(truth.shape) if size < SSIM_WINDOW]
    if len(short) > 1 or truth.ndim - len(short) < 1:
        raise ShapeError(f"SSIM needs windows of {SSIM_WINDOW} voxels, but the image has shape {truth.shape}.")
    low, high = float(truth[mask].min()), float(truth[mask].max())
    data_range = high - low
    if data_range == 0:
        return float("nan")
    shifted = [np.where(mask, np.clip(np.asarray(v, dtype=np.float64), low, high) - low, 0) for v in (truth, image)]
    _, local = structural_similarity(
        *shifted,
        win_size=SSIM_WINDOW,
        data_range=data_range,
        channel_axis=short[0] if short else None,
        full=True,
    )
    return float(local[mask].mean())


def _root_mean_square(truth: Image, image: Image, mask: Mask) -> float:
    difference = np.asarray(truth[mask], dtype=np.float64) - np.asarray(image[mask], dtype=np.float64)
    return float(np.sqrt(np.mean(difference**2)))


def _check(truth: Image, image: Image, mask: Mask) -> None:
    if not truth.shape == image.shape == mask.shape:
        raise ShapeError(f"Truth {truth.shape}, image {image.shape} and mask {mask.shape} have different shapes.")
    if not mask.any():
        raise ShapeError("The mask is empty, so there is nothing to compare. Give one with --masks.")
