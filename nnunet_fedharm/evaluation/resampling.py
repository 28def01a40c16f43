"""Before, after and their difference with one bootstrap over patients.

A patient who was seen at several sites is drawn or left out with all volumes, and before and after use the same draws, so
the interval of the difference is that of paired data.

References:
    Efron, Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13 (percentile interval).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_fedharm.errors import ShapeError

Values = npt.NDArray[np.floating[Any]]
Statistic = Callable[[Values], float]
"""Array with patients along its first axis -> a number, which may be NaN."""

RESAMPLES = 1000


@dataclass(frozen=True)
class Estimate:
    """A number and its 95% interval.

    Attributes:
        value: NaN if it is not defined for these patients.
        low, high: 2.5% and 97.5% percentiles over the draws that define it; NaN with fewer than two patients.
    """

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float | None]:
        """JSON form; what is not finite becomes null."""
        return {name: value if math.isfinite(value) else None for name, value in vars(self).items()}


@dataclass(frozen=True)
class Comparison:
    """One statistic before and after harmonization.

    Attributes:
        change: after - before, with the interval of the paired difference.
        n: patients.
    """

    before: Estimate
    after: Estimate
    change: Estimate
    n: int

    def to_dict(self) -> dict[str, Any]:
        parts = {name: getattr(self, name).to_dict() for name in ("before", "after", "change")}
        return {**parts, "n": self.n}


def compare(
    before: Values, after: Values, statistic: Statistic, *, seed: int, stream: str, resamples: int = RESAMPLES
) -> Comparison:
    """A statistic of the same patients before and after, with paired bootstrap intervals.

    Args:
        before: (n, ...), patients first.
        after: same shape.
        statistic: see `Statistic`.
        seed: of the whole evaluation.
        stream: name of this number, so that no interval depends on the order of evaluation.
        resamples: bootstrap draws.

    Raises:
        ShapeError: the shapes differ.
    """
    if before.shape != after.shape:
        raise ShapeError(f"Before {before.shape} and after {after.shape} have different shapes.")
    n = len(before)
    point = [statistic(before), statistic(after)] if n else [math.nan, math.nan]
    draws = np.full((resamples if n > 1 else 0, 2), np.nan)
    generator = np.random.default_rng([seed, zlib.crc32(stream.encode())])
    for row in draws:
        chosen = generator.integers(0, n, size=n)
        row[:] = statistic(before[chosen]), statistic(after[chosen])
    return Comparison(
        _estimate(point[0], draws[:, 0]),
        _estimate(point[1], draws[:, 1]),
        _estimate(_difference(*point), draws[:, 1] - draws[:, 0]),
        n,
    )


def nanmean(values: Values) -> float:
    """Mean of what is a number; NaN if nothing is. The statistic of per-patient metrics."""
    counted = values[np.isfinite(values)]
    return float(counted.mean()) if counted.size else math.nan


def _difference(before: float, after: float) -> float:
    return after - before if math.isfinite(before) and math.isfinite(after) else math.nan


def _estimate(value: float, draws: Values) -> Estimate:
    defined = draws[np.isfinite(draws)]
    if defined.size == 0 or math.isnan(value):
        return Estimate(value, math.nan, math.nan)
    low, high = np.percentile(defined, [2.5, 97.5])
    return Estimate(value, float(low), float(high))
