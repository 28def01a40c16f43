"""Preprocessing at a site with nnU-Net's own preprocessor, from plans that the server made.

Labelled cases go where nnU-Net expects them. Cases without labels go to `<data_identifier>_unlabelled/` in the same format
(blosc2 and pickle) with no class locations, so that stock nnU-Net never meets them and the harmonizer phase can.
A record beside the cases says for which plans and which raw files they were made: what is up to date is not done again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_fedharm.errors import DataError, SetupError
from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.planning.planner import require_configuration
from nnunet_fedharm.sites.files import (
    CaseFiles,
    labelled_cases,
    read_dataset_json,
    read_json,
    unlabelled_cases,
    write_json,
)
from nnunet_fedharm.sites.parallel import map_cases
from nnunet_fedharm.sites.registry import SITES_FILE

UNLABELLED_SUFFIX = "_unlabelled"
RECORD_SUFFIX = ".fedharm.json"
"""Appended to the folder's name: beside it, because nnU-Net allows no other file among the cases."""
_SUFFIXES = (".b2nd", "_seg.b2nd", ".pkl")
# A change of any of these changes the preprocessed voxels (patch_size only how the files are chunked: left out).
CONFIGURATION_KEYS = (
    "preprocessor_name",
    "spacing",
    "normalization_schemes",
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_seg",
    "resampling_fn_data_kwargs",
    "resampling_fn_seg_kwargs",
)
_PLANS_KEYS = ("image_reader_writer", "transpose_forward", "foreground_intensity_properties_per_channel")


def preprocess_site(
    root: NnunetRoot,
    dataset_name: str,
    plans: Mapping[str, Any],
    configuration: str,
    *,
    num_processes: int = 1,
    dataset_json: Mapping[str, Any] | None = None,
    fingerprint: Mapping[str, Any] | None = None,
    adopt_existing: bool = False,
) -> None:
    """Write plans, dataset.json, fingerprint and sites.json, then preprocess every case that is not up to date.

    Args:
        dataset_json: the federation's; None: the site's own.
        fingerprint: the federation's; None: the file that lies there, or else one that holds the plans' medians only
            (nnU-Net's trainer copies the file and reads nothing from it).
        adopt_existing: take complete cases without a record as up to date (they come from `nnUNetv2_preprocess`).

    Raises:
        PlanError: a configuration that is not supported or not planned.
        DataError: no dataset, or a case that nnU-Net cannot preprocess.
        SetupError: a folder cannot be written.
    """
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    require_configuration(plans, configuration)
    root.create()
    raw = root.raw / dataset_name
    site = root.path.name
    own = read_dataset_json(raw, site=site)
    write_descriptions(root, dataset_name, plans, dataset_json=dataset_json or own, fingerprint=fingerprint)
    manager = PlansManager(dict(plans))
    work = partial(
        _preprocess_case, plans=dict(plans), configuration=configuration, dataset_json=dict(dataset_json or own)
    )
    folder = root.preprocessed / dataset_name / manager.get_configuration(configuration).data_identifier
    stamp = plans_stamp(plans, configuration, dataset_json or own)
    labelled = labelled_cases(raw, own)
    with root.activate():
        _bring_up_to_date(folder, labelled, stamp, work, num_processes=num_processes, site=site, adopt=adopt_existing)
        unlabelled = folder.with_name(folder.name + UNLABELLED_SUFFIX)
        _bring_up_to_date(unlabelled, unlabelled_cases(raw, own), stamp, work, num_processes=num_processes, site=site)
    _copy_labels(labelled, root.preprocessed / dataset_name / "gt_segmentations")


def write_descriptions(
    root: NnunetRoot,
    dataset_name: str,
    plans: Mapping[str, Any],
    *,
    dataset_json: Mapping[str, Any],
    fingerprint: Mapping[str, Any] | None = None,
) -> None:
    """Plans, dataset.json, dataset_fingerprint.json and sites.json in the preprocessed folder, as nnU-Net looks for them."""
    folder = root.preprocessed / dataset_name
    write_json(plans, folder / f"{plans['plans_name']}.json")
    write_json(dataset_json, folder / "dataset.json")
    fingerprint_file = folder / "dataset_fingerprint.json"
    if fingerprint is not None or not fingerprint_file.is_file():
        write_json(fingerprint or _fingerprint_of_medians(plans), fingerprint_file)
    sites = root.raw / dataset_name / SITES_FILE
    if sites.is_file():
        write_json(read_json(sites, what="The sites file"), folder / SITES_FILE)


def plans_stamp(plans: Mapping[str, Any], configuration: str, dataset_json: Mapping[str, Any]) -> str:
    """Hash of everything in the plans that decides the preprocessed voxels and the sampled class locations."""
    chosen = {key: plans["configurations"][configuration].get(key) for key in CONFIGURATION_KEYS}
    chosen |= {key: plans.get(key) for key in _PLANS_KEYS}
    chosen["labels"] = dataset_json["labels"]
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


