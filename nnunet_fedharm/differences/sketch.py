"""Sketches of a site's features: counts on grids that all sites share. Bounded in size, no case, mergeable by addition.

The server never learns a smallest or largest value. It finds the grids by zooming:

| step | grid | what it is for |
|---|---|---|
| locate | public, 4 cells an octave from 2^-20 to 2^40, both signs | a range for each feature, blind to outliers |
| zoom | equal bins over that range; again inside it where all values share a few bins | the shape of the distribution |
| final | bins of nearly equal numbers of cases | all statistics |

A histogram has a cell below its first edge, its bins, a cell above its last edge, and a cell for cases that lack the feature.
Each case counts once per feature, whatever its values, which is what noise is calibrated to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_fedharm.errors import ShapeError

Values = npt.NDArray[np.floating[Any]]
Counts = npt.NDArray[np.float64]
Edges = npt.NDArray[np.float64]

PER_OCTAVE = 4
_SMALLEST, _LARGEST = -20, 40
_CELLS = PER_OCTAVE * (_LARGEST - _SMALLEST)
LOCATE_CELLS = 2 * _CELLS + 1
"""Cells of the public grid; one more counts cases without the feature."""
TRIM = 0.005
"""Share of cases at each end whose values are cut before distances."""
BODY = 0.9
"""Share of cases that sets a range: pyradiomics gives 10^6 where a coarseness does not exist, and a few such values would empty
all other bins. A range is the middle 90%, and as much again on either side where there are cases."""
_TAIL = (1 - BODY) / 2
WINSOR = 4.0
"""Standardised values are cut at +- this."""
RESOLVED = 8
"""A grid is fine enough where the middle 90% of all cases lie in this many bins."""
_UNIFORM = 0.25


def locate(values: Values) -> Counts:
    """Counts on the public grid.

    Args:
        values: (N, F); what is not finite counts as missing.

    Returns:
        (F, LOCATE_CELLS + 1), missing last.
    """
    values = _table(values)
    missing = ~np.isfinite(values)
    magnitude = np.maximum(np.abs(np.where(missing, 0.0, values)), 2.0 ** (_SMALLEST - 1))
    octave = np.floor(PER_OCTAVE * (np.log2(magnitude) - _SMALLEST)).astype(np.int64)
    cell = np.where(octave < 0, 0, np.minimum(octave, _CELLS - 1) + 1)
    code = np.where(missing, LOCATE_CELLS, _CELLS + np.sign(np.where(missing, 0, values)).astype(np.int64) * cell)
    return _count(code, LOCATE_CELLS + 1)


def located_range(counts: Counts) -> tuple[Edges, Edges]:
    """Range of each feature from pooled counts of `locate`.

    Args:
        counts: (F, LOCATE_CELLS + 1); noise may have made some negative.

    Returns:
        Lower and upper end, (F,) each; lower < upper.
    """
    mass = np.maximum(np.asarray(counts, dtype=np.float64)[:, :LOCATE_CELLS], 0)
    return _range(mass, _locate_borders())


def _range(mass: Counts, borders: Edges) -> tuple[Edges, Edges]:
    """The middle 90% and as much again on either side, but not beyond the outermost cases.

    Args:
        mass: (F, C) cases in each cell.
        borders: (C + 1,), of all features, or (F, C + 1).
    """
    borders = np.broadcast_to(borders, (len(mass), mass.shape[1] + 1))
    rows = np.arange(len(mass))
    low, high = borders[rows, _holding(mass, _TAIL)], borders[rows, _holding(mass, 1 - _TAIL, from_above=True) + 1]
    least, most = borders[rows, _holding(mass, 0.0)], borders[rows, _holding(mass, 1.0, from_above=True) + 1]
    nobody = mass.sum(1) == 0
    start, end = np.maximum(least, low - (high - low)), np.minimum(most, high + (high - low))
    return np.where(nobody, -1.0, start), np.where(nobody, 1.0, end)


def above_noise(counts: Counts, sigma: float) -> Counts:
    """Counts (F, cells) with those set to zero that normal noise of `sigma` alone makes once in about a thousand cells."""
    return np.where(counts > 3 * sigma, counts, 0.0)


def _locate_borders() -> Edges:
    """(LOCATE_CELLS + 1,) borders of the cells; the outermost cells reach further, to everything beyond."""
    positive = 2.0 ** (np.arange(_CELLS + 1) / PER_OCTAVE + _SMALLEST)
    return np.concatenate([-positive[::-1], positive])


def _holding(mass: Counts, share: float, *, from_above: bool = False) -> npt.NDArray[np.intp]:
    """(F,) first cell at which more than this share lies at or below; from above: the mirror image of it."""
    if from_above:
        return np.asarray(mass.shape[1] - 1 - _holding(mass[:, ::-1], 1 - share))
    summed = np.cumsum(mass, axis=1)
    return np.minimum((summed <= share * summed[:, -1:]).sum(1), mass.shape[1] - 1)


def equal_edges(low: Edges, high: Edges, bins: int) -> Edges:
    """(F, bins + 1) equally spaced edges."""
    return low[:, None] + (high - low)[:, None] * np.linspace(0.0, 1.0, bins + 1)


def count_bins(values: Values, edges: Edges) -> Counts:
    """Histogram of each feature: below, bins [edge, next edge), above, missing.

    Args:
        values: (N, F).
        edges: (F, B + 1), ascending.

    Returns:
        (F, B + 3).

    Raises:
        ShapeError: values and edges do not have the same features.
    """
    values = _table(values)
    if values.shape[1] != len(edges):
        raise ShapeError(f"Values {values.shape} and edges {edges.shape} do not have the same features.")
    cells = edges.shape[1] + 1
    code = np.empty(values.shape, dtype=np.int64)
    for feature, own in enumerate(edges):
        code[:, feature] = np.searchsorted(own, values[:, feature], side="right")
    code[~np.isfinite(values)] = cells
    return _count(code, cells + 1)


def is_resolved(counts: Counts) -> npt.NDArray[np.bool_]:
    """(F,) whether the middle 90% of the cases are spread over enough bins of a histogram (F, B + 3)."""
    mass = np.maximum(np.asarray(counts, dtype=np.float64)[:, :-1], 0)
    return _holding(mass, 1 - _TAIL, from_above=True) - _holding(mass, _TAIL) + 1 >= RESOLVED


def zoomed_range(counts: Counts, edges: Edges) -> tuple[Edges, Edges]:
    """Range as in `located_range`, from a histogram; never wider than the histogram's own.

    Args:
        counts: pooled, (F, B + 3).
        edges: (F, B + 1).
    """
    mass = np.maximum(np.asarray(counts, dtype=np.float64)[:, :-1], 0)
    # Cases below and above stand at the outermost bins: there is nothing to be seen of them but their number.
    inner = mass[:, 1:-1].copy()
    inner[:, 0] += mass[:, 0]
    inner[:, -1] += mass[:, -1]
    return _range(inner, edges)


def final_edges(counts: Counts, edges: Edges, bins: int) -> Edges:
    """Edges of `bins` bins over the same range: mostly of equal numbers of cases, a quarter equally spaced.

    Args:
        counts: pooled, (F, B + 3), on `edges` (F, B + 1).

    Returns:
        (F, bins + 1).
    """
    inner = np.maximum(np.asarray(counts, dtype=np.float64)[:, 1:-2], 0)
    total = inner.sum(1, keepdims=True)
    share = np.divide(inner, total, out=np.full_like(inner, 1 / inner.shape[1]), where=total > 0)
    mixed = (1 - _UNIFORM) * share + _UNIFORM * np.diff(edges) / (edges[:, -1:] - edges[:, :1])
    summed = np.concatenate([np.zeros((len(edges), 1)), np.cumsum(mixed, axis=1)], axis=1)
    wanted = np.linspace(0, 1, bins + 1)
    found = np.stack([np.interp(wanted, s / s[-1], e) for s, e in zip(summed, edges, strict=True)])
    found[:, 0], found[:, -1] = edges[:, 0], edges[:, -1]
    return found


@dataclass(frozen=True)
class Standard:
    """How values are made comparable before moments: (x - centre) / scale, cut at +- WINSOR.

    Attributes:
        centre, scale: (F,); a feature that does not vary has the scale 0 and becomes 0 everywhere.
    """

    centre: Edges
    scale: Edges

    def apply(self, values: Values) -> npt.NDArray[np.float64]:
        """Standardised (N, F) values."""
        shifted = np.asarray(values, dtype=np.float64) - self.centre
        scaled = np.divide(shifted, self.scale, out=np.zeros_like(shifted), where=self.scale > 0)
        return np.clip(scaled, -WINSOR, WINSOR)


def standard_of(counts: Counts, edges: Edges) -> Standard:
    """Median and normal-consistent interquartile range of pooled counts (F, B + 3) on edges (F, B + 1).

    Where half of all cases share a bin, a quarter of the range of the middle 98% stands in for it.
    """
    low, centre, high = (quantile(counts, edges, share) for share in (0.25, 0.5, 0.75))
    scale = (high - low) / 1.349
    wide = (quantile(counts, edges, 0.99) - quantile(counts, edges, 0.01)) / WINSOR
    return Standard(centre, np.where(scale > 0.1 * wide, scale, wide))


def quantile(counts: Counts, edges: Edges, share: float) -> Edges:
    """(F,) quantile of histograms (F, B + 3), linear inside a bin, cut at the outer edges; NaN without cases."""
    mass = np.maximum(np.asarray(counts, dtype=np.float64)[:, :-1], 0)
    summed = np.cumsum(mass, axis=1)
    wanted = share * summed[:, -1]
    found = np.empty(len(edges))
    for feature, (own, borders) in enumerate(zip(summed, edges, strict=True)):
        # own[i] is the number of cases below borders[i]; over empty bins it is flat, and their middle counts.
        below = own[:-1]
        right = np.interp(wanted[feature], below, borders)
        left = np.interp(-wanted[feature], -below[::-1], borders[::-1])
        found[feature] = (left + right) / 2 if own[-1] > 0 else np.nan
    return found


def _table(values: Values) -> npt.NDArray[np.float64]:
    if values.ndim != 2:
        raise ShapeError(f"A sketch needs a table (cases, features), got {values.shape}.")
    return np.asarray(values, dtype=np.float64)


def _count(code: npt.NDArray[np.int64], cells: int) -> Counts:
    """(F, cells) how often each code stands in each column of (N, F)."""
    features = code.shape[1]
    flat = code + cells * np.arange(features)
    return np.bincount(flat.ravel(), minlength=cells * features).reshape(features, cells).astype(np.float64)
