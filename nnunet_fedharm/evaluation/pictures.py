"""Pictures of slices as PNG data URIs, and the numbers behind histograms; arrays in, text out."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_fedharm.errors import ShapeError

Slice = npt.NDArray[np.floating[Any]]
Labels = npt.NDArray[np.integer[Any]]
Rgb = npt.NDArray[np.uint8]

LABEL_COLOURS: tuple[tuple[int, int, int], ...] = ((42, 157, 143), (233, 177, 60), (214, 84, 84), (122, 104, 190))
"""Colours of labels 1, 2, ... in overlays; told apart also by readers who see no red or no green."""

WINDOW = (-2.8, 2.0)
"""Standard deviations shown from black to white in every picture, so that pictures of two sites can be compared."""


def grey_picture(image: Slice, mask: npt.NDArray[np.bool_], window: tuple[float, float] = WINDOW) -> Rgb:
    """Grey values of a slice in z-scores; black outside the mask.

    Args:
        image: (H, W), standard deviations.
        mask: (H, W).
        window: shown from black to white.

    Returns:
        (H, W, 3).
    """
    low, high = window
    grey = np.clip((image - low) / (high - low), 0.0, 1.0) * mask
    return np.repeat((255 * grey).astype(np.uint8)[..., None], 3, axis=-1)


def overlay(picture: Rgb, labels: Labels, opacity: float = 0.55) -> Rgb:
    """Labels in colour over a picture.

    Args:
        picture: (H, W, 3).
        labels: (H, W), 0 is left as it is.
        opacity: of the colour.

    Raises:
        ShapeError: the shapes differ.
    """
    if picture.shape[:2] != labels.shape:
        raise ShapeError(f"A picture of {picture.shape[:2]} cannot carry labels of {labels.shape}.")
    colours = np.asarray(LABEL_COLOURS, dtype=np.float64)[(labels - 1) % len(LABEL_COLOURS)]
    mixed = (1 - opacity) * picture + opacity * colours
    return np.where((labels > 0)[..., None], mixed, picture).astype(np.uint8)


def errors(picture: Rgb, reference: Labels, prediction: Labels) -> Rgb:
    """Voxels whose label is wrong, in red over a dimmed picture.

    Raises:
        ShapeError: the shapes differ.
    """
    if not picture.shape[:2] == reference.shape == prediction.shape:
        raise ShapeError(f"Shapes differ: {picture.shape[:2]}, {reference.shape}, {prediction.shape}.")
    wrong = (reference != prediction)[..., None]
    return np.where(wrong, np.array([235, 64, 52]), 0.6 * picture).astype(np.uint8)


def data_uri(picture: Rgb, scale: int = 3) -> str:
    """PNG of a picture, each pixel `scale` pixels wide, as a `data:` address that a page can hold."""
    from matplotlib.image import imsave

    buffer = BytesIO()
    imsave(buffer, np.kron(picture, np.ones((scale, scale, 1), dtype=np.uint8)), format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def density(values: Sequence[npt.NDArray[np.floating[Any]]], edges: npt.NDArray[np.float64]) -> list[float]:
    """Mean of the volumes' histograms, each with area 1 over the edges' range (values beyond it are left out)."""
    histograms = [np.histogram(volume, bins=edges, density=True)[0] for volume in values]
    return [float(value) for value in np.mean(histograms, axis=0)]
