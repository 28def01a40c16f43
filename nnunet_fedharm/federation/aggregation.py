"""From the sites' replies to the next global tensors: pure functions.

References:
    McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017, alg. 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_fedharm.errors import FederationError, ShapeError
from nnunet_fedharm.federation.codec import Tensors, Weights
from nnunet_fedharm.federation.ownership import Ownership


@dataclass(frozen=True)
class SiteUpdate:
    """What one site sends back in a round.

    Attributes:
        weights: name -> array after local training; of tables of rows the site's own row, (1, ...).
        n_steps: optimizer steps taken in this round.
        n_cases: training cases at the site.
        metrics: train_loss, val_loss, dice (mean foreground pseudo Dice), seconds; absent where not measured.
        control: change of the site's control variate (SCAFFOLD), by the name of its tensor.
    """

    weights: Tensors
    n_steps: int
    n_cases: int
    metrics: dict[str, float]
    control: Tensors = field(default_factory=dict)


Combine = Callable[[Mapping[str, Tensors], Mapping[str, float]], Weights]
"""From site -> tensors and site -> share to one set of tensors."""


def shares(updates: Mapping[str, SiteUpdate], weighting: str, *, batch_size: int = 1) -> dict[str, float]:
    """Share of each site in the mean; they sum to 1.

    Args:
        updates: site -> update.
        weighting: "steps" (optimizer steps x batch size), "cases" or "sites" (equal).
        batch_size: of the plans, the same at every site.

    Raises:
        FederationError: unknown weighting, no update, or nobody did anything.
    """
    parts = amounts(updates, weighting, batch_size=batch_size)
    total = math.fsum(parts.values())
    if not total > 0:
        raise FederationError(f"No site did any work in this round (weighting {weighting!r}).")
    return {site: amount / total for site, amount in parts.items()}


def amounts(updates: Mapping[str, SiteUpdate], weighting: str, *, batch_size: int = 1) -> dict[str, float]:
    """What `shares` divides by its sum.

    Raises:
        FederationError: unknown weighting.
    """
    if weighting == "steps":
        return {site: float(update.n_steps * batch_size) for site, update in updates.items()}
    if weighting == "cases":
        return {site: float(update.n_cases * (update.n_steps > 0)) for site, update in updates.items()}
    if weighting == "sites":
        return {site: float(update.n_steps > 0) for site, update in updates.items()}
    raise FederationError(f"weighting is {weighting!r}; choose steps, cases or sites.")


def aggregate(
    former: Weights,
    updates: Mapping[str, SiteUpdate],
    share: Mapping[str, float],
    ownership: Ownership,
    *,
    combine: Combine | None = None,
) -> Weights:
    """The next global tensors.

    Rows come from their sites word for word; what only the reference's sites train is their mean; the rest is the mean over all
    sites that took a step, or what `combine` makes of them. A tensor or row whose owners are not there stays as it was.

    Args:
        former: global tensors before the round.
        updates: site -> reply, with the tensors of `ownership.contribution`.
        share: site -> share, 0 for a site that took no step; renormalised over the sites of each mean.
        ownership: of the phase.
        combine: instead of the weighted mean, for what all sites train.

    Raises:
        ShapeError: names or shapes differ; the message names the site.
    """
    alone = ownership.reference_only & set(former)
    active = {site for site in updates if share[site] > 0}
    merged = dict(former)
    for names, sites, merge in (
        (ownership.common(former), active, combine or weighted_mean),
        (alone, active & ownership.reference_sites, weighted_mean),
    ):
        if names and sites:
            total = math.fsum(share[site] for site in sites)
            merged |= merge(select(updates, sites, names), {site: share[site] / total for site in sites})
    for name in ownership.rows & set(former):
        merged[name] = _with_rows(name, former[name], updates, ownership.bank)
    return merged


class Selected(Mapping[str, npt.NDArray[Any]]):
    """Some of a reply's tensors, looked up when they are needed."""

    def __init__(self, whole: Tensors, names: Sequence[str]) -> None:
        self._whole = whole
        self._names = dict.fromkeys(names)

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        if name not in self._names:
            raise KeyError(name)
        return self._whole[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return shape_of(self._whole, name)

    def piece(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        """Numbers `start` to `stop` of the flattened tensor."""
        return piece(self._whole, name, start, stop)


def shape_of(tensors: Tensors, name: str) -> tuple[int, ...]:
    """Shape of a tensor, read from disk no further than needed."""
    own = getattr(tensors, "shape_of", None)
    shape: tuple[int, ...] = own(name) if own is not None else tensors[name].shape
    return shape


def piece(tensors: Tensors, name: str, start: int, stop: int) -> npt.NDArray[Any]:
    """Numbers `start` to `stop` of a flattened tensor, read from disk no further than needed."""
    own = getattr(tensors, "piece", None)
    part: npt.NDArray[Any] = own(name, start, stop) if own is not None else tensors[name].ravel()[start:stop]
    return part


def select(updates: Mapping[str, SiteUpdate], sites: Iterable[str], names: Iterable[str]) -> dict[str, Tensors]:
    """site -> the named tensors of its reply, not read yet.

    Raises:
        ShapeError: one is missing; the message names the site.
    """
    chosen, wanted = sorted(names), sorted(sites)
    for site in wanted:
        for name in chosen:
            _require(updates[site].weights, name, site)
    return {site: Selected(updates[site].weights, chosen) for site in wanted}


def _with_rows(
    name: str, table: npt.NDArray[Any], updates: Mapping[str, SiteUpdate], bank: tuple[str, ...]
) -> npt.NDArray[Any]:
    filled = table.copy()
    for row, site in enumerate(bank):
        if site in updates:
            own = _of(updates[site].weights, name, site)
            if own.shape != (1, *table.shape[1:]):
                raise ShapeError(f"{name}: {site} sent {own.shape}, its row is {(1, *table.shape[1:])}.")
            filled[row] = own[0]
    return filled


def _of(weights: Tensors, name: str, site: str) -> npt.NDArray[Any]:
    _require(weights, name, site)
    return weights[name]


def _require(weights: Tensors, name: str, site: str) -> None:
    if name not in weights:
        raise ShapeError(f"{site} sent no {name}.")


def weighted_mean(weights: Mapping[str, Tensors], share: Mapping[str, float]) -> Weights:
    """Mean of every tensor over sites, summed in float64 in the order of site names; one site's tensor is in memory at a time.

    Floating tensors are cast back to their dtype; integer tensors are rounded; of boolean ones the larger share wins.

    Args:
        weights: site -> (name -> array); same names, shapes and dtypes everywhere.
        share: site -> share, summing to 1.

    Raises:
        ShapeError: names or shapes differ; the message names the site.
    """
    sites = sorted(weights)
    first = weights[sites[0]]
    for site in sites[1:]:
        if set(weights[site]) != set(first):
            raise ShapeError(f"{site} and {sites[0]} sent tensors of different names.")
    return {name: _mean_tensor(name, weights, share) for name in sorted(first)}


def _mean_tensor(name: str, weights: Mapping[str, Tensors], share: Mapping[str, float]) -> npt.NDArray[Any]:
    sites = sorted(weights)
    dtype, shape = weights[sites[0]][name].dtype, shape_of(weights[sites[0]], name)
    total = np.zeros(shape, dtype=np.float64)
    for site in sites:
        tensor = weights[site][name]
        if tensor.shape != shape:
            raise ShapeError(f"{name}: {site} sent {tensor.shape}, {sites[0]} sent {shape}.")
        total += share[site] * tensor.astype(np.float64)
    return as_dtype(total, dtype)


def as_dtype(value: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """A float64 result as the tensor's own dtype: integers rounded, booleans decided by more than half."""
    if dtype == np.bool_:
        return np.asarray(value > 0.5)
    return np.asarray(np.rint(value) if dtype.kind in "iu" else value, dtype=dtype)


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that are numbers: a site without any foreground in its validation batches has no Dice, for instance."""
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}


def mean_metric(updates: Mapping[str, SiteUpdate], share: Mapping[str, float], name: str) -> float | None:
    """Weighted mean of a metric over the sites that measured it; None where nobody did."""
    measured = {site: update.metrics[name] for site, update in updates.items() if name in update.metrics}
    total = math.fsum(share[site] for site in finite(measured))
    if not total > 0:
        return None
    return math.fsum(share[site] * value for site, value in finite(measured).items()) / total


def median_metric(updates: Mapping[str, SiteUpdate], share: Mapping[str, float], name: str) -> float | None:
    """Median of a metric over the sites with a share that measured it; None where nobody did."""
    measured = finite(
        {site: update.metrics[name] for site, update in updates.items() if name in update.metrics and share[site] > 0}
    )
    return float(np.median(list(measured.values()))) if measured else None
