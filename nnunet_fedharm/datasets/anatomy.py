"""Subjects made from one real MR anatomy that nilearn ships: the MNI152 T1 template with its tissue maps.

Every subject is the template seen through its own smooth deformation, head size and tissue contrast. The labels follow
the same deformation, so they are exact.

References:
    Fonov et al., "Unbiased average age-appropriate atlases for pediatric studies", NeuroImage 2011 (the template).
    Rueckert et al., "Nonrigid registration using free-form deformations", IEEE TMI 1999 (the deformation).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
from scipy.interpolate import CubicSpline
from scipy.ndimage import gaussian_filter, map_coordinates

from nnunet_fedharm.datasets.site_effects import FloatVolume
from nnunet_fedharm.errors import SetupError

LABELS = {"background": 0, "grey matter": 1, "white matter": 2}
FIELD_OF_VIEW_MM = (165.0, 215.0, 175.0)
CONTROL_SPACING_MM = 40.0
WHITE_MATTER_SIGNAL = 230.0
_BRAIN_CENTRE_MM = (98.0, 117.0, 77.0)


@dataclass(frozen=True)
class Template:
    """Template maps on a 1 mm grid, smoothed for the target resolution.

    Attributes:
        signal: u, 1 = bright white matter, (X, Y, Z).
        grey, white: tissue fractions in [0, 1], same shape.
        brain: fraction of brain in [0, 1], same shape.
    """

    signal: FloatVolume
    grey: FloatVolume
    white: FloatVolume
    brain: FloatVolume


@dataclass(frozen=True)
class Subject:
    """One subject before any scanner has seen it.

    Attributes:
        signal: u >= 0, 0 outside the brain, (X, Y, Z).
        labels: values of LABELS, same shape.
        brain: mask, same shape.
        spacing_mm: one per axis.
    """

    signal: FloatVolume
    labels: npt.NDArray[np.uint8]
    brain: npt.NDArray[np.bool_]
    spacing_mm: tuple[float, float, float]


def template_folder() -> Path:
    """Folder of nilearn's template files, found without importing nilearn (which takes seconds).

    Raises:
        SetupError: nilearn is not installed, or ships no template any more.
    """
    spec = find_spec("nilearn")
    places = [] if spec is None else [Path(place) for place in spec.submodule_search_locations or ()]
    for place in places:
        folder = place / "datasets" / "data"
        if (folder / _file_name("t1")).is_file():
            return folder
    raise SetupError("The demo needs nilearn with its MNI152 template. Install it with `pip install nilearn`.")


@lru_cache(maxsize=2)
def load_template(spacing_mm: float) -> Template:
    """Read the template and smooth it so that sampling at `spacing_mm` does not alias."""
    folder = template_folder()
    signal, grey, white = (
        np.asarray(nib.load(folder / _file_name(kind)).get_fdata(), dtype=np.float64) for kind in ("t1", "gm", "wm")
    )
    sigma = spacing_mm / (2 * np.sqrt(2 * np.log(2)))
    brain = gaussian_filter((signal > 0).astype(np.float64), sigma)
    maps = (signal / WHITE_MATTER_SIGNAL, grey / 255.0, white / 255.0)
    smoothed = [gaussian_filter(values, sigma) for values in maps]
    return Template(smoothed[0], smoothed[1], smoothed[2], brain)


def make_subject(generator: np.random.Generator, *, spacing_mm: float) -> Subject:
    """Draw one subject.

    Head size varies by a factor of 0.93 to 1.07 per axis, the deformation has a standard deviation of 2.5 mm, and grey
    and white matter signal vary by 4% (one standard deviation).

    Args:
        generator: of this subject alone.
        spacing_mm: isotropic voxel size.
    """
    template = load_template(spacing_mm)
    shape = tuple(round(size / spacing_mm) for size in FIELD_OF_VIEW_MM)
    points = _template_points(shape, spacing_mm, generator)
    signal, grey, white, brain = (
        map_coordinates(values, points, order=1, mode="constant")
        for values in (template.signal, template.grey, template.white, template.brain)
    )
    contrast = 1.0 + generator.normal(0.0, 0.04) * grey + generator.normal(0.0, 0.04) * white
    mask = brain > 0.5
    labels = np.argmax(np.stack([1.0 - grey - white, grey, white]), axis=0)
    return Subject(
        signal=np.where(mask, np.clip(signal * contrast, 0.0, None), 0.0),
        labels=np.where(mask, labels, 0).astype(np.uint8),
        brain=mask,
        spacing_mm=(spacing_mm, spacing_mm, spacing_mm),
    )


def smooth_displacement(
    shape: Sequence[int], spacing_mm: float, sd_mm: float, generator: np.random.Generator
) -> FloatVolume:
    """Free-form deformation: cubic interpolation of normal displacements at control points CONTROL_SPACING_MM apart.

    Args:
        shape: of the volume, three axes.
        spacing_mm: isotropic voxel size.
        sd_mm: standard deviation of a control point's displacement per axis.
        generator: draws the control points.

    Returns:
        Displacement in mm, (3, X, Y, Z).
    """
    controls = [int(np.ceil(size * spacing_mm / CONTROL_SPACING_MM)) + 1 for size in shape]
    field = generator.normal(0.0, sd_mm, size=(3, *controls))
    for axis, (size, control) in enumerate(zip(shape, controls, strict=True), start=1):
        # One axis after the other is the same tensor-product spline as all at once, and a hundred times faster.
        spline = CubicSpline(np.arange(control), field, axis=axis)
        field = np.asarray(spline(np.linspace(0, control - 1, size)))
    return field


def _template_points(shape: Sequence[int], spacing_mm: float, generator: np.random.Generator) -> FloatVolume:
    """Where in the template (voxels of 1 mm) each voxel of the subject lies, (3, X, Y, Z)."""
    size = generator.uniform(0.93, 1.07, size=3)
    displacement = smooth_displacement(shape, spacing_mm, 2.5, generator)
    grid = np.stack(np.meshgrid(*((np.arange(n) - (n - 1) / 2) * spacing_mm for n in shape), indexing="ij"))
    centre = np.asarray(_BRAIN_CENTRE_MM).reshape(3, 1, 1, 1)
    return np.asarray(grid / size.reshape(3, 1, 1, 1) + displacement + centre)


def _file_name(kind: str) -> str:
    return f"mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz"
