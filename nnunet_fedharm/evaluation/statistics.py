"""Means over cases with bootstrap intervals.

References:
    Efron, Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13 (percentile interval).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """Mean over cases and its 95% interval.

    Attributes:
        mean: over the cases that count; NaN if none does.
        low, high: 2.5% and 97.5% percentiles of the resampled means; NaN with fewer than two cases.
        n: cases that count.
    """

    mean: float
    low: float
    high: float
    n: int

    def to_dict(self) -> dict[str, Any]:
        """JSON form; NaN becomes null, which JSON can say."""
        return {"mean": _number(self.mean), "low": _number(self.low), "high": _number(self.high), "n": self.n}


def bootstrap_mean(values: Sequence[float], *, seed: int, stream: str = "", resamples: int = RESAMPLES) -> Interval:
    """Mean and percentile bootstrap interval, resampling cases with replacement.

    Args:
        values: one number per case; NaN means that the case does not count.
        seed: of the whole evaluation.
        stream: name of this number (site, label, metric), so that no interval depends on the order of evaluation.
        resamples: bootstrap samples.
    """
    counted = np.asarray([value for value in values if not math.isnan(value)], dtype=np.float64)
    if counted.size == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = float(counted.mean())
    if counted.size == 1:
        return Interval(mean, math.nan, math.nan, 1)
    generator = np.random.default_rng([seed, zlib.crc32(stream.encode())])
    means = counted[generator.integers(0, counted.size, size=(resamples, counted.size))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(mean, float(low), float(high), int(counted.size))


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
