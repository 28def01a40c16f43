"""Patient-grouped cross-validation whose folds each site can deal for itself, and its permutation null.

A site orders its patients by a seeded hash of their names and deals them to the folds in turn. So folds are stratified by
site, no patient is in training and test at once, and a federation deals the folds of the pooled run without sharing names.

References:
    Phipson, Smyth, "Permutation p-values should never be zero", Stat. Appl. Genet. Mol. Biol. 2010.
    Ojala, Garriga, "Permutation tests for studying classifier performance", JMLR 2010.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_fedharm.differences.findings import Estimate
from nnunet_fedharm.differences.options import digest

Codes = npt.NDArray[np.intp]
Vector = npt.NDArray[np.float64]
Predict = Callable[[Codes, Codes, Codes], Codes]
"""(rows to train on, their sites, rows to predict) -> predicted sites of the latter."""


def priorities(patients: Sequence[str], seed: int | str) -> npt.NDArray[np.uint64]:
    """(n,) seeded hash of each row's patient: the order in which patients are dealt to folds."""
    return np.array([digest(f"{seed}/{patient}") for patient in patients], dtype=np.uint64)


def deal_folds(patients: Sequence[str], *, folds: int, seed: int) -> Codes:
    """(n,) fold of each volume of one site, from 0; sizes differ by at most one patient."""
    return _deal(priorities(patients, seed), folds)


def fold_alone(patients: Sequence[str], *, folds: int, seed: int) -> Codes:
    """(n,) fold of each volume, by the patient's own name alone: one patient more or less moves nobody else."""
    return (priorities(patients, seed) % np.uint64(folds)).astype(np.intp)


def stratified_folds(sites: Codes, patients: Codes, priority: npt.NDArray[np.uint64], folds: int) -> Codes:
    """(n,) fold of each volume of all sites, as `deal_folds` deals them.

    Args:
        sites: (n,) site of each volume.
        patients: (n,) patient of each volume; one of several sites belongs to the first of them.
        priority: (n,) of `priorities`.
        folds: how many.
    """
    first = np.full(int(patients.max(initial=-1)) + 1, np.iinfo(np.intp).max)
    np.minimum.at(first, patients, sites)
    owner = first[patients]
    dealt = np.zeros(len(sites), dtype=np.intp)
    for site in np.unique(owner):
        dealt[owner == site] = _deal(priority[owner == site], folds)
    return dealt


def _deal(priority: npt.NDArray[np.uint64], folds: int) -> Codes:
    position: Codes = np.unique(priority, return_inverse=True)[1].reshape(-1)
    return position % folds


def permute_sites(sites: Codes, patients: Codes, generator: np.random.Generator) -> Codes:
    """Sites as they could be if the site left no mark.

    The sites of a patient who was seen at several are shuffled among that patient's volumes; those of all other patients
    are shuffled among these patients, whose volumes stay together.

    Args:
        sites: (n,) of each volume.
        patients: (n,) of each volume; numbered from 0.
        generator: source of randomness.

    Returns:
        Same shape.
    """
    members = [np.flatnonzero(patients == patient) for patient in range(int(patients.max(initial=-1)) + 1)]
    shuffled = sites.copy()
    single = [rows for rows in members if len(rows) and (sites[rows] == sites[rows[0]]).all()]
    order = generator.permutation(len(single))
    for rows, source in zip(single, order, strict=True):
        shuffled[rows] = sites[single[source][0]]
    for rows in members:
        if len(rows) and (sites[rows] != sites[rows[0]]).any():
            shuffled[rows] = generator.permutation(sites[rows])
    return shuffled


def out_of_fold(predict: Predict, sites: Codes, folds: Codes, blocks: Codes | None = None) -> Codes:
    """(n,) predictions, each from the other folds of the same block.

    Args:
        predict: see `Predict`.
        sites: (n,) what is learnt.
        folds: (n,) of `stratified_folds`.
        blocks: (n,) parts that are cross-validated apart; None for one.
    """
    predicted = np.full(len(sites), -1, dtype=np.intp)
    parts = np.zeros(len(sites), dtype=np.intp) if blocks is None else blocks
    for block in np.unique(parts):
        for fold in np.unique(folds[parts == block]):
            test = np.flatnonzero((parts == block) & (folds == fold))
            train = np.flatnonzero((parts == block) & (folds != fold))
            predicted[test] = predict(train, sites[train], test)
    return predicted


def balanced_accuracy(sites: Codes, predicted: Codes, weights: Vector | None = None) -> Any:
    """Mean over sites of the share of volumes that is recognised.

    Args:
        sites, predicted: (n,).
        weights: (..., n) how often each volume counts; None for once.

    Returns:
        (...) in [0, 1]; sites without weight are left out.
    """
    weight = np.ones(len(sites)) if weights is None else weights
    hits = np.asarray(sites == predicted, dtype=np.float64)
    known = np.unique(sites, return_inverse=True)[1].reshape(-1)
    belongs = np.eye(int(known.max(initial=-1)) + 1)[known]
    total, right = weight @ belongs, (weight * hits) @ belongs
    share = np.where(total > 0, right / np.where(total > 0, total, 1), np.nan)
    return np.nanmean(share, axis=-1)


def confusion(sites: Codes, predicted: Codes, names: Sequence[str]) -> dict[str, dict[str, int]]:
    """True site -> predicted site -> volumes."""
    table = np.zeros((len(names), len(names)), dtype=int)
    np.add.at(table, (sites, predicted), 1)
    return {name: {other: int(table[i, j]) for j, other in enumerate(names)} for i, name in enumerate(names)}


@dataclass(frozen=True)
class Null:
    """Permutation null of an accuracy.

    Attributes:
        mean, high: mean and 95th percentile; None without permutations, like p.
        p: (1 + permutations at least as accurate) / (1 + permutations).
    """

    mean: float | None
    high: float | None
    p: float | None


def null_of(observed: float, permuted: Sequence[float]) -> Null:
    """Where an accuracy stands among those with permuted sites."""
    values = np.asarray(permuted, dtype=np.float64)
    if not values.size:
        return Null(None, None, None)
    as_good = int((values >= observed - 1e-12).sum())
    return Null(float(values.mean()), float(np.percentile(values, 95)), (1 + as_good) / (1 + len(values)))


def accuracy_interval(
    sites: Codes, predicted: Codes, patients: Codes, *, resamples: int, generator: np.random.Generator
) -> Estimate:
    """Balanced accuracy of given out-of-fold predictions, with a percentile interval over patients of each site.

    The interval is that of the judged patients; that another training set would give another classifier is not in it.
    """
    value = float(balanced_accuracy(sites, predicted))
    counts = resample_patients(sites, patients, resamples, generator)
    if not resamples or not len(sites):
        return Estimate(value)
    low, high = np.percentile(balanced_accuracy(sites, predicted, counts), [2.5, 97.5])
    return Estimate(value, float(low), float(high))


def resample_patients(sites: Codes, patients: Codes, resamples: int, generator: np.random.Generator) -> Vector:
    """(resamples, n) how often each volume is drawn: patients with replacement within each site, with all volumes."""
    counts = np.zeros((resamples, len(sites)))
    for site in np.unique(sites):
        rows = np.flatnonzero(sites == site)
        names, member = np.unique(patients[rows], return_inverse=True)
        drawn = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
        counts[:, rows] = drawn[:, member.reshape(-1)]
    return counts
