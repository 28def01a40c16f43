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
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedGroupKFold

from nnunet_fedharm.errors import DataError

Features = npt.NDArray[np.floating[Any]]
Codes = npt.NDArray[np.intp]

FOLDS = 5
TREES = 50
PERMUTATIONS = 100


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
    themselves where patients travelled; where every patient has one site, sites are shuffled among patients.

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
    codes = np.unique(np.asarray(sites), return_inverse=True)[1]
    groups = np.unique(np.asarray(patients), return_inverse=True)[1]
    usable = np.asarray(features, dtype=np.float64)[:, np.isfinite(features).all(0)]
    folds = _folds(usable, codes, groups)
    generator = np.random.default_rng(seed)

    def accuracy(labels: Codes) -> float:
        score = _cross_validate(usable, labels, groups, folds, trees, seed)
        tick()
        return score

    observed = accuracy(codes)
    null = np.array([accuracy(permute_sites(codes, groups, generator)) for _ in range(permutations)])
    return SiteAccuracy(
        balanced_accuracy=observed,
        null_mean=float(null.mean()) if null.size else float("nan"),
        null_high=float(np.percentile(null, 95)) if null.size else float("nan"),
        p_value=(1 + int((null >= observed - 1e-12).sum())) / (1 + permutations) if null.size else float("nan"),
        n_volumes=len(codes),
        n_patients=int(groups.max()) + 1,
        n_sites=int(codes.max()) + 1,
    )


def permute_sites(sites: Codes, patients: Codes, generator: np.random.Generator) -> Codes:
    """Sites as they could be if the site left no mark.

    Args:
        sites: of each volume.
        patients: of each volume; numbered from 0.
        generator: source of randomness.

    Returns:
        Same shape: shuffled within each patient if any patient has several sites, else among the patients.
    """
    members = [np.flatnonzero(patients == patient) for patient in range(int(patients.max()) + 1)]
    shuffled = sites.copy()
    if all(len(set(sites[rows].tolist())) == 1 for rows in members):
        order = generator.permutation(len(members))
        for rows, source in zip(members, order, strict=True):
            shuffled[rows] = sites[members[source][0]]
        return shuffled
    for rows in members:
        shuffled[rows] = generator.permutation(sites[rows])
    return shuffled


def _folds(features: Features, sites: Codes, patients: Codes) -> int:
    if sites.max() < 1:
        raise DataError("A site classifier needs at least two sites. Give --sites or sites in the pairs file.")
    counts = [len(set(patients[sites == site].tolist())) for site in range(int(sites.max()) + 1)]
    if min(counts) < 2:
        raise DataError("A site classifier needs at least two patients at every site. Add volumes or leave it out.")
    if features.shape[1] == 0:
        raise DataError("No feature is finite for every volume, so sites cannot be classified.")
    return min(FOLDS, min(counts))


def _cross_validate(features: Features, sites: Codes, patients: Codes, folds: int, trees: int, seed: int) -> float:
    """Balanced accuracy of the pooled out-of-fold predictions."""
    predicted = np.zeros_like(sites)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    for train, test in splitter.split(features, sites, patients):
        if not len(test):
            continue
        forest = RandomForestClassifier(trees, class_weight="balanced", random_state=seed, n_jobs=1)
        predicted[test] = forest.fit(features[train], sites[train]).predict(features[test])
    return float(balanced_accuracy_score(sites, predicted))
