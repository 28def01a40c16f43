"""Intervals without cases: patients are drawn anew from what a site sent, histograms of features and correlations between them.

A site's patients are drawn from a Gaussian copula: normal vectors with the site's correlations, each feature then placed in the
cell of its histogram that holds the same share. For one feature alone this is the bootstrap of patients, exactly, since a
statistic of counts needs no more than counts. Statistics over several features at once (medians over a family) need to know how
features move together, which the correlations say as far as a Gaussian copula can. Without correlations features are drawn apart,
and medians over features get intervals that are too narrow.

References:
    Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 1979.
    Nelsen, "An Introduction to Copulas", 2006.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

from nnunet_fedharm.differences.discriminant import Moments
from nnunet_fedharm.differences.sketch import Counts, Edges
from nnunet_fedharm.differences.sketch_statistics import Cut, kruskal_wallis, ks_bounds, wasserstein

Numbers = npt.NDArray[np.float64]

_BLOCK = 256
"""Patients drawn at a time, so that memory stays small."""


@dataclass(frozen=True)
class Copula:
    """One site.

    Attributes:
        sizes: (F,) patients that have each feature.
        borders: (F, cells - 1) where cells of the histogram end, in standard deviations of a normal variable.
        root: (d, F), normal vectors of unit variance from d independent normal numbers.
    """

    sizes: npt.NDArray[np.int64]
    borders: Numbers
    root: Numbers

    def draw(self, generator: np.random.Generator) -> Counts:
        """Counts (F, cells) of as many patients as the site has."""
        n, features = int(self.sizes.max(initial=0)), len(self.sizes)
        cells = self.borders.shape[1] + 1
        counts = np.zeros(features * cells, dtype=np.int64)
        for start in range(0, n, _BLOCK):
            rows = np.arange(start, min(start + _BLOCK, n))
            normal = generator.normal(size=(len(rows), len(self.root))) @ self.root
            cell = (normal[:, :, None] > self.borders).sum(2)
            # A feature that some patients lack is drawn for the first ones only: which ones lack it is not known.
            flat = (cell + cells * np.arange(features))[rows[:, None] < self.sizes]
            counts += np.bincount(flat, minlength=len(counts))
        return counts.reshape(features, cells).astype(np.float64)


def copula_of(counts: Counts, moments: Moments | None, joint: tuple[int, ...]) -> Copula:
    """From what a site sent.

    Args:
        counts: (F, cells), none negative.
        moments: of the features `joint`; None where the site sent none.
        joint: positions of these features; the others are drawn independently.
    """
    total = counts.sum(1, keepdims=True)
    share = np.divide(np.cumsum(counts, axis=1), total, out=np.ones_like(counts), where=total > 0)
    correlation = np.eye(len(counts))
    if moments is not None and moments.n > 1:
        rows = np.array(joint)
        spread = np.sqrt(np.maximum(np.diag(moments.scatter), 0))
        inverse = np.divide(1, spread, out=np.zeros_like(spread), where=spread > 0)
        block = moments.scatter * np.outer(inverse, inverse)
        np.fill_diagonal(block, 1.0)
        correlation[np.ix_(rows, rows)] = block
    values, vectors = np.linalg.eigh(correlation)
    root = (vectors * np.sqrt(np.maximum(values, 0))).T
    root = root[values > 1e-9]
    root /= np.maximum(np.linalg.norm(root, axis=0), 1e-12)
    borders = ndtri(np.clip(share[:, :-1], 0, 1))
    return Copula(np.rint(total[:, 0]).astype(np.int64), borders, root)


@dataclass(frozen=True)
class Draws:
    """Statistics of drawn patients.

    Attributes:
        effect: (R, F) eta squared.
        ks, wasserstein: (pairs, R, F) distances of each two sites, in the order of itertools.combinations.
    """

    effect: Numbers
    ks: Numbers
    wasserstein: Numbers


def bootstrap(
    copulas: list[Copula], edges: Edges, cut: Cut, *, replicates: int, generator: np.random.Generator
) -> Draws:
    """Draw the patients of all sites again and again.

    Args:
        copulas: of each site.
        edges, cut: as for the statistics of the data.
    """
    pairs = list(combinations(range(len(copulas)), 2))
    features = len(edges)
    effect = np.full((replicates, features), np.nan)
    ks, distance = (np.full((len(pairs), replicates, features), np.nan) for _ in range(2))
    for replicate in range(replicates):
        counts = np.stack([copula.draw(generator) for copula in copulas])
        effect[replicate] = kruskal_wallis(counts).effect
        for index, (first, second) in enumerate(pairs):
            ks[index, replicate] = ks_bounds(counts[first], counts[second])[0]
            distance[index, replicate] = wasserstein(counts[first], counts[second], edges, cut)[0]
    return Draws(effect, ks, distance)
