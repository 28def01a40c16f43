"""The feature table of a raw dataset: every case measured once, in several processes, kept by content, failures named."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nnunet_fedharm.errors import DataError, SetupError
from nnunet_fedharm.sites.checks import CaseVolumes, check_case, check_files, expected_labels
from nnunet_fedharm.sites.features.cache import CaseFeatures, content_key, load, store
from nnunet_fedharm.sites.features.cases import ListedCase, list_cases, missing_cases
from nnunet_fedharm.sites.features.measure import measure_volumes
from nnunet_fedharm.sites.features.options import FeatureOptions as FeatureOptions
from nnunet_fedharm.sites.features.radiomics import FEATURE_CLASSES, feature_extractor
from nnunet_fedharm.sites.features.regions import label_regions
from nnunet_fedharm.sites.features.table import Failure, FeatureTable, Row
from nnunet_fedharm.sites.files import CaseFiles, read_dataset_json, reader_class
from nnunet_fedharm.sites.parallel import map_cases
from nnunet_fedharm.sites.registry import SITES_FILE, SitesFile

CLASS_ORDER = (*FEATURE_CLASSES, "shape", "quality")


@dataclass(frozen=True)
class Context:
    """What all cases of a dataset share.

    Attributes:
        channels: names, in order.
        regions: `regions.label_regions`.
        expected: label values that a segmentation may hold.
        reader: nnU-Net's reader class.
        cache: folder of the cache.
    """

    dataset_json: Mapping[str, Any]
    channels: tuple[str, ...]
    regions: Mapping[str, tuple[int, ...]]
    expected: list[int]
    reader: type[Any]
    options: FeatureOptions
    cache: Path


@dataclass(frozen=True)
class Work:
    """One case to measure.

    Attributes:
        images: harmonized files, one per channel; None: the case's own.
        key: where the cache keeps it; None where a file cannot be read.
    """

    case: ListedCase
    images: tuple[Path, ...] | None
    key: str | None = None


def measure_dataset(
    raw_dataset: Path,
    *,
    registry: SitesFile | None,
    options: FeatureOptions,
    cache: Path,
    num_processes: int,
    images: Mapping[str, Sequence[Path]] | None = None,
    cases: Collection[str] | None = None,
) -> tuple[FeatureTable, list[Failure]]:
    """Measure imagesTr, imagesUnlabelled and imagesTravelling of a raw dataset.

    Where one of the cases has no label, the whole body is measured on all cases (as with `image_region`), so that sites without
    labels can be compared. A run that was stopped goes on where it was; what was measured before is not measured again, as long
    as voxels, labels, options and package versions are the same.

    Args:
        registry: the sites; None reads the dataset's sites.json.
        cache: folder for results by content, made where missing.
        num_processes: 1 stays in this process.
        images: case -> files of each channel to measure instead of the scanned ones (harmonized volumes on the same grid);
            cases that it does not name are left out. Regions still come from the scanned images and labels.
        cases: only these; None: all.

    Returns:
        The table, rows in the order labelled, unlabelled, travelling cases, and what could not be measured.

    Raises:
        DataError: no dataset, no or wrong sites.json, a case without a site, an unknown channel or case, no case at all.
        SetupError: pyradiomics is missing, the cache cannot be written, or a process was killed.
    """
    feature_extractor()
    dataset_json = read_dataset_json(raw_dataset, site="all")
    registry = SitesFile.load(raw_dataset / SITES_FILE) if registry is None else registry
    listed = list_cases(raw_dataset, dataset_json, registry)
    work = [item for item in _work(listed, images) if cases is None or item.case.files.case in cases]
    if not work:
        raise DataError(f"{raw_dataset} has no case to measure in imagesTr, imagesUnlabelled or imagesTravelling.")
    context = _context(raw_dataset, dataset_json, work, options, cache)
    work = _with_keys(work, context, num_processes)
    results = _measured(work, context, num_processes)
    absent = [] if images is not None else missing_cases(raw_dataset, registry, listed, dataset_json["file_ending"])
    failures = [Failure(registry.cases[case], case, f"{SITES_FILE} lists it, but it has no image.") for case in absent]
    for item, result in zip(work, results, strict=True):
        failures += [Failure(item.case.site, item.case.files.case, problem) for problem in result.problems]
    return build_table([item.case for item in work], results), failures


def build_table(cases: Sequence[ListedCase], results: Sequence[CaseFeatures]) -> FeatureTable:
    """Rows of all cases, and every feature that occurs, in the order of CLASS_ORDER and then by name."""
    names = sorted(
        {name for result in results for values in result.parts.values() for name in values}, key=feature_order
    )
    column = {name: index for index, name in enumerate(names)}
    rows, values = [], []
    for case, result in zip(cases, results, strict=True):
        for (channel, region, scale), found in result.parts.items():
            rows.append(Row(case.files.case, case.site, case.patient, channel, region, scale, case.travelling))
            line = np.full(len(names), np.nan)
            line[[column[name] for name in found]] = list(found.values())
            values.append(line)
    return FeatureTable(tuple(rows), tuple(names), np.array(values).reshape(len(rows), len(names)))


def feature_order(name: str) -> tuple[int, str]:
    """Sort key of features; the same at every site."""
    return CLASS_ORDER.index(name.split("_", 1)[0]), name


def measure_case(work: Work, context: Context) -> CaseFeatures:
    """Measure one case and keep the result; what is wrong with a file becomes its only problem."""
    case, prefix = work.case, f"Site {work.case.site}, case {work.case.files.case}: "
    try:
        scanned = _read(case.files, case.site, context)
        images = None
        if work.images is not None:
            images = _read(CaseFiles(case.files.case, work.images, None), case.site, context).images
            if images.shape != scanned.images.shape:
                raise DataError(
                    f"the harmonized images have the shape {images.shape[1:]}, the scanned ones {scanned.images.shape[1:]}. "
                    "Harmonize the case again."
                )
        found = measure_volumes(scanned, context.channels, context.regions, context.options, images)
    except DataError as error:
        return CaseFeatures(problems=[" ".join(str(error).removeprefix(prefix).split())])
    if work.key is not None:
        store(context.cache, work.key, found)
    return found


def _read(files: CaseFiles, site: str, context: Context) -> CaseVolumes:
    check_files(files, context.dataset_json, site=site)
    return check_case(files, reader=context.reader, expected=context.expected, site=site)


def _work(listed: Sequence[ListedCase], images: Mapping[str, Sequence[Path]] | None) -> list[Work]:
    if images is None:
        return [Work(case, None) for case in listed]
    unknown = sorted(set(images) - {case.files.case for case in listed})
    if unknown:
        raise DataError(f"Images are given for the case {unknown[0]}, which the dataset does not have.")
    return [Work(case, tuple(images[case.files.case])) for case in listed if case.files.case in images]


def _context(
    raw_dataset: Path, dataset_json: dict[str, Any], work: Sequence[Work], options: FeatureOptions, cache: Path
) -> Context:
    channels = tuple(str(name) for name in dataset_json["channel_names"].values())
    unknown = [name for name in options.channels or () if name not in channels]
    if unknown:
        raise DataError(f"{raw_dataset} has no channel {unknown[0]}. Its channels: {', '.join(channels)}.")
    if any(item.case.files.label is None for item in work):
        options = replace(options, image_region=True)
    files = [path for item in work for path in item.case.files.images]
    example = next((path for path in files if path.is_file()), files[0])
    reader = reader_class(dataset_json, example, site=work[0].case.site)
    expected = expected_labels(dataset_json, where=str(raw_dataset / "dataset.json"))
    return Context(dataset_json, channels, label_regions(dataset_json["labels"]), expected, reader, options, cache)


def _with_keys(work: Sequence[Work], context: Context, num_threads: int) -> list[Work]:
    settings = {"options": context.options.key(), "channels": context.channels, "regions": context.regions}

    def with_key(item: Work) -> Work:
        files = item.case.files
        paths = [*files.images, *([] if files.label is None else [files.label]), *(item.images or ())]
        more = {"labelled": files.label is not None, "harmonized": item.images is not None}
        try:
            return replace(item, key=content_key(paths, settings | more))
        except OSError:
            return item  # a missing file is named when the case is measured

    with ThreadPoolExecutor(max(num_threads, 1)) as pool:  # hashing runs outside of Python's lock
        return list(tqdm(pool.map(with_key, work), total=len(work), desc="Looking up cases", leave=False))


def _measured(work: Sequence[Work], context: Context, num_processes: int) -> list[CaseFeatures]:
    """Results in the order of `work`; only what the cache does not have is measured."""
    known = {
        index: found
        for index, item in enumerate(work)
        if item.key is not None and (found := load(context.cache, item.key)) is not None
    }
    open_indices = [index for index in range(len(work)) if index not in known]
    fresh: Iterable[CaseFeatures] = map_cases(
        partial(measure_case, context=context),
        [work[index] for index in open_indices],
        num_processes=num_processes,
        description="Measuring features",
    )
    try:
        known.update(zip(open_indices, fresh, strict=True))
    except BrokenProcessPool as error:
        raise SetupError(
            "A process that measures features was killed, probably for want of memory. Run again with fewer processes; "
            "what was measured is kept."
        ) from error
    return [known[index] for index in range(len(work))]
