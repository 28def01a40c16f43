"""Label maps from files, read by the reader that nnU-Net uses for the dataset, with their geometry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_fedharm.errors import DataError
from nnunet_fedharm.evaluation.labels import LabelMap

GEOMETRY_TOLERANCE = 1e-3
"""Largest difference of an affine's element (mm or direction cosine) that still counts as the same grid."""


@dataclass(frozen=True)
class LabelVolume:
    """A label map and its grid.

    Attributes:
        path: the file.
        array: (D, H, W) integer labels, axes as nnU-Net's reader orders them.
        spacing_mm: one per axis of `array`.
        frame: numbers that place the grid in space (affine, or origin and direction); compared, never interpreted.
    """

    path: Path
    array: LabelMap
    spacing_mm: tuple[float, ...]
    frame: tuple[float, ...]


def reader_for(dataset_json: Mapping[str, Any], example: Path) -> Any:
    """An instance of the reader that nnU-Net takes for this dataset.

    Raises:
        DataError: nnU-Net has no reader for the file ending.
    """
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    content = {"file_ending": ".nii.gz", **dataset_json}
    try:
        return determine_reader_writer_from_dataset_json(content, str(example), verbose=False)()
    except RuntimeError as error:
        raise DataError(f"nnU-Net has no reader for {example}: {error}. Check file_ending in dataset.json.") from error


def read_segmentation(path: Path, reader: Any) -> LabelVolume:
    """Read one label map.

    Raises:
        DataError: the file cannot be read, or holds values that are no whole numbers; the message names the file.
    """
    try:
        array, properties = reader.read_seg(str(path))
    except Exception as error:  # readers of four libraries raise what they like; the user needs the file's name
        raise DataError(f"Cannot read {path}: {error}") from error
    labels = np.rint(array[0]).astype(np.int64)
    if not np.array_equal(labels, array[0]):
        raise DataError(f"{path} holds values that are not whole numbers, so it is no label map.")
    return LabelVolume(path, labels, tuple(float(value) for value in properties["spacing"]), _frame(properties))


def check_same_geometry(reference: LabelVolume, prediction: LabelVolume) -> None:
    """Refuse two label maps on different grids.

    Raises:
        DataError: shape, spacing, origin or direction differ; the message names the prediction's file and both values.
    """
    pairs = (
        ("shape", reference.array.shape, prediction.array.shape),
        ("spacing", reference.spacing_mm, prediction.spacing_mm),
        ("position or direction", reference.frame, prediction.frame),
    )
    for what, expected, found in pairs:
        if len(expected) != len(found) or not np.allclose(expected, found, rtol=0, atol=GEOMETRY_TOLERANCE):
            raise DataError(
                f"{prediction.path} has another {what} than {reference.path}: {_short(found)} instead of "
                f"{_short(expected)}. Predict from the image that the label was drawn on, or resample it."
            )


def _frame(properties: Mapping[str, Any]) -> tuple[float, ...]:
    stuff = properties.get("sitk_stuff") or properties.get("nibabel_stuff") or {}
    names = ("origin", "direction", "original_affine")
    return tuple(float(value) for name in names if name in stuff for value in np.ravel(stuff[name]))


def _short(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"
