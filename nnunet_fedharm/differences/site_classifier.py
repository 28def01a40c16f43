"""Can a freshly trained classifier still tell the site? Balanced accuracy against its permutation null.

Fooling one fixed classifier proves nothing, so the classifier is trained anew on the images that it judges. A harmonized
federation is at the null, which with few patients need not be 1 / sites. A low accuracy alone is no proof of quality
either: a blank image fools every classifier.

References:
    Breiman, "Random Forests", Machine Learning 2001.
    Phipson, Smyth, "Permutation p-values should never be zero", Stat. Appl. Genet. Mol. Biol. 2010.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.ensemble import RandomForestClassifier

from nnunet_fedharm.differences.cross_validation import (
    Codes,
    Predict,
    accuracy_interval,
    balanced_accuracy,
    confusion,
    null_of,
    out_of_fold,
    permute_sites,
    priorities,
    stratified_folds,
)
from nnunet_fedharm.differences.discriminant import fit_discriminant, moments_of
from nnunet_fedharm.differences.findings import ClassifierFinding
from nnunet_fedharm.differences.options import StatisticsOptions
from nnunet_fedharm.differences.panel import Panel
from nnunet_fedharm.errors import DataError

Features = npt.NDArray[np.floating[Any]]

FOREST, DISCRIMINANT = "random forest on features", "linear discriminant on features"
FOLDS = 5
TREES = 50
PERMUTATIONS = 100
IMPORTANCE_TREES = 5
"""Times as many trees rank features, in one forest on all volumes: a ranking needs more of them than an accuracy."""
TOP = 10
"""Features that a classifier lists."""


def forest(values: Features, *, trees: int, seed: int) -> Predict:
    """Random forest on rows of (n, F) values, classes weighted to equal say."""

    def predict(train: Codes, sites: Codes, test: Codes) -> Codes:
        model = RandomForestClassifier(trees, class_weight="balanced", random_state=seed, n_jobs=1)
        predicted: Codes = model.fit(values[train], sites).predict(values[test])
        return predicted

    return predict


def discriminant(values: Features) -> Predict:
    """Linear discriminant on rows of (n, F) values."""

    def predict(train: Codes, sites: Codes, test: Codes) -> Codes:
        known = np.unique(sites)
        model = fit_discriminant({str(code): moments_of(values[train[sites == code]]) for code in known})
        predicted: Codes = known[model.predict(values[test])]
        return predicted

    return predict


def forest_importances(values: Features, sites: Codes, *, trees: int, seed: int) -> npt.NDArray[np.float64]:
    """(F,) mean decrease of impurity in a forest on all rows; sums to 1, shared out among features that say the same."""
    model = RandomForestClassifier(IMPORTANCE_TREES * trees, class_weight="balanced", random_state=seed, n_jobs=1)
    importances: npt.NDArray[np.float64] = model.fit(values, sites).feature_importances_
    return importances


def top_features(names: Sequence[str], importances: npt.NDArray[np.float64]) -> list[tuple[str, float]]:
    """The most important features; equal ones by name."""
    order = sorted(range(len(names)), key=lambda index: (-importances[index], names[index]))
    return [(names[index], float(importances[index])) for index in order[:TOP]]


def classify(
    predict: Predict,
    panel: Panel,
    *,
    method: str,
    permutations: int,
    options: StatisticsOptions,
    purpose: str,
    blocks: Codes | None = None,
    features: Sequence[tuple[str, float]] = (),
    tick: Callable[[], object] = lambda: None,
) -> ClassifierFinding:
    """Cross-validated accuracy of a classifier of sites, its interval by patient and its permutation null.

    Folds are dealt anew for permuted sites, so the null is that of the whole procedure.

    Args:
        predict: classifier of rows of the panel.
        panel: volumes; every site needs two patients (in every block).
        method: as it stands in the report.
        permutations: size of the null; 0 for none.
        options: seed, folds and draws of the interval.
        purpose: of the random draws.
        blocks: (n,) rows that are cross-validated apart; None for one.
        features: most important ones.
        tick: called after each of the 1 + permutations cross-validations.
    """
    order = priorities(panel.patients, options.seed)

    def predictions(codes: Codes) -> Codes:
        folds = stratified_folds(codes, panel.groups, order, options.folds)
        predicted = out_of_fold(predict, codes, folds, blocks)
        tick()
        return predicted

    predicted = predictions(panel.codes)
    null = []
    generator = options.generator(purpose, "permutations")
    for _ in range(permutations):
        codes = permute_in_blocks(panel.codes, panel.groups, blocks, generator)
        null.append(float(balanced_accuracy(codes, predictions(codes))))
    accuracy = accuracy_interval(
        panel.codes,
        predicted,
        panel.groups,
        resamples=options.bootstrap,
        generator=options.generator(purpose, "interval"),
    )
    chance = null_of(float(balanced_accuracy(panel.codes, predicted)), null)
    return ClassifierFinding(
        method=method,
        accuracy=accuracy,
        chance=1 / len(panel.sites),
        null_mean=chance.mean,
        null_high=chance.high,
        p=chance.p,
        permutations=permutations,
        confusion=confusion(panel.codes, predicted, panel.sites),
        n=len(panel.codes),
        features=list(features),
    )


def permute_in_blocks(sites: Codes, patients: Codes, blocks: Codes | None, generator: np.random.Generator) -> Codes:
    """`permute_sites` inside each block of rows."""
    if blocks is None:
        return permute_sites(sites, patients, generator)
    shuffled = sites.copy()
    for block in np.unique(blocks):
        rows = np.flatnonzero(blocks == block)
        own = np.unique(patients[rows], return_inverse=True)[1].reshape(-1)
        shuffled[rows] = permute_sites(sites[rows], own, generator)
    return shuffled


@dataclass(frozen=True)
class SiteAccuracy:
    """How well sites are told apart.

    Attributes:
        balanced_accuracy: mean over sites of the share of volumes recognised, out of fold.
        null_mean, null_high: mean and 95th percentile of the same number with permuted sites.
        p_value: (1 + permutations at least as accurate) / (1 + permutations); NaN like the null without permutations.
        n_volumes, n_patients, n_sites: what it was computed from.
    """

    balanced_accuracy: float
    null_mean: float
    null_high: float
    p_value: float
    n_volumes: int
    n_patients: int
    n_sites: int

    def to_dict(self) -> dict[str, Any]:
        """JSON form; what is not finite becomes null."""
        return {name: value if np.isfinite(value) else None for name, value in vars(self).items()}


def site_accuracy(
    features: Features,
    sites: Sequence[str],
    patients: Sequence[str],
    *,
    seed: int,
    permutations: int = PERMUTATIONS,
    trees: int = TREES,
    tick: Callable[[], object] = lambda: None,
) -> SiteAccuracy:
    """Balanced accuracy of a random forest in patient-grouped cross-validation, and its permutation null.

    No patient is in training and test at once. For the null, the sites of a patient's volumes are shuffled among
    themselves where the patient travelled; sites of other patients are shuffled among these.

    Args:
        features: (volumes, F); columns that are not finite everywhere are left out.
        sites: of each volume.
        patients: of each volume.
        seed: of folds, trees and permutations.
        permutations: size of the null.
        trees: of the forest.
        tick: called after each of the 1 + permutations cross-validations, for a progress bar.

    Raises:
        DataError: fewer than two sites, fewer than two patients at a site, or no usable feature.
    """
    names, codes = np.unique(np.asarray(sites), return_inverse=True)
    values = np.asarray(features, dtype=np.float64)
    usable = values[:, np.isfinite(values).all(0)]
    labels = tuple(str(patient) for patient in patients)
    panel = Panel(tuple(map(str, names)), codes, labels, labels, tuple(map(str, range(usable.shape[1]))), usable)
    folds = _check(panel)
    found = classify(
        forest(usable, trees=trees, seed=seed),
        panel,
        method=FOREST,
        permutations=permutations,
        options=StatisticsOptions(seed=seed, bootstrap=0, folds=folds),
        purpose="site accuracy",
        tick=tick,
    )
    numbers = (found.accuracy.value, found.null_mean, found.null_high, found.p)
    accuracy, mean, high, p = (float("nan") if number is None else number for number in numbers)
    return SiteAccuracy(accuracy, mean, high, p, len(codes), len(set(labels)), len(names))


def _check(panel: Panel) -> int:
    """Folds to use."""
    if len(panel.sites) < 2:
        raise DataError("A site classifier needs at least two sites. Give --sites or sites in the pairs file.")
    fewest = int(panel.patients_of_sites().min())
    if fewest < 2:
        raise DataError("A site classifier needs at least two patients at every site. Add volumes or leave it out.")
    if not panel.names:
        raise DataError("No feature is finite for every volume, so sites cannot be classified.")
    return min(FOLDS, fewest)
