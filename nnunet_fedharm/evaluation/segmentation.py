"""Dice and HD95 per label, case and site.

`score_case` works on arrays, `score_folder` on folders of images as nnU-Net writes them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nnunet_fedharm.errors import DataError, ShapeError
from nnunet_fedharm.evaluation.distances import CONVENTIONS, dice, hausdorff_distance_95
from nnunet_fedharm.evaluation.labels import LabelMap, Targets
from nnunet_fedharm.evaluation.statistics import RESAMPLES, bootstrap_mean
from nnunet_fedharm.evaluation.volumes import check_same_geometry, read_segmentation, reader_for
from nnunet_fedharm.sites.files import write_text

METRICS = ("dice", "hd95_mm")
MEAN = "mean"
ALL_SITES = "all"


@dataclass(frozen=True)
class LabelScore:
    """One label in one case.

    Attributes:
        dice: overlap in [0, 1], NaN if the label is in neither image.
        hd95_mm: 95% Hausdorff distance in mm, NaN if the label is in neither image.
    """

    dice: float
    hd95_mm: float

    def to_dict(self) -> dict[str, float | None]:
        return {name: None if math.isnan(value) else value for name, value in vars(self).items()}


CaseScores = Mapping[str, Mapping[str, LabelScore]]
"""Case -> label or region -> score."""


def score_case(
    reference: LabelMap, prediction: LabelMap, spacing_mm: Sequence[float], targets: Targets
) -> dict[str, LabelScore]:
    """Score one case.

    Args:
        reference: label map of the expert, any number of axes.
        prediction: label map to score, same shape.
        spacing_mm: one per axis in the array's order.
        targets: labels or regions; voxels that the reference marks `ignore` are taken out of both maps.

    Returns:
        A score per name in `targets.regions`.

    Raises:
        ShapeError: the shapes differ.
    """
    if reference.shape != prediction.shape:
        raise ShapeError(f"Reference {reference.shape} and prediction {prediction.shape} have different shapes.")
    counted = targets.counted(reference)
    scores = {}
    for name in targets.regions:
        pair = targets.mask(name, reference, counted), targets.mask(name, prediction, counted)
        scores[name] = LabelScore(dice(*pair), hausdorff_distance_95(*pair, spacing_mm))
    return scores


def score_folder(
    predictions: Path,
    labels: Path,
    dataset_json: Mapping[str, Any],
    *,
    sites: Mapping[str, str] | None = None,
    seed: int = 0,
    num_processes: int = 1,
    progress: bool = True,
) -> dict[str, Any]:
    """Score every case that has a reference label, and summarize by site.

    Args:
        predictions: folder with one `CASE<file_ending>` per case.
        labels: folder with the references; each needs a prediction.
        dataset_json: content of dataset.json: labels, file_ending, optionally overwrite_image_reader_writer.
        sites: case -> site; None puts all cases into one site.
        seed: of the bootstrap.
        num_processes: cases scored side by side.
        progress: show a bar.

    Returns:
        See `metrics_of`.

    Raises:
        DataError: no reference, a missing prediction, a case without a site, or images on different grids.
    """
    if sites is not None:
        _check_sites(_matched_cases(predictions, labels, _ending(dataset_json)), sites)
    scores = score_cases(predictions, labels, dataset_json, num_processes=num_processes, progress=progress)
    site_of = dict.fromkeys(scores, ALL_SITES) if sites is None else {case: sites[case] for case in scores}
    return metrics_of(scores, site_of, Targets.from_dataset_json(dataset_json), seed=seed)


def score_cases(
    predictions: Path,
    labels: Path,
    dataset_json: Mapping[str, Any],
    *,
    num_processes: int = 1,
    progress: bool = True,
) -> CaseScores:
    """Scores of every case that has a reference label; arguments and errors as `score_folder`."""
    targets = Targets.from_dataset_json(dataset_json)
    cases = _matched_cases(predictions, labels, _ending(dataset_json))
    score = partial(
        _score_files, predictions=predictions, labels=labels, dataset_json=dict(dataset_json), targets=targets
    )
    results = tqdm(_run(score, cases, num_processes), "evaluate", len(cases), disable=not progress)
    return dict(zip(cases, results, strict=True))


def metrics_of(scores: CaseScores, site_of: Mapping[str, str], targets: Targets, *, seed: int) -> dict[str, Any]:
    """JSON-able metrics.

    Returns:
        `labels`, `conventions`, `bootstrap`, `cases` (case -> site and scores) and `sites` (site -> label -> metric ->
        mean, low, high, n); label "mean" is the mean over labels, site "all" pools the cases of all sites.
    """
    return {
        "labels": {name: list(values) for name, values in targets.regions.items()},
        "conventions": CONVENTIONS,
        "bootstrap": {"resamples": RESAMPLES, "seed": seed, "unit": "case"},
        "cases": {
            case: {"site": site_of[case], "labels": {name: item.to_dict() for name, item in found.items()}}
            for case, found in scores.items()
        },
        "sites": summarize_scores(scores, site_of, list(targets.regions), seed=seed),
    }


def summarize_scores(
    scores: CaseScores, site_of: Mapping[str, str], names: Sequence[str], *, seed: int
) -> dict[str, Any]:
    """Site -> {"n_cases", "labels": label -> metric -> mean, low, high, n}, with site "all" and label "mean" added.

    A case's mean over labels leaves labels out that are in neither image.
    """
    members = {
        site: [case for case in scores if site_of[case] == site] for site in sorted({site_of[c] for c in scores})
    }
    if len(members) > 1:
        members[ALL_SITES] = list(scores)
    summary: dict[str, Any] = {}
    for site, cases in members.items():
        rows: dict[str, Any] = {}
        for name in [*names, MEAN]:
            rows[name] = {
                metric: bootstrap_mean(
                    [_value(scores[case], name, metric) for case in cases], seed=seed, stream=f"{site}/{name}/{metric}"
                ).to_dict()
                for metric in METRICS
            }
        summary[site] = {"n_cases": len(cases), "labels": rows}
    return summary


def write_metrics(metrics: Mapping[str, Any], path: Path) -> None:
    """Write metrics as strict JSON (no NaN), at once: a cell of a study whose metrics are there counts as finished.

    Raises:
        SetupError: the file cannot be written.
    """
    write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n", path)


def format_table(metrics: Mapping[str, Any]) -> str:
    """Plain-text table: a row per site and label, mean and 95% interval of each metric."""
    header = ("site", "label", "cases", "Dice [95% interval]", "HD95 mm [95% interval]")
    rows = [header]
    for site, entry in metrics["sites"].items():
        for name, values in entry["labels"].items():
            rows.append((site, name, str(values["dice"]["n"]), _cell(values["dice"], 3), _cell(values["hd95_mm"], 2)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _cell(value: Mapping[str, float | None], digits: int) -> str:
    if value["mean"] is None:
        return "-"
    text = f"{value['mean']:.{digits}f}"
    return text if value["low"] is None else f"{text} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def _value(scores: Mapping[str, LabelScore], name: str, metric: str) -> float:
    if name != MEAN:
        return float(getattr(scores[name], metric))
    present = [value for value in (float(getattr(item, metric)) for item in scores.values()) if not math.isnan(value)]
    return sum(present) / len(present) if present else math.nan


def _matched_cases(predictions: Path, labels: Path, ending: str) -> list[str]:
    for folder in (predictions, labels):
        if not folder.is_dir():
            raise DataError(f"The folder {folder} does not exist.")
    cases = sorted(path.name.removesuffix(ending) for path in labels.glob(f"*{ending}"))
    if not cases:
        raise DataError(f"{labels} holds no file that ends in {ending}, the ending that dataset.json states.")
    missing = [case for case in cases if not (predictions / f"{case}{ending}").exists()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(cases)} cases have no prediction in {predictions}, first {missing[0]}{ending}. "
            "Predict them first, or give a label folder with only the predicted cases."
        )
    return cases


def _check_sites(cases: Sequence[str], sites: Mapping[str, str]) -> None:
    unknown = [case for case in cases if case not in sites]
    if unknown:
        raise DataError(f"sites.json gives no site for case {unknown[0]}. Add it, or evaluate without --sites.")


def _ending(dataset_json: Mapping[str, Any]) -> str:
    return str(dataset_json.get("file_ending", ".nii.gz"))


def _score_files(
    case: str, *, predictions: Path, labels: Path, dataset_json: Mapping[str, Any], targets: Targets
) -> dict[str, LabelScore]:
    ending = _ending(dataset_json)
    paths = [folder / f"{case}{ending}" for folder in (labels, predictions)]
    reader = reader_for(dataset_json, paths[0])
    reference, prediction = (read_segmentation(path, reader) for path in paths)
    check_same_geometry(reference, prediction)
    return score_case(reference.array, prediction.array, reference.spacing_mm, targets)


def _run(score: Any, cases: Sequence[str], num_processes: int) -> Iterator[dict[str, LabelScore]]:
    if num_processes <= 1 or len(cases) == 1:
        yield from map(score, cases)
        return
    # spawn, as nnU-Net: forking a process that has started torch's threads can hang.
    with ProcessPoolExecutor(min(num_processes, len(cases)), mp_context=get_context("spawn")) as pool:
        yield from pool.map(score, cases)
