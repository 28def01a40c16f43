"""Simulated images for the start of `private_dice.py`: random bodies in random contrasts, made without any image of a person.

What goes in is what a textbook and the file header say: the hippocampus is a bent, tilted body of about 30 to 45 mm along the
body's long axis, thicker in front, of a few cubic centimetres; label 1 is its front part, label 2 the rest; the first axis of the
files points to the right, the second to the front, the third up. Size, bend, tilt, thickness, the place of the cut, surface, all
intensities, blur, field and noise are drawn at random, in ranges much wider than people's.

References:
    Billot et al., "SynthSeg: Segmentation of brain MRI scans of any contrast and resolution", Medical Image Analysis 2023;
    Hoffmann et al., "SynthMorph: learning contrast-invariant registration without acquired images", IEEE TMI 2022.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter

Volume = npt.NDArray[np.float32]
SHAPE = (36, 50, 36)
"""Voxels of 1 mm: up, to the front, to the right."""


def smooth_noise(rng: np.random.Generator, sigma: float) -> Volume:
    """A smooth random field of mean 0 and standard deviation 1."""
    field = gaussian_filter(rng.standard_normal(SHAPE).astype(np.float32), sigma, mode="wrap")
    return (field - field.mean()) / field.std()


def body(rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Labels of one body: 1 in front, 2 behind, 0 outside."""
    z, y, x = (np.arange(n, dtype=np.float32) - (n - 1) / 2 for n in SHAPE)
    z, y, x = z[:, None, None], y[None, :, None], x[None, None, :]
    along = y - rng.uniform(-4, 4)
    length = rng.uniform(28, 46)
    middle_z = rng.uniform(-4, 4) + rng.uniform(-0.7, 0.2) * along + rng.uniform(-0.01, 0.01) * along**2
    middle_x = rng.uniform(-4, 4) + rng.uniform(-0.4, 0.4) * along + rng.uniform(-0.012, 0.012) * along**2
    head = rng.uniform(1.0, 1.7) * 1 / (1 + np.exp(-(along - rng.uniform(0, 10)) / 3))
    thick = rng.uniform(4.0, 6.5) * (0.8 + 0.5 * head)
    ends = np.sqrt(np.clip(1 - np.abs(2 * along / length) ** 4, 0, 1))
    angle, flat = rng.uniform(0, np.pi), rng.uniform(0.55, 1.0)
    u, v = z - middle_z, x - middle_x
    across = np.hypot(np.cos(angle) * u + np.sin(angle) * v, (np.cos(angle) * v - np.sin(angle) * u) / flat)
    rough = 1 + rng.uniform(0.05, 0.2) * smooth_noise(rng, rng.uniform(2, 4))
    inside = across * rough < thick * ends + 1e-6 * (ends > 0)
    cut = rng.uniform(-2, 7) + rng.uniform(-0.3, 0.3) * u
    return (inside * np.where(along > cut, 1, 2)).astype(np.uint8)


def render(rng: np.random.Generator, labels: npt.NDArray[np.uint8]) -> Volume:
    """An image of the body between random tissues, of any contrast."""
    kinds = np.argmax([smooth_noise(rng, rng.uniform(2, 6)) for _ in range(rng.integers(3, 6))], axis=0)
    means = rng.uniform(0.3, 1.0) * rng.uniform(-0.5, 0.5, kinds.max() + 1).astype(np.float32)
    image = means[kinds]
    inside = means.mean() + rng.choice([-1, 1]) * rng.uniform(0.15, 0.6)
    image = np.where(labels > 0, inside + rng.normal(0, 0.03) * (labels == 1), image).astype(np.float32)
    image += rng.uniform(0, 0.1) * smooth_noise(rng, rng.uniform(1, 3))
    image = gaussian_filter(image, rng.uniform(0.3, 1.2, 3))
    image = image * np.exp(rng.uniform(0, 0.25) * smooth_noise(rng, 15))
    return np.asarray(image + rng.uniform(0.01, 0.08) * rng.standard_normal(SHAPE), dtype=np.float32)


def write_dataset(folder: Path, description: dict[str, Any], *, cases: int, seed: int) -> None:
    """A raw nnU-Net dataset of simulated cases.

    Args:
        folder: `DatasetXXX_Name`; replaced.
        description: dataset.json of the real data: channels, labels, ending.
    """
    shutil.rmtree(folder, ignore_errors=True)
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number in range(cases):
        labels = body(rng)
        for part, array, end in (("imagesTr", render(rng, labels), "_0000"), ("labelsTr", labels, "")):
            sitk.WriteImage(sitk.GetImageFromArray(array), str(folder / part / f"simulated_{number:03d}{end}.nii.gz"))
