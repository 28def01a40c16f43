"""A site's side of the report: measure at home, answer with sums over patients, keep the table and an own report.

Everything of one run lies in `fedharm/site-report/<run>/`: `features.csv` (with case identifiers, never sent), `failures.json`,
and at the end `report.json`, the server's findings with what only this site may know: its failed cases and its outliers.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import RecordDict

import nnunet_fedharm
from nnunet_fedharm.differences import sketch
from nnunet_fedharm.differences.sketch_classifier import predicted_sites
from nnunet_fedharm.differences.sketch_statistics import site_rank_sums
from nnunet_fedharm.errors import DataError
from nnunet_fedharm.federation.messages import Unpacked, reply
from nnunet_fedharm.federation.report import messages
from nnunet_fedharm.federation.report.home import (
    Records,
    enough_patients,
    keys_beforehand,
    load_records,
    own_table,
    parts_of,
    report_folder,
    scanner_of,
    table_of_run,
)
from nnunet_fedharm.federation.report.messages import Part, array_name, arrays_of, parts_from_dict
from nnunet_fedharm.federation.report.noise import cut_norm
from nnunet_fedharm.federation.report.own import keep_comparison, own_report
from nnunet_fedharm.federation.report.release import Outgoing
from nnunet_fedharm.federation.site import Site
from nnunet_fedharm.sites.files import labelled_cases, read_dataset_json, unlabelled_cases

Arrays = dict[str, npt.NDArray[Any]]


def hello(site: Site, request: Unpacked) -> RecordDict:
    """What the sites have to agree on, and the scanner; no number of patients."""
    raw = site.raw_dataset(request.values["dataset"])
    description = read_dataset_json(raw, site=site.name)
    content = {
        "dataset": raw.name,
        "channels": {str(key): str(value) for key, value in description["channel_names"].items()},
        "labels": dict(description["labels"]),
        "versions": _versions(),
        "unlabelled": bool(unlabelled_cases(raw, description)),
        "scanner": scanner_of(site, raw),
    }
    return reply(messages.HELLO_REPLY, {"site": site.name, "description": content})


def measure(site: Site, request: Unpacked) -> RecordDict:
    """Measure every case (or take it from the cache), keep the table, and say what there is."""
    values = request.values
    out = Outgoing.of(site, request)
    out.refuse_beyond_budget()
    raw = site.raw_dataset(values["dataset"])
    home = own_table(site, raw, values["options"], report_folder(site, values["run_id"]))
    keys = _keys_beforehand(site, raw, values["options"]) if out.plan.on else None
    found = [(part, load_records(home.table, part)) for part in parts_of(home.table, values["options"], keys)]
    good = [enough_patients(site, records, values["options"]) for _, records in found]
    if not any(good):
        least = max(site.min_patients, int(values["options"]["min_patients"]))
        raise DataError(f"Site {site.name} has fewer patients than the {least} that it takes to send anything.")
    # With noise a part's size is not judged: whether it is named would tell of single patients.
    kept = [one for one, enough in zip(found, good, strict=True) if enough or out.plan.on]
    patients = np.array([len(records.patients) for _, records in kept], dtype=np.float64)
    noisy = out.noised("numbers", [len(part.names) for part, _ in kept], {"n": patients})["n"]
    numbers: dict[str, Any] = {} if out.plan.sums else {"patients": [round(float(count), 2) for count in noisy]}
    content = {
        "site": site.name,
        "parts": messages.parts_to_dict([part for part, _ in kept]),
        "settings": home.settings,
        "numbers": numbers if out.plan.on or out.plan.sums else numbers | home.numbers,
    }
    return out.release("numbers", messages.MEASURE_REPLY, content)


def _keys_beforehand(site: Site, raw: Path, options: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    description = read_dataset_json(raw, site=site.name)
    labelled, unlabelled = labelled_cases(raw, description), unlabelled_cases(raw, description)
    return keys_beforehand(description, options, labelled=bool(labelled), unlabelled=bool(unlabelled))


def counts(site: Site, request: Unpacked) -> RecordDict:
    """Counts of each part on the public grid or on the edges that the server announced; shares in the rank test."""
    out, parts, given, records = _asked(site, request)
    step, turn = request.values["step"], request.values["turn"]
    arrays: Arrays = {}
    for index, part in enumerate(parts):
        if step == "locate":
            arrays[array_name(index, "counts")] = sketch.locate(records[index].values).astype(np.float32)
            continue
        edges = _given(given, index, "edges", rows=len(part.names))
        own = sketch.count_bins(records[index].values, edges)
        if step == "histograms":
            arrays[array_name(index, "counts")] = own.astype(np.float32)
        else:
            pooled = _given(given, index, "pooled", rows=len(part.names))
            squares, slack = site_rank_sums(own[:, :-1], pooled[:, :-1])
            # Over N^2, so that no share is above the number of patients.
            scale = np.maximum(pooled[:, :-1].sum(1), 1) ** 2
            arrays[array_name(index, "ranks")] = np.stack([squares / scale, slack / scale, own[:, :-1].sum(1) > 0])
            keep_comparison(report_folder(site, request.values["run_id"]), part, own, pooled, edges)
    if step != "ranks":
        arrays = out.noised(step, [len(part.names) for part in parts], arrays)
    return out.release(step, messages.COUNTS_REPLY, {"site": site.name}, arrays, turn=turn)


def moments(site: Site, request: Unpacked) -> RecordDict:
    """Sums and sums of products of the standardised features, or of each fold on the axes that the server announced.

    Without noise a part is left out (all zeros) where a sum would cover fewer patients than this site allows.
    """
    out, parts, given, records = _asked(site, request)
    step, folds, seed = (request.values[key] for key in ("step", "folds", "seed"))
    arrays: Arrays = {}
    for index in range(len(parts)):
        vectors, fold = _standardised(records[index], given, index, folds, seed, alone=out.plan.on)
        if out.plan.on:
            reach = float(_given(given, index, "reach", rows=1)[0])
            vectors = cut_norm(vectors, reach) / reach
        elif np.bincount(fold, minlength=folds).min() < site.min_patients:
            vectors, fold = vectors[:0], fold[:0]
        upper = np.triu_indices(vectors.shape[1])
        chosen = [vectors[fold == number] for number in range(folds)]
        arrays[array_name(index, "n")] = np.array([len(x) for x in chosen], dtype=np.float64)
        arrays[array_name(index, "sum")] = np.stack([x.sum(0) for x in chosen])
        arrays[array_name(index, "products")] = np.stack([(x.T @ x)[upper] for x in chosen])
    arrays = out.noised(step, [len(part.names) for part in parts], arrays)
    return out.release(step, messages.MOMENTS_REPLY, {"site": site.name}, arrays)


def classify(site: Site, request: Unpacked) -> RecordDict:
    """How many patients of each part were taken for which site, each by the model that has not seen its fold."""
    out, parts, given, records = _asked(site, request)
    folds, seed = request.values["folds"], request.values["seed"]
    arrays: Arrays = {}
    for index in range(len(parts)):
        vectors, fold = _standardised(records[index], given, index, folds, seed, alone=out.plan.on)
        weights, biases = (arrays_of(given, index).get(what) for what in ("weights", "biases"))
        wanted = (folds, vectors.shape[1])
        if (
            weights is None
            or biases is None
            or weights.shape[:2] != wanted
            or biases.shape != (folds, weights.shape[2])
        ):
            raise DataError(f"The models of part {index} do not fit its features. Start the report again.")
        chosen = predicted_sites(vectors, fold, weights, biases)
        arrays[array_name(index, "counts")] = np.bincount(chosen, minlength=biases.shape[1]).astype(np.float64)
    arrays = out.noised("classify", [len(part.names) for part in parts], arrays)
    return out.release("classify", messages.CLASSIFY_REPLY, {"site": site.name}, arrays)


def keep(site: Site, request: Unpacked) -> RecordDict:
    """Keep the server's findings, completed with what only this site may know."""
    own_report(site, report_folder(site, request.values["run_id"]), request.values["findings"])
    return reply(messages.KEEP_REPLY, {"site": site.name})


