"""Radiomics features of one region: first order, texture and shape, by pyradiomics.

Settings, all others at pyradiomics 3.0.1's defaults: original image (no filter), FEATURE_CLASSES, a fixed number of
BIN_COUNT grey levels. MR intensities have no unit, for which the IBSI advises a fixed number of levels; texture then does not
change with gain and offset. Distance 1, 26 neighbours (8 in a slice), no resampling.

Shape is measured apart (`shape_features`): it depends on the mask alone, which is the same before and after harmonization, and
so it is the negative control of the site report.

References:
    van Griethuysen et al., "Computational Radiomics System to Decode the Radiographic Phenotype", Cancer Research 2017.
    Zwanenburg et al., "The Image Biomarker Standardization Initiative", Radiology 2020.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from scipy import ndimage

from nnunet_fedharm.errors import DataError, SetupError, ShapeError

TEXTURE_CLASSES = ("glcm", "glrlm", "glszm", "gldm", "ngtdm")
FEATURE_CLASSES = ("firstorder", *TEXTURE_CLASSES)
BIN_COUNT = 32
MAX_SURFACE_VOXELS = 20_000
INSTALL = (
    "python -m pip install numpy setuptools wheel && python -m pip install --no-build-isolation pyradiomics==3.0.1"
)

SETTINGS = {"package": "pyradiomics", "image": "original", "classes": list(FEATURE_CLASSES), "bin_count": BIN_COUNT}


def extract_features(
    image: npt.NDArray[np.floating[Any]],
    region: npt.NDArray[np.bool_],
    spacing_mm: Sequence[float],
    *,
    classes: Sequence[str] = FEATURE_CLASSES,
    bin_count: int = BIN_COUNT,
    resample_mm: float | None = None,
) -> dict[str, float]:
    """Features of a region.

    Args:
        image: (D, H, W) or (H, W) intensities; only the region's voxels count.
        region: same shape, at least two voxels.
        spacing_mm: one per axis in the array's order.
        classes: some of FEATURE_CLASSES.
        bin_count: grey levels.
        resample_mm: resample image (B-spline, as the IBSI advises) and region (nearest neighbour) to this spacing first.

    Returns:
        `class_Feature` -> value (`glcm_Contrast`), 93 of all classes.

    Raises:
        ShapeError: shapes or number of axes do not fit.
        DataError: pyradiomics cannot use the region (too small, flat).
        SetupError: pyradiomics is not installed.
    """
    spacing_mm = tuple(spacing_mm)
    if image.shape != region.shape or len(spacing_mm) != image.ndim or image.ndim not in (2, 3):
        raise ShapeError(f"Image {image.shape}, region {region.shape} and spacing {spacing_mm} do not fit.")
    if image.ndim == 2:
        image, region, spacing_mm = image[None], region[None], (1.0, *spacing_mm)
    settings: dict[str, Any] = {"binCount": bin_count}
    if resample_mm is not None:  # 0 keeps the spacing of an axis: a slice has no neighbours to interpolate between
        settings["resampledPixelSpacing"] = [resample_mm if size > 1 else 0 for size in image.shape[::-1]]
    return _execute(image, region, spacing_mm, tuple(classes), settings)


def shape_features(region: npt.NDArray[np.bool_], spacing_mm: Sequence[float]) -> dict[str, float]:
    """Shape of a region, `shape_Feature` -> value in mm, mm2, mm3 or without unit; of a slice pyradiomics' 2d features.

    The largest diameter takes the square of the surface's size: a region with more than MAX_SURFACE_VOXELS voxels at its
    surface is measured on every second voxel of each axis, or every third, until it has fewer.

    Args:
        region: (D, H, W) or (H, W).
        spacing_mm: one per axis.

    Raises:
        ShapeError: number of axes does not fit.
        DataError: pyradiomics cannot use the region.
        SetupError: pyradiomics is not installed.
    """
    if len(spacing_mm) != region.ndim or region.ndim not in (2, 3):
        raise ShapeError(f"Region {region.shape} and spacing {tuple(spacing_mm)} do not fit.")
    if region.ndim == 2:
        region, spacing_mm = region[None], (1.0, *spacing_mm)
    step, coarse = 1, region
    while int((coarse & ~ndimage.binary_erosion(coarse)).sum()) > MAX_SURFACE_VOXELS:
        step += 1
        coarse = region[tuple(slice(None, None, min(step, size)) for size in region.shape)]
    spacing = tuple(value * min(step, size) for value, size in zip(spacing_mm, region.shape, strict=True))
    flat = region.shape[0] == 1
    settings: dict[str, Any] = {"force2D": True, "force2Ddimension": 0} if flat else {}
    name = "shape2D" if flat else "shape"
    found = _execute(coarse.astype(np.float64), coarse, spacing, (name,), settings)
    return {f"shape_{key.removeprefix(f'{name}_')}": value for key, value in found.items()}


def _execute(
    image: npt.NDArray[np.floating[Any]],
    region: npt.NDArray[np.bool_],
    spacing_mm: Sequence[float],
    classes: tuple[str, ...],
    settings: dict[str, Any],
) -> dict[str, float]:
    # pyradiomics refuses a mask that fills its image, so both get a margin; it crops to the mask again by itself.
    image, region = np.pad(image, 1), np.pad(region, 1)
    pictures = sitk.GetImageFromArray(image.astype(np.float64)), sitk.GetImageFromArray(region.astype(np.uint8))
    for picture in pictures:
        picture.SetSpacing([float(value) for value in spacing_mm[::-1]])  # ITK orders axes (x, y, z)
    extractor = feature_extractor(classes)
    extractor.settings.update({"resampledPixelSpacing": None, "force2D": False, "force2Ddimension": 0, **settings})
    try:
        found = extractor.execute(*pictures)
    except (ValueError, IndexError, RuntimeError) as error:
        raise DataError(f"pyradiomics cannot use a region of {int(region.sum())} voxels: {error}") from error
    return {
        name.removeprefix("original_"): _real(value) for name, value in found.items() if name.startswith("original")
    }


def _real(value: Any) -> float:
    """A real number; NaN for roots of negative numbers, which pyradiomics takes of regions without extent along an axis."""
    number = complex(value)
    return number.real if abs(number.imag) <= 1e-6 * abs(number.real) else math.nan


@cache
def feature_extractor(classes: tuple[str, ...] = FEATURE_CLASSES) -> Any:
    """pyradiomics' extractor for these classes; call it early to learn that the package is missing.

    Raises:
        SetupError: pyradiomics is not installed.
    """
    try:
        from radiomics.featureextractor import RadiomicsFeatureExtractor
    except ImportError as error:
        raise SetupError(f"Radiomics features need pyradiomics ({error}). Install it: {INSTALL}") from error
    logging.getLogger("radiomics").setLevel(logging.ERROR)  # it advises on the bin count in every call
    extractor = RadiomicsFeatureExtractor(binCount=BIN_COUNT, interpolator="sitkBSpline", additionalInfo=False)
    extractor.disableAllFeatures()
    for name in classes:
        extractor.enableFeatureClassByName(name)
    return extractor
