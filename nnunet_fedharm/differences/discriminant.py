"""Linear discriminant analysis from moments of each class, so that pooled and federated classifiers are one function.

| symbol | meaning |
|---|---|
| n_c, m_c, S_c | volumes of class c, their mean, their scatter sum (x - m_c)(x - m_c)' |
| W | pooled covariance within classes, sum S_c / (n - k), of features scaled by their total standard deviation |
| r | shrinkage: W_r = (1 - r) W + r tr(W) / F I |

A class c has the score x' W_r^-1 m_c - m_c' W_r^-1 m_c / 2; all classes have the same prior, as balanced accuracy has.

References:
    Fisher, "The use of multiple measurements in taxonomic problems", Annals of Eugenics 1936.
    Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    Chen, Wiesel, Eldar, Hero, "Shrinkage algorithms for MMSE covariance estimation", IEEE TSP 2010 (OAS, which needs
    no more than W; without its 2 / F, as in scikit-learn).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_fedharm.errors import DataError, ShapeError

Table = npt.NDArray[np.floating[Any]]
Vector = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float64]

_FLAT = 1e-12
"""Standard deviation over largest absolute mean below which a feature is constant up to rounding."""


@dataclass(frozen=True)
class Moments:
    """What a classifier needs to know of one class.

    Attributes:
        n: volumes.
        mean: (F,); zeros for n = 0.
        scatter: (F, F), sum over volumes of (x - mean)(x - mean)'.
    """

    n: int
    mean: Vector
    scatter: Matrix

    def __post_init__(self) -> None:
        features = len(self.mean)
        if self.mean.ndim != 1 or self.scatter.shape != (features, features):
            raise ShapeError(f"Moments of mean {self.mean.shape} and scatter {self.scatter.shape} do not fit together.")


def moments_of(values: Table) -> Moments:
    """Moments of (n, F) finite values; n may be 0.

    Raises:
        ShapeError: not two axes.
        DataError: a value is not finite.
    """
    if values.ndim != 2:
        raise ShapeError(f"Moments need a table (volumes, features), got {values.shape}.")
    x = np.asarray(values, dtype=np.float64)
    if not np.isfinite(x).all():
        raise DataError("Moments need finite values. Leave out features that do not exist for every volume.")
    if len(x) == 0:
        return Moments(0, np.zeros(x.shape[1]), np.zeros((x.shape[1], x.shape[1])))
    mean = x.mean(0)
    centred = x - mean
    return Moments(len(x), mean, centred.T @ centred)


def merge_moments(parts: Sequence[Moments]) -> Moments:
    """Moments of all volumes together, by the pairwise formula.

    Raises:
        DataError: no part is given.
        ShapeError: parts with different numbers of features.
    """
    if not parts:
        raise DataError("No moments to merge. Give those of at least one class or site.")
    if len({len(part.mean) for part in parts}) > 1:
        raise ShapeError(f"Moments with {[len(part.mean) for part in parts]} features cannot be merged.")
    n = sum(part.n for part in parts)
    if n == 0:
        return parts[0]
    mean = np.sum([part.n * part.mean for part in parts], axis=0) / n
    scatter = np.sum([part.scatter for part in parts], axis=0)
    shifts = np.array([np.sqrt(part.n) * (part.mean - mean) for part in parts])
    return Moments(n, mean, scatter + shifts.T @ shifts)


@dataclass(frozen=True)
class Discriminant:
    """A fitted classifier: scores = ((x - centre) / scale) @ weights + bias.

    Attributes:
        classes: k names.
        centre, scale: (F,); scale is infinite for a constant feature, which so has no say.
        weights, bias: (F, k), (k,).
        shrinkage: r that was used.
    """

    classes: tuple[str, ...]
    centre: Vector
    scale: Vector
    weights: Matrix
    bias: Vector
    shrinkage: float

    def scores(self, values: Table) -> Matrix:
        """(n, k) discriminant scores of (n, F) values."""
        scores: Matrix = (np.asarray(values, dtype=np.float64) - self.centre) / self.scale @ self.weights + self.bias
        return scores

    def predict(self, values: Table) -> npt.NDArray[np.intp]:
        """(n,) position in `classes` of the highest score."""
        return self.scores(values).argmax(1)

    def importances(self) -> Vector:
        """(F,) root mean square over pairs of classes of the difference of weights, per total standard deviation."""
        centred = self.weights - self.weights.mean(1, keepdims=True)
        importances: Vector = np.sqrt(2 * (centred**2).sum(1) / max(1, len(self.classes) - 1))
        return importances


def fit_discriminant(by_class: Mapping[str, Moments], *, shrinkage: float | None = None) -> Discriminant:
    """Classifier from the moments of each class.

    Args:
        by_class: name -> moments; classes without volumes are left out.
        shrinkage: r in [0, 1]; None for the oracle approximating one (OAS) with n - k degrees of freedom.

    Raises:
        DataError: fewer than two classes with volumes, no class with two volumes, every feature constant, or a
            shrinkage outside [0, 1].
    """
    present = {name: moments for name, moments in by_class.items() if moments.n}
    if len(present) < 2:
        raise DataError(f"A discriminant needs two classes with volumes, got {len(present)}.")
    if shrinkage is not None and not 0 <= shrinkage <= 1:
        raise DataError(f"Shrinkage is a share in [0, 1], got {shrinkage}.")
    total = merge_moments(list(present.values()))
    freedom = total.n - len(present)
    if freedom < 1:
        raise DataError("A discriminant needs a class with two volumes: without them nothing is known of the spread.")
    scale = _scale(total, present.values())
    used = np.isfinite(scale)
    if not used.any():
        raise DataError("Every feature is constant, so there is nothing to tell classes by.")
    inside = scale[used]
    within = np.sum([part.scatter for part in present.values()], axis=0)[np.ix_(used, used)]
    covariance = within / np.outer(inside, inside) / freedom
    amount = oas_shrinkage(covariance, freedom) if shrinkage is None else shrinkage
    means = np.array([(part.mean[used] - total.mean[used]) / inside for part in present.values()])
    solved = _solve(covariance, amount, means.T)
    weights = np.zeros((len(scale), len(present)))
    weights[used] = solved
    return Discriminant(tuple(present), total.mean, scale, weights, -0.5 * (means.T * solved).sum(0), amount)


def oas_shrinkage(covariance: Matrix, n: int) -> float:
    """Oracle approximating shrinkage of an empirical covariance (F, F) from n degrees of freedom, in [0, 1].

    r = (a + u^2) / ((n + 1)(a - u^2 / F)), a = mean of squared entries, u = tr / F.
    """
    features = len(covariance)
    mean_square, mean_variance = float((covariance**2).mean()), float(np.trace(covariance)) / features
    spread = (n + 1) * (mean_square - mean_variance**2 / features)
    return 1.0 if spread <= 0 else min(1.0, (mean_square + mean_variance**2) / spread)


def _scale(total: Moments, parts: Any) -> Vector:
    """(F,) total standard deviation; infinite where a feature is constant up to rounding."""
    deviation = np.sqrt(np.diag(total.scatter) / total.n)
    size = np.max([np.abs(part.mean) for part in parts], axis=0)
    return np.where(deviation > _FLAT * size, deviation, np.inf)


def _solve(covariance: Matrix, shrinkage: float, right: Matrix) -> Matrix:
    """W_r^-1 right; W_r = I where nothing varies within classes, its pseudo-inverse where r = 0 leaves it singular."""
    features = len(covariance)
    size = float(np.trace(covariance)) / features
    if size == 0:
        return right
    shrunk = (1 - shrinkage) * covariance + shrinkage * size * np.eye(features)
    try:
        solved = np.asarray(np.linalg.solve(shrunk, right), dtype=np.float64)
    except np.linalg.LinAlgError:
        solved = np.asarray(np.linalg.pinv(shrunk, hermitian=True) @ right, dtype=np.float64)
    return solved
