"""Label maps and images from files, read by the reader that nnU-Net uses for the dataset, with their geometry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

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


def read_images(paths: Sequence[Path], reader: Any) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
    """One case's channels, (C, *grid) as the reader orders the axes, and the reader's properties.

    Raises:
        DataError: a channel's file is missing or cannot be read; the message names it.
    """
    for path in paths:
        if not path.is_file():
            raise DataError(f"The channel {path} is missing. nnU-Net wants one file CASE_0000, ... per channel.")
    try:
        array, properties = reader.read_images([str(path) for path in paths])
    except Exception as error:  # readers of four libraries raise what they like; the user needs the file's name
        raise DataError(f"Cannot read {paths[0]} (and its other channels): {error}") from error
    return np.asarray(array, dtype=np.float32), properties


def write_like(array: npt.NDArray[np.float32], template: Path, reader_name: str, target: Path) -> None:
    """Write one channel as float32 NIfTI with the header, affine and axes of the file that it was read from.

    Args:
        array: (D, H, W) as the reader ordered the axes.
        template: the NIfTI file that was read.
        reader_name: nnU-Net's reader class that read it.
        target: file to write.

    Raises:
        DataError: the file cannot be written, is no NIfTI, or the reader turns axes in a way that is not undone here.
    """
    if reader_name not in ("SimpleITKIO", "NibabelIO", "NibabelIOWithReorient"):
        raise DataError(f"Images read by {reader_name} cannot be written as NIfTI; use SimpleITKIO or NibabelIO.")
    source = nib.load(template)
    if not isinstance(source, nib.Nifti1Image):
        raise DataError(f"{template} is no NIfTI file, so its geometry cannot be kept. Convert it to .nii.gz.")
    values = array.transpose(2, 1, 0)  # nnU-Net's readers turn (x, y, z) into (z, y, x)
    if reader_name == "NibabelIOWithReorient":
        values = _as_stored(values, source)
    image = nib.Nifti1Image(values.reshape(source.shape), source.affine, source.header)
    image.set_data_dtype(np.float32)
    image.header.set_slope_inter(1.0, 0.0)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        nib.save(image, target)
    except OSError as error:
        raise DataError(f"Cannot write {target}: {error.strerror}. Choose a writable folder with -o.") from error


def _as_stored(values: npt.NDArray[np.float32], source: Any) -> npt.NDArray[np.float32]:
    """Undo the turn to RAS."""
    stored = nib.orientations.io_orientation(source.affine)
    back = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), stored)
    return np.asarray(nib.orientations.apply_orientation(values, back))


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
