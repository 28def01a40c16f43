"""Features on one scale, blind to outliers: the same rule as the sketches of a federation, from the values themselves."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nnunet_fedharm.differences.sketch import WINSOR, Standard

Table = npt.NDArray[np.float64]

_NARROW = 0.1
"""Interquartile range over the wide scale below which half of all volumes share nearly one value."""


def standard_of_values(values: Table) -> Standard:
    """Median and normal-consistent interquartile range of each column of (n, F) finite values.

    Where half of all volumes share nearly one value, a quarter of the range of the middle 98% stands in for it.
    """
    if not len(values):
        return Standard(np.zeros(values.shape[1]), np.zeros(values.shape[1]))
    lowest, low, centre, high, highest = np.quantile(values, [0.01, 0.25, 0.5, 0.75, 0.99], axis=0)
    scale, wide = (high - low) / 1.349, (highest - lowest) / WINSOR
    chosen = np.where(scale > _NARROW * wide, scale, wide)
    return Standard(centre, np.where(chosen > 1e-12 * np.abs(values).max(0), chosen, 0.0))
