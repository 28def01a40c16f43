"""What the statistics of the site report depend on, and the seeds of their random draws."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nnunet_fedharm.errors import DataError

Progress = Callable[[str, float], object]
"""Called with what is being computed and the share of the whole that is done, in [0, 1] and never falling."""

SIGNIFICANT = 0.05
"""Level of p and q below which the report calls a difference significant."""


@dataclass(frozen=True, kw_only=True)
class StatisticsOptions:
    """Sizes of all resampling; the defaults keep one part of 180 volumes and 107 features well under a minute."""

    seed: int = 0
    """Of every draw; the same seed and table give the same numbers, whatever the order of the rows."""
    bootstrap: int = 500
    """Draws of patients behind each interval."""
    permutations: int = 499
    """Permuted sites behind the null of the linear discriminant."""
    mmd_permutations: int = 999
    """Permuted sites behind each p of the maximum mean discrepancy; all use one kernel matrix."""
    trees: int = 30
    """Of a random forest; the null's forests are as large as the observed one."""
    forest_permutations: int = 59
    """Permuted sites behind the null of a forest, so its smallest p is 1/60: a forest costs 200 times a discriminant."""
    slice_permutations: int = 19
    """Permuted sites behind the null of the network on slices, so its smallest p is .05."""
    slice_epochs: int = 30
    """Passes over the training slices."""
    folds: int = 5
    """Of patient-grouped cross-validation."""
    bins: int = 20
    """Of the histograms, on edges common to all sites."""
    outlier: float = 3.5
    """Robust z-score from which a case is listed as unlike the others of its site (Iglewicz and Hoaglin 1993)."""
    outlier_cases: int = 5
    """Fewest cases of a site among which an outlier can be told."""

    def __post_init__(self) -> None:
        for name, least in (("folds", 2), ("bins", 2), ("trees", 1), ("slice_epochs", 1), ("outlier_cases", 3)):
            if getattr(self, name) < least:
                raise DataError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        for name in ("bootstrap", "permutations", "mmd_permutations", "forest_permutations", "slice_permutations"):
            if getattr(self, name) < 0:
                raise DataError(f"{name} cannot be negative, got {getattr(self, name)}. Use 0 to leave it out.")

    def to_dict(self) -> dict[str, Any]:
        """JSON form, for the report's settings."""
        return asdict(self)

    def generator(self, *purpose: str) -> np.random.Generator:
        """Source of randomness of one purpose, so that no number depends on what was computed before it."""
        return np.random.default_rng([self.seed, digest("/".join(purpose))])


def digest(text: str) -> int:
    """The same 64-bit number for the same text, in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
