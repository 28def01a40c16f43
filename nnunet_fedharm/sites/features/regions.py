"""Where features are measured: labels, their union, and the imaged body.

The body is all that is not background air, per channel, and then the union over the channels:

1. One exact value (zero, else the channel's minimum) fills BLANK_SHARE of the volume or more, outside of enclosed holes: the
   background was removed (skull-stripped or masked images), and the body is the rest, as nnU-Net's nonzero mask.
2. Else Otsu's threshold of the smoothed volume, if its histogram warrants one: what lies below it covers AIR_ON_FACES of the
   volume's faces or more, and what lies above is AIR_CONTRAST times as bright or more (medians). Otsu's threshold is repeated
   below the first one, as long as the contrast is SECOND_CONTRAST, because fat or contrast agent can be far brighter than
   the rest of the body. Holes are filled, and parts smaller than PART_SHARE of the largest are left out.
3. Else there is no air, as in a crop inside of an organ, and the whole volume is body.

References:
    Otsu, "A threshold selection method from gray-level histograms", IEEE Trans. Systems, Man, and Cybernetics 1979.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from skimage.filters import threshold_otsu

from nnunet_fedharm.sites.features.table import FOREGROUND

Image = npt.NDArray[np.floating[Any]]
Mask = npt.NDArray[np.bool_]

BLANK_SHARE = 0.1
AIR_ON_FACES = 0.6
AIR_CONTRAST = 2.5
SECOND_CONTRAST = 1.7
PART_SHARE = 0.1
SMOOTHING_VOXELS = 1.0


def label_regions(labels: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Region -> label values, from `labels` of dataset.json: `label NAME` for each, and FOREGROUND, the union of all.

    Region-based labels hold several values. Background and ignore are left out, and so is a label that is the whole foreground
    (the only label, or the largest of nested regions): it would be measured twice.
    """
    found = {}
    for name, value in labels.items():
        values = tuple(int(item) for item in (value if isinstance(value, list | tuple) else (value,)) if int(item) != 0)
        if name != "ignore" and values:
            found[f"label {name}"] = values
    union = tuple(sorted({value for values in found.values() for value in values}))
    if not union:
        return {}
    return {name: values for name, values in found.items() if set(values) != set(union)} | {FOREGROUND: union}


def body_mask(images: Image) -> Mask:
    """The imaged body.

    Args:
        images: (C, D, H, W) or (C, H, W).

    Returns:
        (D, H, W) or (H, W), never empty.
    """
    bodies = [_body_of_channel(np.asarray(image, dtype=np.float32)) for image in images]
    return np.asarray(np.any(bodies, axis=0))


def central_part(region: Mask, max_voxels: int) -> Mask:
    """The region inside a box around its centre of mass, with the proportions of its bounding box: at most `max_voxels`.

    For texture, which needs neighbours at full resolution, of regions whose measurement would take minutes.
    """
    if int(region.sum()) <= max_voxels:
        return region
    points = np.argwhere(region)
    centre = points.mean(axis=0)
    half = np.abs(points - centre).max(axis=0)
    distance = np.max(np.abs(points - centre) / np.maximum(half, 0.5), axis=1)
    # Voxels at one distance are taken or left together, so the box is full.
    limit = np.partition(distance, max_voxels)[max_voxels]
    chosen = points[distance < limit]
    result = np.zeros_like(region)
    result[tuple(chosen.T)] = True
    return result


def bounding_box(region: Mask, margin: int = 0) -> tuple[slice, ...]:
    """The smallest box around a region that is not empty, and up to `margin` voxels more on each side."""
    corners = [np.flatnonzero(region.any(axis=tuple(set(range(region.ndim)) - {axis}))) for axis in range(region.ndim)]
    return tuple(
        slice(max(int(inside[0]) - margin, 0), min(int(inside[-1]) + margin + 1, size))
        for inside, size in zip(corners, region.shape, strict=True)
    )


def _body_of_channel(image: Image) -> Mask:
    blank = 0.0 if np.count_nonzero(image == 0) >= np.count_nonzero(image == image.min()) else float(image.min())
    filled = ndimage.binary_fill_holes(image != blank)
    if 1 - filled.mean() >= BLANK_SHARE and filled.any():
        return np.asarray(filled)
    return _body_in_air(image)


def _body_in_air(image: Image) -> Mask:
    everything = np.ones(image.shape, dtype=bool)
    smooth = ndimage.gaussian_filter(image, [SMOOTHING_VOXELS if size > 2 else 0 for size in image.shape])
    threshold = threshold_otsu(smooth)
    low = smooth <= threshold
    if _on_faces(low) < AIR_ON_FACES or not _contrast(image, low, ~low) >= AIR_CONTRAST:
        return everything
    while True:
        second = threshold_otsu(smooth[low]) if np.ptp(smooth[low]) > 0 else threshold
        darker = smooth <= second
        if _on_faces(darker) < AIR_ON_FACES or not _contrast(image, darker, low & ~darker) >= SECOND_CONTRAST:
            break
        low = darker
    return _large_parts(ndimage.binary_fill_holes(~low))


def _on_faces(region: Mask) -> float:
    """Share of the region on the volume's faces; an axis of less than five voxels has none."""
    faces = np.zeros(region.shape, dtype=bool)
    for axis, size in enumerate(region.shape):
        if size >= 5:
            faces[(slice(None),) * axis + ([0, -1],)] = True
    return float(region[faces].mean()) if faces.any() else 0.0


def _contrast(image: Image, low: Mask, high: Mask) -> float:
    """Ratio of medians, counted from the darkest voxel; 0 where a side is empty."""
    if not low.any() or not high.any():
        return 0.0
    zero = min(float(image.min()), 0.0)
    return float((np.median(image[high]) - zero) / max(float(np.median(image[low])) - zero, 1e-12))


def _large_parts(region: Mask) -> Mask:
    parts, count = ndimage.label(region)
    if count < 2:
        return np.asarray(region)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return np.asarray((sizes >= PART_SHARE * sizes.max())[parts])
