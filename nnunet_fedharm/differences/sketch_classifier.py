"""Site classifier and embedding from moments: the same numbers as pooled ones in the same folds, without a case.

| step | who | what |
|---|---|---|
| 1 | site | mean and scatter of its standardised features |
| 2 | server | principal axes of all sites; at most 20 of them are the classifier's features |
| 3 | site | mean and scatter of each of its folds (whole patients) on these axes |
| 4 | server | for each fold a discriminant from the moments of all other folds |
| 5 | site | predicts the fold that the discriminant has not seen; how often it was taken for which site |

The null is simulated, not permuted: sums over many random relabellings of a dozen patients form equations that can be solved
for single patients. Under the null all sites have one distribution, so the server draws patients from a normal distribution
with the pooled covariance and repeats steps 3 to 5 with the same numbers of patients, folds and axes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import chi2

from nnunet_fedharm.differences.discriminant import Moments, fit_discriminant, merge_moments, moments_of

Numbers = npt.NDArray[np.float64]
Codes = npt.NDArray[np.intp]

ELLIPSE = 0.95
_FLAT = 1e-9


@dataclass(frozen=True)
class Axes:
    """Principal axes of the correlation matrix of all sites together: projected = (x - centre) @ weights.

    Attributes:
        centre: (F,).
        weights: (F, d), in projected standard deviations per unit of x; rows of features that do not vary are 0.
        variances: (d,) of the projected values, descending.
        explained: (d,) share of the total variance.
        spread: (F,) pooled standard deviations; 0 for features that do not vary.
    """

    centre: Numbers
    weights: Numbers
    variances: Numbers
    explained: Numbers
    spread: Numbers

    def project(self, values: Numbers) -> Numbers:
        """(n, d) of (n, F)."""
        projected: Numbers = (np.asarray(values, dtype=np.float64) - self.centre) @ self.weights
        return projected

    def moments(self, moments: Moments) -> Moments:
        """Moments of the projected values."""
        return Moments(moments.n, self.project(moments.mean[None])[0], self.weights.T @ moments.scatter @ self.weights)


def principal_axes(pooled: Moments, dimensions: int) -> Axes:
    """Axes of the largest variance; fewer than asked for where the data have fewer.

    The sign of an axis is such that its largest weight is positive.
    """
    variance = np.maximum(np.diag(pooled.scatter), 0) / max(pooled.n - 1, 1)
    varies = variance > _FLAT
    inverse = np.where(varies, 1 / np.sqrt(np.where(varies, variance, 1)), 0)
    correlation = pooled.scatter / max(pooled.n - 1, 1) * np.outer(inverse, inverse)
    values, vectors = np.linalg.eigh((correlation + correlation.T) / 2)
    order = np.argsort(values)[::-1]
    order = order[values[order] > _FLAT * max(len(values), 1)][: min(dimensions, max(pooled.n - 1, 1))]
    vectors = vectors[:, order]
    signs = np.sign(vectors[np.abs(vectors).argmax(0), np.arange(vectors.shape[1])])
    total = float(np.clip(values, 0, None).sum()) or 1.0
    weights = inverse[:, None] * vectors * signs
    return Axes(pooled.mean, weights, values[order], values[order] / total, np.where(varies, np.sqrt(variance), 0))


def ellipse(moments: Moments) -> tuple[float, float, float, float, float]:
    """(mean x, mean y, semi-axis, semi-axis, angle in degrees) that holds 95% of a normal distribution; two axes or more."""
    covariance = moments.scatter[:2, :2] / max(moments.n - 1, 1)
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    radii = np.sqrt(np.maximum(values, 0) * chi2.ppf(ELLIPSE, 2))
    angle = float(np.degrees(np.arctan2(vectors[1, 1], vectors[0, 1])))
    return float(moments.mean[0]), float(moments.mean[1]), float(radii[1]), float(radii[0]), angle


def folds_of(patients: Sequence[str], folds: int, generator: np.random.Generator) -> Codes:
    """(n,) fold of each volume: whole patients, folds of equal size up to one patient."""
    names = sorted(set(patients))
    order = generator.permutation(len(names))
    fold = {names[index]: position % folds for position, index in enumerate(order)}
    return np.array([fold[patient] for patient in patients], dtype=np.intp)


def fold_moments(projected: Numbers, fold: Codes, folds: int) -> list[Moments]:
    """Moments of each fold of (n, d) values."""
    return [moments_of(projected[fold == index]) for index in range(folds)]


def moments_from_sums(n: float, total: Numbers, products: Numbers) -> Moments:
    """Moments from sums over volumes, which may carry noise: a scatter that is no scatter any more is made the nearest one.

    Args:
        n: volumes; below one there are none.
        total: (F,) sum of x.
        products: (F (F + 1) / 2,) upper triangle of the sum of x x'.
    """
    features = len(total)
    count = round(n)
    if count < 1:
        return Moments(0, np.zeros(features), np.zeros((features, features)))
    square = np.zeros((features, features))
    square[np.triu_indices(features)] = products
    square = square + square.T - np.diag(np.diag(square))
    mean = total / count
    scatter = square - count * np.outer(mean, mean)
    values, vectors = np.linalg.eigh(scatter)
    if values[0] < -1e-9 * max(values[-1], 1.0):
        scatter = (vectors * np.maximum(values, 0)) @ vectors.T
    return Moments(count, mean, scatter)


def fold_models(by_site: Mapping[str, Sequence[Moments]]) -> tuple[Numbers, Numbers]:
    """For each fold the discriminant that was fitted on all others, as one affine map.

    Args:
        by_site: site -> moments of each fold; the same number of folds everywhere.

    Returns:
        Weights (folds, d, sites) and biases (folds, sites); the highest of projected @ weights + bias is the predicted site.

    Raises:
        DataError: a site has no volume outside of some fold.
    """
    folds = len(next(iter(by_site.values())))
    weights, biases = [], []
    for held_out in range(folds):
        training = {
            site: merge_moments([part for index, part in enumerate(parts) if index != held_out])
            for site, parts in by_site.items()
        }
        model = fit_discriminant(training)
        scaled = model.weights / model.scale[:, None]
        weights.append(scaled)
        biases.append(model.bias - model.centre @ scaled)
    return np.stack(weights), np.stack(biases)


def predicted_sites(projected: Numbers, fold: Codes, weights: Numbers, biases: Numbers) -> Codes:
    """(n,) position of the predicted site of each volume, by the model that has not seen its fold."""
    scores = np.einsum("nd,ndk->nk", projected, weights[fold]) + biases[fold]
    return scores.argmax(1)


def importances(weights: Numbers, spread: Numbers) -> Numbers:
    """(F,) root mean square over pairs of sites of the weights' difference, per standard deviation `spread` (F,) of each feature.

    Args:
        weights: (folds, F, sites).
    """
    plain = spread[:, None] * weights.mean(0)
    centred = plain - plain.mean(1, keepdims=True)
    return np.asarray(np.sqrt(2 * (centred**2).sum(1) / max(1, weights.shape[2] - 1)))


def balanced_accuracy(confusion: npt.NDArray[Any]) -> float:
    """Mean over sites of the share recognised, of (K, K) counts: true site, predicted site."""
    sizes = np.maximum(confusion.sum(1), 1e-12)
    return float((np.diag(confusion) / sizes).mean())


def accuracy_interval(confusion: npt.NDArray[Any], sizes: Sequence[int], seed: int) -> tuple[float, float]:
    """95% interval of balanced accuracy: independent beta posteriors (Jeffreys) of each site's share.

    Args:
        confusion: (K, K) counts of volumes.
        sizes: patients of each site, the units; volumes of one patient are not independent.
    """
    share = np.diag(confusion) / np.maximum(confusion.sum(1), 1e-12)
    right = np.clip(share, 0, 1) * np.asarray(sizes)
    drawn = np.random.default_rng(seed).beta(right + 0.5, np.asarray(sizes) - right + 0.5, size=(4000, len(sizes)))
    low, high = np.percentile(drawn.mean(1), [2.5, 97.5])
    return float(low), float(high)


def simulated_null(
    sizes: Sequence[int], variances: Numbers, folds: int, *, simulations: int, generator: np.random.Generator
) -> Numbers:
    """(simulations,) balanced accuracies where all sites are the same.

    Args:
        sizes: patients of each site.
        variances: (d,) of the projected values over all sites, which are uncorrelated.
    """
    scores = np.empty(simulations)
    fold = [np.arange(size) % folds for size in sizes]
    for index in range(simulations):
        drawn = [generator.normal(size=(size, len(variances))) * np.sqrt(variances) for size in sizes]
        parts = {str(site): fold_moments(values, fold[site], folds) for site, values in enumerate(drawn)}
        weights, biases = fold_models(parts)
        rows = [
            np.bincount(predicted_sites(values, fold[site], weights, biases), minlength=len(sizes))
            for site, values in enumerate(drawn)
        ]
        scores[index] = balanced_accuracy(np.array(rows))
    return scores
