"""Image quality of one channel: noise, contrast, bias field, sharpness, geometry. Names begin with `quality_`.

All numbers are without unit or in mm, so a gain changes none of them. Values are counted from zero, or from the smallest one
where there are negative ones (z-scored or harmonized images have no physical zero; their ratios to a mean are then only
comparable among each other). B is the body (`regions.body_mask`), sigma the noise in B, A the air: outside of B by more than
AIR_MARGIN voxels, NaN where there is none or where it was blanked.

| feature | definition |
|---|---|
| noise | sigma / SD(B); sigma = median absolute diagonal Haar coefficient / 0.6745 in B (Donoho 1994, Coupe 2010) |
| noise_air | median(A) / sqrt(2 ln 2) / SD(B): the sigma of Rayleigh's distribution, which air follows (Gudbjartsson 1995) |
| snr | mean(B) / sigma |
| cnr_tissue | difference of means of Otsu's two classes in B / sigma |
| cnr_labels | difference of means of two labels / sigma, mean over pairs; of a single label and a rim of RIM_VOXELS |
| cnr_air | (mean(B) - mean(A)) / sigma (MRQy: CNR) |
| fber_db | 10 log10 of median squared B / median squared A (MRQy: FBER) |
| efc | entropy focus criterion of the volume, 0 … 1 of its largest (Atkinson 1997; normalized as in MRQy) |
| bias_field | SD / mean in B of the multiplicative field that N4 finds (Tustison 2010); anatomy adds to it |
| sharpness_per_mm | RMS gradient in B without what sigma adds / SD(B): the inverse length of intensity changes |
| spacing_*_mm, coverage_*_mm | voxel size and field of view, axes in the array's order z, y, x |
| body_share | share of the volume that is B (MRQy: foreground-background ratio as B / (A + B)) |

References:
    Sadri et al., "MRQy: an open-source tool for quality control of MR imaging data", Medical Physics 2020.
    Donoho and Johnstone, "Ideal spatial adaptation by wavelet shrinkage", Biometrika 1994.
    Coupe et al., "Robust Rician noise estimation for MR images", Medical Image Analysis 2010 (the MAD, without its correction).
    Gudbjartsson and Patz, "The Rician distribution of noisy MRI data", Magnetic Resonance in Medicine 1995.
    Tustison et al., "N4ITK: improved N3 bias correction", IEEE Trans. Medical Imaging 2010.
    Atkinson et al., "Automatic correction of motion artifacts in magnetic resonance images using an entropy focus criterion",
        IEEE Trans. Medical Imaging 1997.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from scipy import ndimage
from skimage.filters import threshold_otsu

from nnunet_fedharm.sites.features.regions import Image, Mask, bounding_box

Values = npt.NDArray[np.floating[Any]]

AIR_MARGIN = 2
MIN_AIR_VOXELS = 64
RIM_VOXELS = 3
N4_GRID = 16
"""N4 works on block means with at most so many voxels per axis: its field is smooth, and its time is not wasted on detail."""
N4_ITERATIONS = (50, 50)
"""Per fitting level; the control points double at each."""


def image_quality(image: Image, body: Mask, labels: Sequence[Mask], spacing_mm: Sequence[float]) -> dict[str, float]:
    """Quality features of one channel, NaN where one does not exist.

    Args:
        image: (D, H, W) or (H, W) intensities, not constant in the body.
        body: same shape, not empty.
        labels: masks of the single labels of the case, empty ones left out; none for an unlabelled case.
        spacing_mm: one per axis.
    """
    found = _geometry(body, spacing_mm)
    long = [axis for axis, size in enumerate(image.shape) if size > 1]  # a slice is measured in its plane
    spacing = [float(spacing_mm[axis]) for axis in long]
    values = np.asarray(image.squeeze(), dtype=np.float32)  # a large volume in half the memory
    values = values - min(float(values.min()), 0.0)
    body, labels = body.squeeze(), [label.squeeze() for label in labels]
    air = _air(values, body)
    found["efc"] = entropy_focus(values)
    box = bounding_box(body, margin=1)
    values, body, labels = values[box], body[box], [label[box] for label in labels]
    sigma, inside = noise_sigma(values, body), values[body].astype(np.float64)
    spread = float(inside.std())
    found |= {
        "noise": _ratio(sigma, spread),
        "noise_air": _ratio(float(np.median(air)) / math.sqrt(2 * math.log(2)), spread) if air.size else math.nan,
        "snr": _ratio(float(inside.mean()), sigma),
        "cnr_tissue": _ratio(_tissue_contrast(inside), sigma),
        "cnr_labels": _ratio(_label_contrast(values, body, labels), sigma),
        "cnr_air": _ratio(float(inside.mean() - air.mean()), sigma) if air.size else math.nan,
        "fber_db": _decibel(_ratio(float(np.median(inside**2)), float(np.median(air**2)))) if air.size else math.nan,
        "bias_field": bias_field_strength(values, body, spacing),
        "sharpness_per_mm": _ratio(_edge_strength(values, body, sigma, spacing), spread),
    }
    return {f"quality_{name}": value for name, value in found.items()}


def noise_sigma(image: Image, body: Mask) -> float:
    """Standard deviation of white noise in the body, from Haar coefficients that are differences along every axis.

    Undecimated; only coefficients whose voxels (2 per axis) all lie in the body. Smooth structure cancels out, and the median
    ignores edges. Noise that the scanner filtered is underestimated. NaN where the body has no such coefficient.
    """
    coefficients, whole = image, body
    for axis in range(image.ndim):
        first, second = (slice(None),) * axis + (slice(None, -1),), (slice(None),) * axis + (slice(1, None),)
        coefficients = (coefficients[second] - coefficients[first]) / math.sqrt(2)
        whole = whole[first] & whole[second]
    if not whole.any():
        return math.nan
    return float(np.median(np.abs(coefficients[whole])) / 0.6745)


def bias_field_strength(image: Image, body: Mask, spacing_mm: Sequence[float]) -> float:
    """Coefficient of variation in the body of the smooth multiplicative field that N4 finds; 0 is no field.

    Args:
        image: values at or above zero, 2 or 3 axes of more than one voxel.
        body: same shape; voxels of value zero are left out, as their logarithm does not exist.
    """
    factors = [max(1, -(-size // N4_GRID)) for size in image.shape]
    inside = body & (image > 0)
    weight = _block_sums(inside.astype(np.float32), factors)
    mean = _block_sums(np.where(inside, image, 0.0), factors) / np.maximum(weight, 1)
    mask = weight >= 0.5 * np.prod(factors)
    if not mask.any() or np.ptp(mean[mask]) == 0:
        return math.nan
    picture, region = sitk.GetImageFromArray(mean.astype(np.float32)), sitk.GetImageFromArray(mask.astype(np.uint8))
    for item in (picture, region):
        item.SetSpacing([value * factor for value, factor in zip(spacing_mm, factors, strict=True)][::-1])
    corrector = sitk.N4BiasFieldCorrectionImageFilter()
    corrector.SetNumberOfThreads(1)  # cases run beside each other
    corrector.SetMaximumNumberOfIterations(N4_ITERATIONS)
    corrector.Execute(picture, region)
    field = np.exp(sitk.GetArrayFromImage(corrector.GetLogBiasFieldAsImage(picture)).astype(np.float64))[mask]
    return _ratio(float(field.std()), float(field.mean()))


def entropy_focus(image: Image) -> float:
    """Entropy focus criterion, in [0, 1]: 1 is energy spread over all voxels (ghosts, blur), 0 all in one voxel."""
    share = np.asarray(image).ravel()
    share = share / max(math.sqrt(float(share @ share)), np.finfo(float).tiny)
    share = share[share > 0]
    entropy = -float((share * np.log(share)).sum())
    return entropy / (math.sqrt(image.size) * math.log(math.sqrt(image.size)))


def _geometry(body: Mask, spacing_mm: Sequence[float]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, size, spacing in zip("zyx"[-body.ndim :], body.shape, spacing_mm, strict=True):
        if size > 1:  # nnU-Net gives a slice's missing axis a spacing of 999 mm
            found |= {f"spacing_{name}_mm": float(spacing), f"coverage_{name}_mm": float(spacing) * size}
    return found | {"body_share": float(body.mean())}


def _air(image: Values, body: Mask) -> Values:
    """(n,) values of the air; empty where there is none, or where most of it is exactly zero."""
    air = image[ndimage.binary_erosion(~body, iterations=AIR_MARGIN, border_value=1)].astype(np.float64)
    measurable = air.size >= MIN_AIR_VOXELS and np.count_nonzero(air) >= 0.5 * air.size
    return air if measurable else air[:0]


def _tissue_contrast(inside: Values) -> float:
    bright = inside > threshold_otsu(inside)
    return float(inside[bright].mean() - inside[~bright].mean()) if bright.any() and not bright.all() else math.nan


def _label_contrast(image: Values, body: Mask, labels: Sequence[Mask]) -> float:
    """Mean over pairs of labels of the difference of their means; NaN without labels."""
    means = [float(image[label].mean(dtype=np.float64)) for label in labels if label.any()]
    if len(labels) == 1 and means:
        near = ndimage.binary_dilation(labels[0], iterations=RIM_VOXELS) & body & ~labels[0]
        means += [float(image[near].mean())] if near.any() else []
    pairs = [abs(first - second) for first, second in combinations(means, 2)]
    return float(np.mean(pairs)) if pairs else math.nan


def _edge_strength(image: Values, body: Mask, sigma: float, spacing_mm: Sequence[float]) -> float:
    """RMS gradient per mm; a central difference over 2 h of white noise has the variance sigma^2 / (2 h^2)."""
    inner = ndimage.binary_erosion(body)
    if not inner.any() or min(image.shape) < 3:
        return math.nan
    total = 0.0
    for axis, spacing in enumerate(spacing_mm):
        slope = np.gradient(image, spacing, axis=axis)[inner]
        total += float(np.mean(slope**2, dtype=np.float64)) - sigma**2 / (2 * spacing**2)
    return math.sqrt(max(total, 0.0))


def _block_sums(image: Values, factors: Sequence[int]) -> Values:
    """Sums over blocks of `factors` voxels; an incomplete block at the end is filled with zeros."""
    padded = np.pad(image, [(0, -size % factor) for size, factor in zip(image.shape, factors, strict=True)])
    blocks = [item for size, factor in zip(padded.shape, factors, strict=True) for item in (size // factor, factor)]
    return np.asarray(padded.reshape(blocks).sum(axis=tuple(range(1, 2 * image.ndim, 2)), dtype=np.float64))


def _ratio(value: float, base: float) -> float:
    return value / base if base > 0 else math.nan


def _decibel(ratio: float) -> float:
    return 10 * math.log10(ratio) if ratio > 0 else math.nan