def _bring_up_to_date(
    folder: Path,
    cases: Sequence[CaseFiles],
    stamp: str,
    work: Callable[[CaseFiles, Path], None],
    *,
    num_processes: int,
    site: str,
    adopt: bool = False,
) -> None:
    if not cases and not folder.exists():
        return
    done = _done_cases(folder, cases, stamp, adopt=adopt)
    try:
        if not done and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _keep_only(folder, set(done))
    except OSError as error:
        raise SetupError(f"Cannot write in {folder}: {error.strerror}. Make it writable for this user.") from error
    todo = [case for case in cases if case.case not in done]
    description = f"Preprocessing site {site}, {folder.name}"
    results = map_cases(partial(_call, work, folder, site), todo, num_processes=num_processes, description=description)
    try:
        for case, _ in zip(todo, results, strict=True):
            done[case.case] = case_stamp(case, folder)
    finally:
        # Also after an error: what is done is not done again.
        write_json({"plans": stamp, "cases": done}, record_of(folder))


def _call(work: Callable[[CaseFiles, Path], None], folder: Path, site: str, case: CaseFiles) -> None:
    try:
        work(case, folder)
    except OSError as error:
        raise SetupError(
            f"Site {site}: cannot write in {folder} or read the raw files ({error}). Check space and rights."
        ) from error
    except (RuntimeError, AssertionError, ValueError) as error:
        raise DataError(
            f"Site {site}, case {case.case}: nnU-Net cannot preprocess {case.images[0]} ({error}). "
            "Run `nnunet-fedharm sites check` for the reason."
        ) from error


def _preprocess_case(
    case: CaseFiles, folder: Path, *, plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any]
) -> None:
    from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    manager = PlansManager(plans)
    settings = manager.get_configuration(configuration)
    preprocessor = settings.preprocessor_class(verbose=False)
    images = [str(image) for image in case.images]
    target = str(folder / case.case)
    if case.label is not None:
        preprocessor.run_case_save(target, images, str(case.label), manager, settings, dataset_json)
        return
    data, segmentation, properties = preprocessor.run_case(images, None, manager, settings, dataset_json)
    # The trainers' data loader looks class locations up; none means: draw patches anywhere.
    properties["class_locations"] = {}
    data, segmentation = data.astype(np.float32, copy=False), segmentation.astype(np.int16, copy=False)
    patch = tuple(settings.patch_size)
    blocks, chunks = comp_blosc2_params(data.shape, patch, data.itemsize)
    blocks_seg, chunks_seg = comp_blosc2_params(segmentation.shape, patch, segmentation.itemsize)
    nnUNetDatasetBlosc2.save_case(
        data,
        segmentation,
        properties,
        target,
        chunks=chunks,
        blocks=blocks,
        chunks_seg=chunks_seg,
        blocks_seg=blocks_seg,
    )


def record_of(folder: Path) -> Path:
    """The record of a folder of preprocessed cases."""
    return folder.with_name(folder.name + RECORD_SUFFIX)


def case_stamp(case: CaseFiles, folder: Path) -> list[int]:
    """Size and time of a case's raw files and the time of the preprocessed one, to see whether any was replaced."""
    files = [*case.images, *([] if case.label is None else [case.label])]
    raw = [number for file in files if file.exists() for number in (file.stat().st_size, file.stat().st_mtime_ns)]
    return [*raw, (folder / f"{case.case}.pkl").stat().st_mtime_ns]


def _done_cases(folder: Path, cases: Sequence[CaseFiles], stamp: str, *, adopt: bool) -> dict[str, list[int]]:
    stamps = {
        case.case: case_stamp(case, folder)
        for case in cases
        if all((folder / f"{case.case}{suffix}").is_file() for suffix in _SUFFIXES)
    }
    if not record_of(folder).is_file():
        return stamps if adopt else {}
    record = read_json(record_of(folder), what="The preprocessing record")
    if record.get("plans") != stamp:
        return {}
    known = record.get("cases", {})
    return {case: value for case, value in stamps.items() if known.get(case) == value}


def _keep_only(folder: Path, cases: set[str]) -> None:
    """Remove the files of all other cases: blosc2 overwrites none, and nnU-Net trains on every case that it finds."""
    for file in folder.iterdir():
        name = next((file.name[: -len(end)] for end in ("_seg.b2nd", ".b2nd", ".pkl") if file.name.endswith(end)), None)
        if name is not None and name not in cases:
            file.unlink()


def _copy_labels(cases: Sequence[CaseFiles], folder: Path) -> None:
    """nnU-Net validates against these copies; only newer files are copied, as nnU-Net does."""
    for case in cases:
        if case.label is None:
            continue
        folder.mkdir(exist_ok=True)
        target = folder / case.label.name
        if not target.exists() or target.stat().st_mtime_ns < case.label.stat().st_mtime_ns:
            shutil.copy2(case.label, target)


def _fingerprint_of_medians(plans: Mapping[str, Any]) -> dict[str, Any]:
    back = plans["transpose_backward"]
    return {
        "spacings": [[plans["original_median_spacing_after_transp"][axis] for axis in back]],
        "shapes_after_crop": [[plans["original_median_shape_after_transp"][axis] for axis in back]],
        "foreground_intensity_properties_per_channel": plans["foreground_intensity_properties_per_channel"],
        "median_relative_size_after_cropping": 1.0,
    }
