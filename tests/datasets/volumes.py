"""Tiny NIfTI files for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np

SHAPE = (6, 7, 8)


def write_volume(
    path: Path,
    voxels: Any = None,
    *,
    seed: int = 0,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0),
    shape: tuple[int, int, int] = SHAPE,
) -> Path:
    """Write voxels, or positive random ones."""
    if voxels is None:
        voxels = np.random.default_rng(seed).uniform(10, 200, shape).astype(np.int16)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = origin
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
    return path
