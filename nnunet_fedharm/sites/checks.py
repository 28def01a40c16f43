"""Is a site's raw dataset fit for use? Each refusal names the site, the case, the file and what to do.

Stricter than nnU-Net where nnU-Net goes on and fails later: infinity, constant images, images and labels that do not lie in
the same place, and sites too small to validate.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
from nibabel.filebasedimages import ImageFileError

from nnunet_fedharm.errors import DataError
from nnunet_fedharm.sites.files import (
    UNLABELLED,
    CaseFiles,
    labelled_cases,
    read_dataset_json,
    reader_class,
    unlabelled_cases,
)
from nnunet_fedharm.sites.parallel import map_cases
from nnunet_fedharm.sites.registry import SITES_FILE, SitesFile

N_FOLDS = 5
"""nnU-Net's cross-validation: fold 0 … 4 need a case each to validate on."""
_DAMAGED = (EOFError, OSError, ValueError, zlib.error, ImageFileError)
"""What reading a NIfTI file raises whose end or header is lost."""


def check_raw_dataset(raw_dataset: Path, *, site: str, num_processes: int = 1) -> None:
    """Read every case once and refuse the first defect.

    Raises:
        DataError: no dataset, empty site, a single labelled case, missing channel or label, label values that dataset.json
            does not know, image and label in different places, NaN or infinity, a constant image.
    """
    dataset_json = read_dataset_json(raw_dataset, site=site)
    expected = expected_labels(dataset_json, where=f"Site {site}: {raw_dataset / 'dataset.json'}")
    labelled, unlabelled = labelled_cases(raw_dataset, dataset_json), unlabelled_cases(raw_dataset, dataset_json)
    _check_counts(raw_dataset, dataset_json, len(labelled), len(unlabelled), site=site)
    for case in [*labelled, *unlabelled]:
        check_files(case, dataset_json, site=site)
    check_registry(raw_dataset, [*labelled, *unlabelled], site=site)
    reader = reader_class(dataset_json, (labelled + unlabelled)[0].images[0], site=site)
    work = partial(check_case, reader=reader, expected=expected, site=site)
    for _ in map_cases(
        work, [*labelled, *unlabelled], num_processes=num_processes, description=f"Checking the cases of site {site}"
    ):
        pass


def check_registry(raw_dataset: Path, cases: Sequence[CaseFiles], *, site: str) -> None:
    """Refuse a sites.json that cannot be read or that leaves a case out; without the file all cases count as one site.

    Raises:
        DataError: it is so.
    """
    path = raw_dataset / SITES_FILE
    if not path.is_file():
        return
    registry = SitesFile.load(path)
    missing = [case.case for case in cases if case.case not in registry.cases]
    if missing:
        raise DataError(
            f"Site {site}, case {missing[0]}: {path} does not say which site it comes from. Add it to `cases`"
            + (f", and {len(missing) - 1} more." if len(missing) > 1 else ".")
        )


def check_fold(n_labelled: int, fold: int | str, *, site: str) -> None:
    """Refuse a cross-validation fold that nnU-Net cannot make from so few cases.

    Raises:
        DataError: fewer than five labelled cases and a numbered fold, or an unknown fold.
    """
    if str(fold) == "all":
        return
    if not str(fold).isdigit() or int(fold) >= N_FOLDS:
        raise DataError(f"Fold {fold!r} does not exist: choose 0 … {N_FOLDS - 1} or all.")
    if n_labelled < N_FOLDS:
        raise DataError(
            f"Site {site} has {n_labelled} labelled cases, too few for nnU-Net's {N_FOLDS} folds, so fold {fold} cannot be made: "
            "use fold all."
        )


def expected_labels(dataset_json: Mapping[str, Any], *, where: str) -> list[int]:
    """Label values that a segmentation may hold, the ignore label included.

    Raises:
        DataError: `labels` in dataset.json is not as nnU-Net needs it.
    """
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    try:
        manager = LabelManager(dataset_json["labels"], dataset_json.get("regions_class_order"))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(f"{where} has labels that nnU-Net does not accept: {error}. Correct `labels`.") from error
    values = [int(value) for value in manager.all_labels]
    if manager.has_ignore_label:
        values.append(int(manager.ignore_label))
    if values != list(range(len(values))):
        raise DataError(
            f"{where} has the label values {values}; nnU-Net needs 0, 1, 2, … without a gap. Renumber the labels."
        )
    return values


@dataclass(frozen=True)
class CaseVolumes:
    """What the files of one case hold.

    Attributes:
        images: (C, D, H, W) intensities, axes as nnU-Net's reader orders them; D is 1 for a slice.
        label: (D, H, W) label values; None for an unlabelled case.
        spacing_mm: one per axis.
    """

    images: npt.NDArray[np.float32]
    label: npt.NDArray[np.floating[Any]] | None
    spacing_mm: tuple[float, ...]