ACTIONS = {
    "report_hello": (messages.HELLO, hello),
    "report_measure": (messages.MEASURE, measure),
    "report_counts": (messages.COUNTS, counts),
    "report_moments": (messages.MOMENTS, moments),
    "report_classify": (messages.CLASSIFY, classify),
    "report_keep": (messages.KEEP, keep),
}
"""Flower's query action -> request and what answers it."""


def _asked(site: Site, request: Unpacked) -> tuple[Outgoing, list[Part], Arrays, list[Records]]:
    """Everything that a request about parts needs."""
    values = request.values
    out = Outgoing.of(site, request)
    parts = parts_from_dict(values["parts"], source="the server")
    given = messages.receive(request.weights, None, source="the server")
    table = table_of_run(report_folder(site, values["run_id"]))
    records = [load_records(table, part) for part in parts]
    enough = [out.plan.on or enough_patients(site, own, {}) for own in records]
    # A part that this site did not offer stays empty, whatever the server asks.
    return out, parts, given, [own if good else own.none() for own, good in zip(records, enough, strict=True)]


def _given(given: Mapping[str, npt.NDArray[Any]], index: int, what: str, *, rows: int) -> npt.NDArray[np.float64]:
    array = arrays_of(given, index).get(what)
    if array is None or array.ndim < 1 or len(array) != rows:
        raise DataError(f"The request of part {index} lacks {what} for its {rows} features. Start the report again.")
    return np.asarray(array, dtype=np.float64)


def _standardised(
    records: Records, given: Arrays, index: int, folds: int, seed: int, *, alone: bool
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.intp]]:
    """Standardised vectors of the patients that have every feature, on the server's axes if it sent any; their folds.

    Args:
        alone: nobody's fold depends on who else is here, as noise for one patient needs; else folds are equally large.
    """
    from nnunet_fedharm.differences.cross_validation import deal_folds, fold_alone

    rows = records.values.shape[1]
    standard = sketch.Standard(_given(given, index, "centre", rows=rows), _given(given, index, "scale", rows=rows))
    whole = np.isfinite(records.values).all(1)
    patients = [records.patients[row] for row in np.flatnonzero(whole)]
    vectors = standard.apply(records.values[whole])
    if array_name(index, "axes") in given:
        vectors = (vectors - _given(given, index, "origin", rows=rows)) @ _given(given, index, "axes", rows=rows)
    return vectors, (fold_alone if alone else deal_folds)(patients, folds=folds, seed=seed)


def _versions() -> dict[str, str]:
    found = {"nnunet_fedharm": nnunet_fedharm.__version__}
    for package in ("pyradiomics", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found
