"""Harmonization quality over patients and sites: means, agreement of features, site classifier, lesions.

Every number of a site has a 95% interval from a bootstrap over patients; before and after share the draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_fedharm.differences.agreement import (
    EXCELLENT,
    GOOD,
    concordance,
    intraclass_correlation,
    median,
    share_at_least,
)
from nnunet_fedharm.differences.site_classifier import PERMUTATIONS, TREES, site_accuracy
from nnunet_fedharm.errors import DataError
from nnunet_fedharm.evaluation.paired_files import ONE_SITE
from nnunet_fedharm.evaluation.quality import PairQuality
from nnunet_fedharm.evaluation.resampling import Values, compare, nanmean

Vector = npt.NDArray[np.float64]
RATIOS = ("cnr_over_truth", "cnr_over_input")
"""Summarized by the median: a truth with hardly any contrast makes a huge ratio."""


def by_site(found: Sequence[PairQuality]) -> dict[str, list[PairQuality]]:
    """Site -> its pairs."""
    sites: dict[str, list[PairQuality]] = {}
    for item in found:
        sites.setdefault(item.pair.site, []).append(item)
    return sites


def with_pool(found: Sequence[PairQuality]) -> dict[str, list[PairQuality]]:
    """Site -> its pairs, with "all" pooling the sites where there are several."""
    sites = by_site(found)
    return sites if len(sites) == 1 else {**sites, ONE_SITE: list(found)}


def summarize_metrics(found: Sequence[PairQuality], *, seed: int) -> dict[str, Any]:
    """Site -> channel -> metric -> before, after, change (value, low, high) and n; means, medians for RATIOS.

    A patient who was seen at several sites counts once under "all", with the mean over the sites.
    """
    summary: dict[str, Any] = {}
    for site, items in with_pool(found).items():
        summary[site] = {}
        for channel, names in items[0].metrics.items():
            summary[site][channel] = {
                name: compare(
                    *_per_patient(items, channel, name),
                    nanmedian if name in RATIOS else nanmean,
                    seed=seed,
                    stream=f"{site}/{channel}/{name}",
                ).to_dict()
                for name in names
            }
    return summary


def summarize_features(found: Sequence[PairQuality], *, seed: int) -> dict[str, Any] | None:
    """Agreement of features with the truth by site (CCC), and between all sites and the truth (ICC).

    Returns:
        `names`; `sites`: site (with two patients or more) -> statistic -> before, after, change, n; `icc`: the same for
        the patients seen at every site, or None if there are fewer than two; `per_feature`: name -> "ccc SITE", "icc"
        -> before and after. None without features.
    """
    usable = [item for item in found if item.features]
    if not usable:
        return None
    names = sorted(usable[0].features["truth"])
    tables = {site: _tables(items, names) for site, items in by_site(usable).items() if len(items) > 1}
    complete = _complete_tables(usable, names)
    return {
        "names": names,
        "sites": {site: _agreement(pair, _ccc, seed=seed, stream=f"ccc/{site}") for site, pair in tables.items()},
        "icc": None if complete is None else _agreement(complete, intraclass_correlation, seed=seed, stream="icc"),
        "per_feature": _per_feature(names, tables, complete),
    }


def summarize_classifier(
    found: Sequence[PairQuality],
    *,
    reference_site: str,
    seed: int,
    permutations: int = PERMUTATIONS,
    trees: int = TREES,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, Any] | None:
    """Accuracy of a site classifier before and after; the truths stand for the reference site.

    Returns:
        `before` and `after` as SiteAccuracy, or `skipped` with the reason; None without features.
    """
    usable = [item for item in found if item.features]
    if not usable:
        return None
    names = sorted(usable[0].features["truth"])
    truths = {item.pair.reference: item for item in usable}
    if any(item.pair.site == reference_site for item in usable):
        truths = {}  # the reference site's own volumes are among the pairs
    sites = [item.pair.site for item in usable] + [reference_site] * len(truths)
    patients = [item.pair.reference for item in usable] + list(truths)
    summary: dict[str, Any] = {}
    for state in ("before", "after"):
        rows = [_vector(item, state, names) for item in usable] + [
            _vector(item, "truth", names) for item in truths.values()
        ]
        try:
            accuracy = site_accuracy(
                np.stack(rows), sites, patients, seed=seed, permutations=permutations, trees=trees, tick=tick
            )
        except DataError as error:
            return {"skipped": str(error)}
        summary[state] = accuracy.to_dict()
    return summary


def summarize_lesions(found: Sequence[PairQuality], *, seed: int) -> dict[str, Any] | None:
    """Site -> lesion_recall, false_lesions (per volume), false_lesions_on_lesion_free (per volume without lesions).

    Recall pools the lesions of the site's patients. None without predictions.
    """
    usable = [item for item in found if item.lesions is not None]
    if not usable:
        return None
    summary: dict[str, Any] = {}
    for site, items in with_pool(usable).items():
        before, after = _lesion_counts(items)
        summary[site] = {
            "n_lesions": int(before[:, 0].sum()),
            "lesion_recall": compare(before, after, _recall, seed=seed, stream=f"{site}/recall").to_dict(),
            "false_lesions": compare(before, after, _false, seed=seed, stream=f"{site}/false").to_dict(),
            "false_lesions_on_lesion_free": compare(
                before, after, _false_on_free, seed=seed, stream=f"{site}/false on free"
            ).to_dict(),
        }
    return summary


def nanmedian(values: Values) -> float:
    """Median of what is a number; NaN if nothing is."""
    counted = values[np.isfinite(values)]
    return float(np.median(counted)) if counted.size else float("nan")


def _per_patient(items: Sequence[PairQuality], channel: str, metric: str) -> tuple[Vector, Vector]:
    """(patients,) before and after; a patient's mean over the items."""
    values: dict[str, list[tuple[float, float]]] = {}
    for item in items:
        values.setdefault(item.pair.reference, []).append(item.metrics[channel][metric])
    means = np.array([[nanmean(np.array(column)) for column in zip(*rows, strict=True)] for rows in values.values()])
    return means[:, 0], means[:, 1]


