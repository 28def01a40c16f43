"""Everything that is measured on one case: radiomics of each region on each scale, and image quality of each channel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from nnunet_fedharm.errors import DataError
from nnunet_fedharm.sites.checks import CaseVolumes
from nnunet_fedharm.sites.features.cache import CaseFeatures, finite
from nnunet_fedharm.sites.features.image_quality import image_quality
from nnunet_fedharm.sites.features.options import FeatureOptions
from nnunet_fedharm.sites.features.radiomics import TEXTURE_CLASSES, extract_features, shape_features
from nnunet_fedharm.sites.features.regions import Image, Mask, body_mask, bounding_box, central_part
from nnunet_fedharm.sites.features.table import IMAGE, SCALES

ZSCORE, RAW = SCALES
NEIGHBOURHOOD_VOXELS = 5
"""Kept around a region: resampling at its border needs the voxels outside."""
MASKED_BELOW = 0.75
"""nnU-Net z-scores over the nonzero voxels alone where its crop to them keeps less of the volume (there: of the median case)."""


@dataclass(frozen=True)
class Region:
    """Where features are measured on one case, and its shape features.

    Attributes:
        mask: (D, H, W), at least as many voxels as the options ask for.
        texture: the part of it for texture, see FeatureOptions.max_voxels.
    """

    mask: Mask
    texture: Mask
    shape: dict[str, float]


def measure_volumes(
    scanned: CaseVolumes,
    channels: Sequence[str],
    regions: Mapping[str, Sequence[int]],
    options: FeatureOptions,
    images: npt.NDArray[np.float32] | None = None,
) -> CaseFeatures:
    """Measure a case.

    Args:
        scanned: volumes as scanned; regions come from them alone, also where harmonized images are measured.
        channels: names, in the order of `scanned.images`; those that the options leave out are not measured.
        regions: name -> label values, `regions.label_regions`; not used without a label.
        images: (C, D, H, W) harmonized images on the same grid; None: the scanned ones.

    Returns:
        Parts and problems; quality features stand in the part (channel, IMAGE, "raw").
    """
    images = scanned.images if images is None else images
    if images.shape[1] == 1:  # nnU-Net reads pictures as (1, H, W) with a spacing of 999 mm between slices
        label = None if scanned.label is None else scanned.label[0]
        scanned, images = CaseVolumes(scanned.images[:, 0], label, scanned.spacing_mm[1:]), images[:, 0]
    body, problems = body_mask(scanned.images), []
    masks = {} if scanned.label is None else {name: np.isin(scanned.label, list(v)) for name, v in regions.items()}
    if options.image_region or scanned.label is None:
        masks[IMAGE] = body
    usable = {}
    for name, mask in masks.items():
        try:
            usable[name] = _region(name, mask, scanned.spacing_mm, options)
        except DataError as error:
            problems.append(str(error))
    scale = zscore_parameters(images, scanned.images)
    parts: dict[tuple[str, str, str], dict[str, float]] = {}
    singles = _single_labels(scanned.label, regions)
    for channel, image, (mean, deviation) in zip(channels, images, scale, strict=True):
        if options.channels is not None and channel not in options.channels:
            continue
        for name, region in usable.items():
            try:
                found = _radiomics(image, region, mean, deviation, scanned.spacing_mm, options)
            except DataError as error:
                problems.append(f"Channel {channel}, {name}: {error}")
                continue
            parts |= {(channel, name, key): values for key, values in found.items()}
        quality = image_quality(image, body, singles, scanned.spacing_mm)
        parts[channel, IMAGE, RAW] = parts.get((channel, IMAGE, RAW), {}) | finite(quality)
    return CaseFeatures(parts, problems)


def zscore_parameters(images: Image, scanned: Image) -> list[tuple[float, float]]:
    """Mean and standard deviation of each channel as nnU-Net takes them; the nonzero voxels are those of `scanned`."""
    nonzero = ndimage.binary_fill_holes((scanned != 0).any(axis=0))
    box = bounding_box(nonzero) if nonzero.any() else (slice(None),) * nonzero.ndim
    masked = nonzero[box].size < MASKED_BELOW * nonzero.size
    chosen = [np.asarray(image[box][nonzero[box]] if masked else image[box], dtype=np.float64) for image in images]
    return [(float(values.mean()), max(float(values.std()), 1e-8)) for values in chosen]


def _region(name: str, mask: Mask, spacing_mm: Sequence[float], options: FeatureOptions) -> Region:
    count = int(mask.sum())
    if count == 0:
        raise DataError(f"Region {name} is empty in this case.")
    if count < options.min_voxels:
        raise DataError(f"Region {name} has {count} voxels, fewer than {options.min_voxels}, which texture needs.")
    box = bounding_box(mask, margin=1)  # a region of one slice stays in 3d
    # The body's shape is that of the field of view, which is no control for anatomy.
    shape = {} if name == IMAGE else shape_features(mask[box], spacing_mm)
    return Region(mask, central_part(mask, options.max_voxels), shape)


def _radiomics(
    image: npt.NDArray[Any],
    region: Region,
    mean: float,
    deviation: float,
    spacing_mm: Sequence[float],
    options: FeatureOptions,
) -> dict[str, dict[str, float]]:
    """Scale -> features. Texture is measured once: z-scoring is linear, so it moves no voxel to another grey level."""
    box = bounding_box(region.mask, margin=NEIGHBOURHOOD_VOXELS)
    values, mask, part = np.asarray(image[box], dtype=np.float64), region.mask[box], region.texture[box]
    if np.ptp(values[mask]) == 0 or np.ptp(values[part]) == 0:
        raise DataError("every voxel has the same value, so there is nothing to measure.")
    settings: dict[str, Any] = {"bin_count": options.bin_count, "resample_mm": options.resample_mm}
    texture = extract_features(values, part, spacing_mm, classes=TEXTURE_CLASSES, **settings)
    scaled = {ZSCORE: (values - mean) / deviation, RAW: values}
    return {
        scale: finite(
            extract_features(scaled[scale], mask, spacing_mm, classes=("firstorder",), **settings)
            | texture
            | region.shape
        )
        for scale in options.scales
    }


def _single_labels(label: npt.NDArray[Any] | None, regions: Mapping[str, Sequence[int]]) -> list[Mask]:
    """Masks of the label values that occur in this case, background and ignore left out."""
    if label is None:
        return []
    values = sorted({value for region in regions.values() for value in region})
    return [mask for mask in (label == value for value in values) if mask.any()]
