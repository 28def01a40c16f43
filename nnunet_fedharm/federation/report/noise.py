"""Noise on everything that a site's report sends: Gaussian, calibrated to one patient more or less.

Every number is a sum over patients (a patient with several cases is their mean), and each patient's share is bounded before the
sum by limits that do not depend on the data of any one patient beyond what earlier, noised messages told:

| message | one patient's share | L2 sensitivity |
|---|---|---|
| measure (numbers) | 1 in each of the P parts | sqrt(P) |
| locate | 1 in one cell of each feature | sqrt(sum of features over parts) |
| histograms | the same | the same |
| moments | 1, z and z z' in each part; z cut to the norm 1 | sqrt(3 P) |
| folds | the same in one fold of each part | sqrt(3 P) |
| classify | 1 for one site in each part | sqrt(P) |

A patient's fold follows from their own name alone (`cross_validation.fold_alone`), or one patient more would move all later ones.
z is the standardised, winsorized vector (its place on the principal axes in `folds`) over a `reach` that the server announces:
twice the usual length. Gaussian releases compose exactly: with mu = 1 / sigma(epsilon,
delta, 1), a message that gets the share s of mu^2 has the noise sensitivity / (mu sqrt(s)), and all of them together are
(epsilon, delta)-DP for each patient, however the later questions depend on earlier answers (Dong, Roth, Su, "Gaussian
Differential Privacy", JRSS B 2022, corollary 3.3). Patients of different sites are different people: sites do not add up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_fedharm.errors import FederationError
from nnunet_fedharm.privacy.gaussian import gaussian_sigma

SHARES = {"numbers": 0.05, "locate": 0.20, "histograms": 0.35, "moments": 0.15, "folds": 0.15, "classify": 0.10}
"""Share of mu^2 for each message."""


@dataclass(frozen=True)
class Protection:
    """What lies between a site's sums and the server.

    Attributes:
        epsilon: what the whole report costs each patient; 0 for no noise.
        delta: with epsilon.
        sums: the server gets sums over all sites only.
    """

    epsilon: float = 0.0
    delta: float = 1e-5
    sums: bool = False

    @property
    def on(self) -> bool:
        """Whether there is noise."""
        return self.epsilon > 0

    def multiplier(self, step: str) -> float:
        """Noise over sensitivity of one message; 0 without noise."""
        return gaussian_sigma(self.epsilon, self.delta) / math.sqrt(SHARES[step]) if self.on else 0.0

    def sigma(self, step: str, sensitivity: float) -> float:
        """Standard deviation of the noise on each number of a message; 0 without noise."""
        return self.multiplier(step) * sensitivity

    def to_dict(self) -> dict[str, Any]:
        """JSON form; empty without any."""
        if self.on:
            return {"epsilon": self.epsilon, "delta": self.delta}
        return {"sums": True} if self.sums else {}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Protection:
        """Inverse of `to_dict`.

        Raises:
            FederationError: other keys, or values that are no budget.
        """
        if dict(data) in ({}, {"sums": True}):
            return cls(sums=bool(data))
        if set(data) != {"epsilon", "delta"} or not all(isinstance(value, int | float) for value in data.values()):
            raise FederationError(
                "The protection of the report is damaged; it is an epsilon and a delta, sums, or nothing."
            )
        if not (data["epsilon"] > 0 and 0 < data["delta"] < 1):
            raise FederationError(f"Noise needs epsilon > 0 and 0 < delta < 1, got {dict(data)}.")
        return cls(float(data["epsilon"]), float(data["delta"]))


def sensitivity_of(step: str, features: list[int]) -> float:
    """L2 sensitivity of a message to one patient, in its own units (moments: of z).

    Args:
        step: key of SHARES.
        features: number of features of each part.
    """
    cells, parts = sum(features), len(features)
    squared = {"locate": cells, "histograms": cells, "moments": 3 * parts, "folds": 3 * parts}
    return math.sqrt(squared.get(step, parts))


def reach_of(variance: float) -> float:
    """Norm to which vectors are cut under noise: twice the root of their expected squared length."""
    return 2.0 * math.sqrt(max(variance, 1e-12))


def cut_norm(vectors: npt.NDArray[np.float64], reach: float) -> npt.NDArray[np.float64]:
    """(n, F) vectors, those longer than `reach` shortened to it."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors * np.minimum(1.0, reach / np.maximum(length, 1e-300))


@dataclass
class Noiser:
    """Adds the noise of a plan; its numbers come from a cryptographic stream under a key that nobody else has."""

    plan: Protection
    _source: Any = field(default=None, repr=False)

    def add(self, step: str, sensitivity: float, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The values with noise, of the same dtype; unchanged without a plan."""
        if not self.plan.on:
            return values
        if self._source is None:
            from nnunet_fedharm.privacy.noise import SecureNoise  # imports torch

            self._source = SecureNoise()
        return np.asarray(self._source.hide(values, self.plan.sigma(step, sensitivity)), dtype=values.dtype)
