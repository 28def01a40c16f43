"""Sparse histograms on fixed grids: the same bins at every site, mergeable in any order, bounded in size.

Bins are the floating-point numbers' own: a value is rounded to float32 and all but the first `bits` bits of its mantissa
are cut, so a bin reaches from v to at most v * (1 + 2**-bits), whatever the scale of the data, and no site has to tell its
range first. A grid lists levels from fine to coarse, each level's bins being unions of the bins before; a histogram uses
the finest level at which it has at most `max_bins` bins. Adding brings two histograms to the coarser of their levels.
Because levels are nested, the result does not depend on order or grouping.

Keys are pairs (code, size): `size` is a second, integer coordinate (the number of voxels along an axis), 0 where unused.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_fedharm.errors import PlanError

_MANTISSA = 23  # stored mantissa bits of float32

Key = tuple[int, int]


@dataclass(frozen=True)
class Grid:
    """Bin rules.

    Attributes:
        levels: (mantissa bits kept, step of the integer coordinate), fine to coarse, nested.
        max_bins: bound on the number of bins of one site's histogram; the last level always keeps it.
        smallest, largest: magnitudes are clipped to this range; below `smallest` is zero.
        largest_size: the integer coordinate is clipped to this.
    """

    levels: tuple[tuple[int, int], ...]
    max_bins: int
    smallest: float
    largest: float
    largest_size: int = 0

    def codes(self, values: npt.NDArray[np.floating[Any]], level: int = 0) -> npt.NDArray[np.int64]:
        """Bin codes of values, same shape; ordered like the values."""
        magnitude = np.minimum(np.abs(values), self.largest).astype(np.float32)
        codes = (magnitude.view(np.uint32) >> (_MANTISSA - self.levels[level][0])).astype(np.int64)
        return np.where(magnitude < self.smallest, 0, np.sign(values).astype(np.int64) * codes)

    def interval(self, code: int, level: int) -> tuple[float, float]:
        """Lower and upper edge of a bin; (0, 0) for the bin of zero."""
        if code == 0:
            return 0.0, 0.0
        shift = _MANTISSA - self.levels[level][0]
        # At full precision a bin holds one float32 value only.
        edges = np.array([abs(code) << shift, (abs(code) + (shift > 0)) << shift], dtype=np.uint32).view(np.float32)
        low, high = float(edges[0]), float(edges[1])
        return (low, high) if code > 0 else (-high, -low)

    def centre(self, code: int, level: int) -> float:
        """Middle of a bin; the value itself at full precision."""
        low, high = self.interval(code, level)
        return (low + high) / 2

    def coarser(self, key: Key, level: int, target: int) -> Key:
        """The bin of `target` that holds a bin of `level`."""
        drop = self.levels[level][0] - self.levels[target][0]
        code, size = key
        return (abs(code) >> drop) * (1 if code > 0 else -1), size - size % self.levels[target][1]


GEOMETRY = Grid(
    levels=((23, 1), (12, 1), (10, 1), (8, 2), (7, 4), (6, 8), (5, 16), (4, 32), (3, 64), (1, 256), (0, 1 << 20)),
    max_bins=2048,
    smallest=2.0**-14,
    largest=2.0**14,
    largest_size=(1 << 20) - 1,
)
"""Spacing (mm) and shape (voxels) of one axis, jointly: nnU-Net's median shape at the target spacing needs both. Exact for
float32 spacings (NIfTI's own precision) as long as a site has at most 2048 different pairs; with more, in steps coarser: for
5000 cases that share neither spacing nor shape, medians are within 3 %."""

INTENSITY = Grid(levels=((8, 1), (7, 1), (6, 1), (5, 1)), max_bins=4096, smallest=2.0**-16, largest=2.0**40)
"""Intensities: bins 2**-8 = 0.4 % wide (relative); if the data spans so many decades that 4096 bins do not do, up to 3 %."""


@dataclass(frozen=True)
class Histogram:
    """Weights on a grid's bins.

    Attributes:
        level: index into the grid's levels.
        bins: (code, size) -> weight.
    """

    level: int
    bins: dict[Key, float]

    def to_dict(self) -> dict[str, Any]:
        keys = sorted(self.bins)
        return {
            "level": self.level,
            "codes": [code for code, _ in keys],
            "sizes": [size for _, size in keys] if any(size for _, size in keys) else [],
            "weights": [self.bins[key] for key in keys],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], grid: Grid) -> Histogram:
        """Inverse of `to_dict`.

        Raises:
            PlanError: not a histogram on this grid, or larger than the grid allows.
        """
        try:
            level, codes, weights = int(data["level"]), list(data["codes"]), list(data["weights"])
            sizes = list(data["sizes"]) or [0] * len(codes)
            bins = {(int(code), int(size)): weight for code, size, weight in zip(codes, sizes, weights, strict=True)}
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(
                f"A histogram in a site summary is damaged ({error}). Let the site summarize again."
            ) from error
        if not 0 <= level < len(grid.levels) or not all(np.isfinite(w) and w >= 0 for w in bins.values()):
            raise PlanError(
                "A histogram in a site summary has an unknown level or a weight that is negative or not finite."
            )
        return cls(level, bins)


def build(weights: Mapping[Key, float], grid: Grid) -> Histogram:
    """The finest histogram within the grid's bound, from bins at level 0."""
    histogram = Histogram(0, dict(weights))
    for level in range(1, len(grid.levels)):
        if len(histogram.bins) <= grid.max_bins:
            break
        histogram = at_level(histogram, level, grid)
    return histogram


def at_level(histogram: Histogram, level: int, grid: Grid) -> Histogram:
    """The same weights on coarser bins."""
    if level == histogram.level:
        return histogram
    bins: defaultdict[Key, float] = defaultdict(float)
    for key in sorted(histogram.bins):
        bins[grid.coarser(key, histogram.level, level)] += histogram.bins[key]
    return Histogram(level, dict(bins))


def add(histograms: Iterable[Histogram], grid: Grid) -> Histogram:
    """Sum of histograms at the coarsest level among them; not bounded, for use where all have arrived."""
    parts = list(histograms)
    level = max((part.level for part in parts), default=0)
    bins: defaultdict[Key, float] = defaultdict(float)
    for part in parts:
        for key, weight in at_level(part, level, grid).bins.items():
            bins[key] += weight
    return Histogram(level, dict(bins))


def percentile(histogram: Histogram, grid: Grid, percent: float, *, minimum: float, maximum: float) -> float:
    """Inverse of the cumulated weights, linear inside a bin, within [minimum, maximum].

    Raises:
        PlanError: the histogram is empty.
    """
    if not histogram.bins:
        raise PlanError("No site has foreground voxels, so intensity percentiles cannot be computed. Check the labels.")
    keys = sorted(histogram.bins)
    cumulated = np.concatenate([[0.0], np.cumsum([histogram.bins[key] for key in keys])])
    # Weights that were added in another order differ in their last digit, and at a tie that would decide between two bins.
    shares, wanted = np.round(cumulated / cumulated[-1], 12), percent / 100
    index = min(int(np.searchsorted(shares, wanted, side="right")) - 1, len(keys) - 1)
    low, high = (float(np.clip(edge, minimum, maximum)) for edge in grid.interval(keys[index][0], histogram.level))
    start, end = list(pairwise(shares))[index]
    share = (wanted - start) / (end - start) if end > start else 0.5
    return float(low + min(max(share, 0.0), 1.0) * (high - low))