def _ccc(table: Values) -> Vector:
    """Concordance of (patients, 2, features)."""
    return concordance(table[:, 0], table[:, 1])


def _agreement(
    pair: tuple[Vector, Vector], coefficient: Callable[[Values], Vector], *, seed: int, stream: str
) -> dict[str, Any]:
    """Median and shares >= .75 and >= .9 over features, of (patients, sites, features) before and after."""
    statistics: dict[str, Callable[[Vector], float]] = {
        "median": median,
        "share_good": partial(share_at_least, bound=GOOD),
        "share_excellent": partial(share_at_least, bound=EXCELLENT),
    }
    return {
        name: compare(*pair, partial(_composed, of, coefficient), seed=seed, stream=stream).to_dict()
        for name, of in statistics.items()
    }


def _composed(outer: Callable[[Vector], float], inner: Callable[[Values], Vector], table: Values) -> float:
    return outer(inner(table))


def _tables(items: Sequence[PairQuality], names: Sequence[str]) -> tuple[Vector, Vector]:
    """(patients, 2, features): truth beside before, and truth beside after."""
    before, after = (
        np.stack([np.stack([_vector(item, name, names) for name in ("truth", state)]) for item in items])
        for state in ("before", "after")
    )
    return before, after


def _complete_tables(found: Sequence[PairQuality], names: Sequence[str]) -> tuple[Vector, Vector] | None:
    """(patients, 1 + sites, features) of the patients seen at every site, truth first."""
    sites = sorted({item.pair.site for item in found})
    seen: dict[str, dict[str, PairQuality]] = {}
    for item in found:
        seen.setdefault(item.pair.reference, {})[item.pair.site] = item
    complete = [row for row in seen.values() if len(row) == len(sites)]
    if len(complete) < 2:
        return None
    before, after = (
        np.stack(
            [
                np.stack(
                    [_vector(row[sites[0]], "truth", names), *(_vector(row[site], state, names) for site in sites)]
                )
                for row in complete
            ]
        )
        for state in ("before", "after")
    )
    return before, after


def _per_feature(
    names: Sequence[str], tables: dict[str, tuple[Vector, Vector]], complete: tuple[Vector, Vector] | None
) -> dict[str, Any]:
    columns = {f"ccc {site}": (_ccc(pair[0]), _ccc(pair[1])) for site, pair in tables.items()}
    if complete is not None:
        columns["icc"] = intraclass_correlation(complete[0]), intraclass_correlation(complete[1])
    return {
        name: {
            column: {"before": _finite(before[index]), "after": _finite(after[index])}
            for column, (before, after) in columns.items()
        }
        for index, name in enumerate(names)
    }


def _vector(item: PairQuality, state: str, names: Sequence[str]) -> Vector:
    return np.array([item.features[state][name] for name in names])


def _lesion_counts(items: Sequence[PairQuality]) -> tuple[Vector, Vector]:
    """(patients, 6) before and after: lesions, found, false, volumes, false on lesion-free volumes, such volumes."""
    sums: dict[str, Vector] = {}
    for item in items:
        row = np.array(
            [
                (count.lesions, count.found, count.false_lesions, 1, count.false_lesions * free, free)
                for count in item.lesions or ()
                for free in [int(count.lesions == 0)]
            ],
            dtype=np.float64,
        )
        sums[item.pair.reference] = sums.get(item.pair.reference, np.zeros_like(row)) + row
    stacked = np.stack(list(sums.values()))
    return stacked[:, 0], stacked[:, 1]


def _share(counts: Values, part: int, whole: int) -> float:
    total = float(counts[:, whole].sum())
    return float(counts[:, part].sum()) / total if total else float("nan")


_recall = partial(_share, part=1, whole=0)
_false = partial(_share, part=2, whole=3)
_false_on_free = partial(_share, part=4, whole=5)


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