def check_case(case: CaseFiles, *, reader: type[Any], expected: list[int], site: str) -> CaseVolumes:
    """Read one case and refuse what cannot be trained on.

    Returns:
        The case's voxels.

    Raises:
        DataError: as in `check_raw_dataset`.
    """
    where = f"Site {site}, case {case.case}"
    try:
        with redirect_stdout(StringIO()):
            images, properties = reader().read_images([str(image) for image in case.images])
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"{where}: {case.images[0]} cannot be read together with its other channels "
            f"({str(error).strip() or 'sizes differ'}). "
            "All channels need the same size and spacing; restore or resample the file."
        ) from error
    for file, channel in zip(case.images, images, strict=False):
        try:
            stored = _raw_voxels(file, channel)
        except _DAMAGED as error:
            raise _damaged(where, file, error) from error
        _check_intensities(channel, stored, f"{where}: {file}")
    spacing_mm = tuple(float(value) for value in properties["spacing"])
    if case.label is None:
        return CaseVolumes(images, None, spacing_mm)
    try:
        with redirect_stdout(StringIO()):
            label, label_properties = reader().read_seg(str(case.label))
    except (RuntimeError, OSError) as error:
        raise DataError(f"{where}: the label {case.label} cannot be read ({error}). Restore the file.") from error
    try:
        _raw_voxels(case.label, label[0])
    except _DAMAGED as error:
        raise _damaged(where, case.label, error) from error
    _check_geometry(images, properties, label, label_properties, where=where, case=case)
    unknown = [value for value in np.unique(label) if value not in expected]
    if unknown:
        raise DataError(
            f"{where}: {case.label} holds the label value {unknown[0]:g}, which dataset.json does not list ({expected}). "
            "Relabel the segmentation, or add the label at every site."
        )
    return CaseVolumes(images, label[0], spacing_mm)


def _damaged(where: str, file: Path, error: Exception) -> DataError:
    return DataError(
        f"{where}: {file} is damaged ({error}); nnU-Net would take what is missing for zeros. Copy the file again."
    )


def _check_counts(
    raw_dataset: Path, dataset_json: Mapping[str, Any], n_labelled: int, n_unlabelled: int, *, site: str
) -> None:
    if not n_labelled and not n_unlabelled:
        raise DataError(
            f"Site {site} is empty: {raw_dataset} has no case ending in {dataset_json['file_ending']} "
            f"in imagesTr or {UNLABELLED}. "
            "Add cases or leave the site out."
        )
    if n_labelled == 1:
        raise DataError(
            f"Site {site} has one labelled case in {raw_dataset / 'imagesTr'}; training and validating need at least 2. "
            f"Add a case, or move this one to {UNLABELLED} so that the site takes part in the harmonizer phase only."
        )


def check_files(case: CaseFiles, dataset_json: Mapping[str, Any], *, site: str) -> None:
    """Refuse a case whose files are not all there.

    Raises:
        DataError: a missing channel or label, or more or fewer files than channels.
    """
    names = list(dataset_json["channel_names"].values())
    if len(case.images) != len(names):
        raise DataError(
            f"Site {site}, case {case.case}: {len(case.images)} image files for {len(names)} channels. Correct dataset.json."
        )
    for name, image in zip(names, case.images, strict=True):
        if not image.is_file():
            raise DataError(
                f"Site {site}, case {case.case}: channel {name} is missing, there is no {image}. Add the file or remove the case."
            )
    if case.label is not None and not case.label.is_file():
        raise DataError(
            f"Site {site}, case {case.case}: there is no label {case.label}. Add it, or move the images to {UNLABELLED}."
        )


def _check_intensities(
    channel: npt.NDArray[np.floating[Any]], stored: npt.NDArray[np.floating[Any]], where: str
) -> None:
    wrong = int((~np.isfinite(stored)).sum())
    if wrong:
        raise DataError(
            f"{where} holds {wrong} voxels that are NaN or infinity. Replace them and write the file again."
        )
    if channel.min() == channel.max():
        raise DataError(
            f"{where} is constant: every voxel is {float(channel.min()):g}. Export the image again or remove the case."
        )


def _raw_voxels(file: Path, read: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.floating[Any]]:
    """The voxels as stored: ITK's NIfTI reader turns NaN, infinity and the missing end of a file into zeros, without a word."""
    if not file.name.endswith((".nii", ".nii.gz")):
        return read
    return np.asanyarray(nibabel.load(file).dataobj)


def _check_geometry(
    images: npt.NDArray[np.floating[Any]],
    properties: Mapping[str, Any],
    label: npt.NDArray[np.floating[Any]],
    label_properties: Mapping[str, Any],
    *,
    where: str,
    case: CaseFiles,
) -> None:
    """Same shape, spacing, and (where the reader tells) orientation to 0.01 and origin to half a voxel."""

    def refuse(what: str, image_value: Any, label_value: Any) -> None:
        raise DataError(
            f"{where}: the label {case.label} has another {what} ({label_value}) "
            f"than the image {case.images[0]} ({image_value}). "
            "Resample the label onto the image."
        )

    if images.shape[1:] != label.shape[1:]:
        refuse("shape", images.shape[1:], label.shape[1:])
    spacing, label_spacing = properties["spacing"], label_properties["spacing"]
    if not np.allclose(spacing, label_spacing, rtol=1e-3):
        refuse("spacing in mm", spacing, label_spacing)
    affine, label_affine = _affine(properties), _affine(label_properties)
    if affine is None or label_affine is None:
        return
    if not np.allclose(affine[0], label_affine[0], atol=1e-2):
        refuse("orientation", affine[0].round(3).tolist(), label_affine[0].round(3).tolist())
    if np.abs(affine[1] - label_affine[1]).max() > 0.5 * min(spacing):
        refuse("origin in mm", affine[1].tolist(), label_affine[1].tolist())


def _affine(properties: Mapping[str, Any]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None:
    """Directions (unit columns) and origin, from what nnU-Net's reader keeps; None for formats without a position."""
    if "sitk_stuff" in properties:
        stuff = properties["sitk_stuff"]
        return np.asarray(stuff["direction"], dtype=np.float64), np.asarray(stuff["origin"], dtype=np.float64)
    if "nibabel_stuff" in properties:
        affine = np.asarray(properties["nibabel_stuff"]["original_affine"], dtype=np.float64)
        directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
        return directions.ravel(), affine[:3, 3]
    return None
