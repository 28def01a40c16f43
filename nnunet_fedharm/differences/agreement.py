"""Do features of the same patients agree between sites? Concordance and intraclass correlation.

| symbol | meaning |
|---|---|
| n, k | patients, sites |
| mu, s^2, s_xy | mean, variance and covariance with divisor n, as Lin defines them |
| MSR, MSC, MSE | mean squares of patients (rows), sites (columns) and the rest in a two-way table without repeats |

References:
    Lin, "A concordance correlation coefficient to evaluate reproducibility", Biometrics 1989.
    Shrout, Fleiss, "Intraclass correlations: uses in assessing rater reliability", Psychological Bulletin 1979.
    Koo, Li, "A guideline of selecting and reporting intraclass correlation coefficients", J. Chiropr. Med. 2016 (.75 and
    .9 as the bounds of good and excellent).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_fedharm.errors import ShapeError

Table = npt.NDArray[np.floating[Any]]
Vector = npt.NDArray[np.float64]

GOOD = 0.75
EXCELLENT = 0.9
_FLAT = 1e-24
"""Variance over squared size below which a column is constant up to rounding."""


def concordance(first: Table, second: Table) -> Vector:
    """Lin's concordance correlation coefficient of each feature.

        CCC = 2 s_xy / (s_x^2 + s_y^2 + (mu_x - mu_y)^2)

    Args:
        first: (n, F), a row per patient.
        second: (n, F), the same patients at another site.

    Returns:
        (F,) in [-1, 1]; 1 only for equal values. NaN where a feature is the same constant at both sites.

    Raises:
        ShapeError: the shapes differ.
    """
    if first.shape != second.shape or first.ndim != 2:
        raise ShapeError(f"CCC needs two tables (patients, features) of one shape, got {first.shape}, {second.shape}.")
    x, y = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    covariance = ((x - x.mean(0)) * (y - y.mean(0))).mean(0)
    spread = x.var(0) + y.var(0) + (x.mean(0) - y.mean(0)) ** 2
    return _ratio(2 * covariance, spread, scale=(x**2).mean(0) + (y**2).mean(0))


def intraclass_correlation(values: Table) -> Vector:
    """ICC(2,1) of each feature: two-way random effects, absolute agreement, a single measurement.

        ICC(2,1) = (MSR - MSE) / (MSR + (k - 1) MSE + k (MSC - MSE) / n)

    Args:
        values: (n, k, F), patients x sites x features, complete.

    Returns:
        (F,); NaN where a feature is constant.

    Raises:
        ShapeError: not three axes, or fewer than two patients or sites.
    """
    if values.ndim != 3 or min(values.shape[:2]) < 2:
        raise ShapeError(f"ICC(2,1) needs (patients >= 2, sites >= 2, features), got {values.shape}.")
    x = np.asarray(values, dtype=np.float64)
    n, k = x.shape[:2]
    grand = x.mean((0, 1))
    rows, columns = x.mean(1) - grand, x.mean(0) - grand
    rest = x - grand - rows[:, None] - columns[None]
    between_patients = k * (rows**2).sum(0) / (n - 1)
    between_sites = n * (columns**2).sum(0) / (k - 1)
    error = (rest**2).sum((0, 1)) / ((n - 1) * (k - 1))
    denominator = between_patients + (k - 1) * error + k * (between_sites - error) / n
    return _ratio(between_patients - error, denominator, scale=(x**2).mean((0, 1)))


def share_at_least(values: Vector, bound: float) -> float:
    """Share of the features that reach a bound, among those that are defined; NaN if none is."""
    defined = values[~np.isnan(values)]
    return float(np.mean(defined >= bound)) if defined.size else float("nan")


def median(values: Vector) -> float:
    """Median of the features that are defined; NaN if none is."""
    defined = values[~np.isnan(values)]
    return float(np.median(defined)) if defined.size else float("nan")


def _ratio(numerator: Vector, denominator: Vector, *, scale: Vector) -> Vector:
    """numerator / denominator; NaN where the denominator is zero up to rounding at this scale."""
    flat = np.abs(denominator) <= _FLAT * scale
    return np.where(flat, np.nan, numerator / np.where(flat, 1.0, denominator))
