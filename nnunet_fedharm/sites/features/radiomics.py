"""Radiomics features of one region: first order and texture, by pyradiomics.

Settings, all others at pyradiomics 3.0.1's defaults: original image (no filter), FEATURE_CLASSES, a fixed number of
BIN_COUNT grey levels. MR intensities have no unit, for which the IBSI advises a fixed number of levels; shape features
are left out, because the mask is the same before and after harmonization.

References:
    van Griethuysen et al., "Computational Radiomics System to Decode the Radiographic Phenotype", Cancer Research 2017.
    Zwanenburg et al., "The Image Biomarker Standardization Initiative", Radiology 2020.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk

from nnunet_fedharm.errors import DataError, SetupError, ShapeError

FEATURE_CLASSES = ("firstorder", "glcm", "glrlm", "glszm", "gldm", "ngtdm")
BIN_COUNT = 32
INSTALL = (
    "python -m pip install numpy setuptools wheel && python -m pip install --no-build-isolation pyradiomics==3.0.1"
)

SETTINGS = {"package": "pyradiomics", "image": "original", "classes": list(FEATURE_CLASSES), "bin_count": BIN_COUNT}


def extract_features(
    image: npt.NDArray[np.floating[Any]], region: npt.NDArray[np.bool_], spacing_mm: tuple[float, ...]
) -> dict[str, float]:
    """Features of a region.

    Args:
        image: (D, H, W) or (H, W) intensities; only the region's voxels count.
        region: same shape, at least two voxels.
        spacing_mm: one per axis in the array's order.

    Returns:
        `class_Feature` -> value (`glcm_Contrast`), 93 of them.

    Raises:
        ShapeError: shapes or number of axes do not fit.
        DataError: pyradiomics cannot use the region (too small, flat).
        SetupError: pyradiomics is not installed.
    """
    if image.shape != region.shape or len(spacing_mm) != image.ndim or image.ndim not in (2, 3):
        raise ShapeError(f"Image {image.shape}, region {region.shape} and spacing {spacing_mm} do not fit.")
    if image.ndim == 2:
        image, region, spacing_mm = image[None], region[None], (1.0, *spacing_mm)
    # pyradiomics refuses a mask that fills its image, so both get a margin; it crops to the mask again by itself.
    image, region = np.pad(image, 1), np.pad(region, 1)
    pictures = sitk.GetImageFromArray(image.astype(np.float64)), sitk.GetImageFromArray(region.astype(np.uint8))
    for picture in pictures:
        picture.SetSpacing([float(value) for value in spacing_mm[::-1]])  # ITK orders axes (x, y, z)
    try:
        found = feature_extractor().execute(*pictures)
    except ValueError as error:
        raise DataError(f"pyradiomics cannot use a region of {int(region.sum())} voxels: {error}") from error
    return {
        name.removeprefix("original_"): float(value) for name, value in found.items() if name.startswith("original")
    }


@cache
def feature_extractor() -> Any:
    """pyradiomics' extractor with this module's settings; call it early to learn that the package is missing.

    Raises:
        SetupError: pyradiomics is not installed.
    """
    try:
        from radiomics.featureextractor import RadiomicsFeatureExtractor
    except ImportError as error:
        raise SetupError(f"Radiomics features need pyradiomics ({error}). Install it: {INSTALL}") from error
    logging.getLogger("radiomics").setLevel(logging.ERROR)  # it advises on the bin count in every call
    extractor = RadiomicsFeatureExtractor(binCount=BIN_COUNT)
    extractor.disableAllFeatures()
    for name in FEATURE_CLASSES:
        extractor.enableFeatureClassByName(name)
    return extractor
