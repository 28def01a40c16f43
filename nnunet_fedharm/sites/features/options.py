"""What is measured and how, as it is written into reports and into the cache's keys."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from nnunet_fedharm.errors import DataError
from nnunet_fedharm.sites.features.radiomics import BIN_COUNT, FEATURE_CLASSES, MAX_SURFACE_VOXELS
from nnunet_fedharm.sites.features.table import SCALES

DEFINITIONS = 2
"""Raised whenever a feature's definition in this package changes, so that cached numbers are measured again."""
PACKAGES = ("pyradiomics", "SimpleITK", "numpy", "scipy", "scikit-image")


@dataclass(frozen=True, kw_only=True)
class FeatureOptions:
    """How features are measured."""

    image_region: bool = False
    """Radiomics of the whole body too; cases without a label always get them."""
    scales: tuple[str, ...] = SCALES
    """Intensity scales: "z-score", "raw" or both. Only first order differs: texture sees a fixed number of grey levels."""
    bin_count: int = BIN_COUNT
    """Grey levels between a region's minimum and maximum."""
    min_voxels: int = 32
    """Smaller regions are a failure: their texture is noise."""
    max_voxels: int = 1_000_000
    """Texture of larger regions is measured on their central part of so many voxels, at full resolution (2 s a channel)."""
    resample_mm: float | None = None
    """Resample to this spacing before first order and texture; None: measure the voxels as they are."""
    channels: tuple[str, ...] | None = None
    """Channel names to measure; None: all."""

    def __post_init__(self) -> None:
        unknown = [scale for scale in self.scales if scale not in SCALES]
        if unknown or not self.scales:
            raise DataError(f"Unknown intensity scales {unknown or 'none'}: choose from {', '.join(SCALES)}.")
        if self.bin_count < 2:
            raise DataError(f"bin_count must be at least 2, got {self.bin_count}.")
        if not 2 <= self.min_voxels <= self.max_voxels:
            raise DataError(
                f"2 <= min_voxels <= max_voxels is needed, got min_voxels {self.min_voxels} and max_voxels {self.max_voxels}."
            )
        if self.resample_mm is not None and not self.resample_mm > 0:
            raise DataError(f"resample_mm must be above 0 mm, got {self.resample_mm}. Leave it out to keep the voxels.")

    def to_dict(self) -> dict[str, Any]:
        """Everything that the numbers depend on, JSON values only, for a report's settings."""
        return {
            **self.key(),
            "classes": [*FEATURE_CLASSES, "shape", "quality"],
            "discretization": f"{self.bin_count} equal bins between minimum and maximum of the region (IBSI: fixed bin "
            "number, advised where intensities have no unit)",
            "texture": "3D, distance 1, 26 neighbours, mean over directions; 2D (8 neighbours) for slices",
            "resampling": "none" if self.resample_mm is None else f"{self.resample_mm:g} mm, isotropic",
            "interpolation": "none"
            if self.resample_mm is None
            else "B-spline for images, nearest neighbour for labels",
            "intensities": "raw: as in the file. z-score: nnU-Net's, over the box of nonzero voxels, or over the nonzero voxels "
            "where that box is less than three quarters of the volume. Nothing is clipped, no outlier is removed",
            "texture_of_large_regions": f"central part of {self.max_voxels} voxels",
            "shape_of_large_regions": f"every second voxel or fewer above {MAX_SURFACE_VOXELS} surface voxels",
            "python": platform.python_version(),
        }

    def key(self) -> dict[str, Any]:
        """The part of `to_dict` that decides whether cached numbers still hold."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {**values, "definitions": DEFINITIONS, "versions": {name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
