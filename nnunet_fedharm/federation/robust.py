"""Aggregation that a few bad sites cannot steer, and who sent too large an update: pure functions.

Every function takes site -> (name -> array), the same names and shapes from everybody, and computes in float64 in the order
of the sites' names. n is the number of sites, f the number of bad ones among them. Unlike a mean all of these need every site's
numbers at once; they take a piece of each tensor at a time, so that memory does not grow with n where the replies lie on disk.

References:
    Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018 (median, trimmed mean).
    Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS 2017 (Krum).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_fedharm.errors import FederationError, ShapeError
from nnunet_fedharm.federation.aggregation import as_dtype, piece, shape_of
from nnunet_fedharm.federation.codec import Tensors, Weights

TRIMMED_LEAST = 3
"""Replies from which on a trimmed mean or a median is more than a mean."""
PIECE = 2**22
"""Numbers of all sites together that are looked at at once: 32 MiB in float64."""
NORM_BOUND_LEAST = 3
"""Replies from which on a median of norms says something about the others."""


def coordinate_median(weights: Mapping[str, Tensors]) -> Weights:
    """Median over sites of every number; the mean of the two middle ones where n is even. Sites count alike.

    With fewer bad sites than half of all, every number lies between two numbers that good sites sent.
    """
    return _by_tensor(weights, lambda stack: np.median(stack, axis=0))


def trimmed_mean(weights: Mapping[str, Tensors], trim: float) -> Weights:
    """Mean over sites of every number without the `trimmed(trim, n)` largest and smallest. Sites count alike.

    Raises:
        FederationError: fewer than three replies, of which none can be cut at each end.
    """
    cut = trimmed(trim, len(weights))
    if not cut:
        raise FederationError(f"A trimmed mean needs {TRIMMED_LEAST} replies, got {len(weights)}.")
    return _by_tensor(weights, lambda stack: np.sort(stack, axis=0)[cut : len(weights) - cut].mean(axis=0))


def trimmed(trim: float, n_sites: int) -> int:
    """Replies that a trimmed mean leaves out at each end: ceil(trim n), but no more than leaves one reply.

    Rounded up, unlike Flower's `FedTrimmedAvg`: a quarter of three replies is one of them, not none.
    """
    return min(math.ceil(trim * n_sites - 1e-9), (n_sites - 1) // 2)  # 0.2 * 5 is a little more than 1 in binary


def squared_distances(weights: Mapping[str, Tensors]) -> npt.NDArray[np.float64]:
    """(n, n) squared Euclidean distances between sites over all floating tensors, in the order of the sites' names."""
    sites = sorted(weights)
    total = np.zeros((len(sites), len(sites)))
    for name in sorted(weights[sites[0]]):
        for start, stop in pieces(math.prod(shape_of(weights[sites[0]], name)), len(sites)):
            parts = [piece(weights[site], name, start, stop) for site in sites]
            if parts[0].dtype.kind != "f":
                break
            flat = [part.astype(np.float64) for part in parts]
            for i in range(len(sites)):
                for j in range(i):
                    # Not |a|² + |b|² - 2ab: between near neighbours that is the difference of two large numbers.
                    total[i, j] += float(np.sum((flat[i] - flat[j]) ** 2))
    return total + total.T


def krum_scores(distances: npt.NDArray[np.float64], byzantine: int) -> npt.NDArray[np.float64]:
    """(n,) sum of each site's n - f - 2 smallest squared distances to others.

    Raises:
        FederationError: n < 2f + 3, below which Krum promises nothing.
    """
    n_sites = len(distances)
    if n_sites < krum_least(byzantine):
        raise FederationError(
            f"Krum with {byzantine} bad sites needs at least {krum_least(byzantine)} replies, got {n_sites}."
        )
    others = distances + np.diag(np.full(n_sites, np.inf))
    return np.sort(others, axis=1)[:, : n_sites - byzantine - 2].sum(axis=1)


def krum_choice(weights: Mapping[str, Tensors], byzantine: int, *, keep: int) -> tuple[str, ...]:
    """The `keep` sites with the smallest Krum scores, sorted by name; of equal scores the first by name."""
    sites = sorted(weights)
    scores = krum_scores(squared_distances(weights), byzantine)
    return tuple(sorted(sites[index] for index in np.argsort(scores, kind="stable")[:keep]))


def krum_least(byzantine: int) -> int:
    """Replies that Krum needs: 2f + 3."""
    return 2 * byzantine + 3


def update_norms(weights: Mapping[str, Tensors], former: Weights, names: Iterable[str]) -> dict[str, float]:
    """site -> Euclidean norm of what it changed, over the floating ones of `names`."""
    chosen = [name for name in sorted(names) if former[name].dtype.kind == "f"]
    return {
        site: math.sqrt(
            math.fsum(
                float(np.sum((sent[name].astype(np.float64) - former[name].astype(np.float64)) ** 2)) for name in chosen
            )
        )
        for site, sent in sorted(weights.items())
    }


def norm_outliers(norms: Mapping[str, float], factor: float, *, what: str = "Its update") -> dict[str, str]:
    """site -> one sentence, for each norm above `factor` times the median; nobody of fewer than three, or where it is 0.

    Args:
        norms: site -> norm of its update.
        factor: 0 turns the bound off.
        what: begins the sentence.
    """
    if not factor or len(norms) < NORM_BOUND_LEAST:
        return {}
    median = float(np.median(list(norms.values())))
    if not median > 0:
        return {}
    return {
        site: f"{what} has the norm {norm:.3g}, more than norm-bound {factor:g} times the median {median:.3g}."
        for site, norm in sorted(norms.items())
        if norm > factor * median
    }


def pieces(size: int, n_sites: int) -> list[tuple[int, int]]:
    """Bounds that cut a tensor of `size` numbers into nearly equal pieces, of which those of all sites fit into PIECE."""
    count = max(1, math.ceil(size * n_sites / PIECE))
    edges = [size * index // count for index in range(count + 1)]
    return list(pairwise(edges))


def _by_tensor(
    weights: Mapping[str, Tensors], combine: Callable[[npt.NDArray[np.float64]], npt.NDArray[Any]]
) -> Weights:
    """Combine (n, numbers) stacks piece by piece; integers are rounded, booleans decided by more than half."""
    sites = sorted(weights)
    first = weights[sites[0]]
    combined: Weights = {}
    for name in sorted(first):
        shape = shape_of(first, name)
        for site in sites:
            if name not in weights[site] or shape_of(weights[site], name) != shape:
                raise ShapeError(f"{site} and {sites[0]} sent {name} in different shapes, or one of them not at all.")
        found = []
        for start, stop in pieces(math.prod(shape), len(sites)):
            parts = [piece(weights[site], name, start, stop) for site in sites]
            value = combine(np.stack([part.astype(np.float64) for part in parts]))
            found.append(as_dtype(value, parts[0].dtype))
        combined[name] = np.concatenate(found).reshape(shape)
    return combined
