"""A round's update as the fields of a secure sum, and the mean that comes out of it: pure functions.

What is summed is weight x change of each tensor that all sites train, weight x each metric, and the weights. So the server learns
the weighted mean of tensors and metrics, the sum of the weights, and how many entries were clipped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_fedharm.errors import FederationError, ShapeError
from nnunet_fedharm.federation.aggregation import as_dtype
from nnunet_fedharm.federation.codec import Weights
from nnunet_fedharm.privacy.fixed_point import Field, Layout, Sum

METRICS = ("train_loss", "val_loss", "dice")
_MOST_METRIC = 1000.0
_MOST_COUNT = 2.0**20
"""Change of an integer tensor, batch norm's count of batches for instance."""
_TENSOR, _METRIC, _HAS = "tensor:", "metric:", "has:"


@dataclass(frozen=True)
class MeanUpdate:
    """What the server learns of a round.

    Attributes:
        weights: weighted mean of the tensors after local training.
        metrics: weighted means; those that nobody measured are absent.
        weight: sum of the weights.
        clipped: entries beyond the clip range, over all sites.
    """

    weights: Weights
    metrics: dict[str, float]
    weight: int
    clipped: int


def update_layout(
    former: Weights, *, sites: int, max_weight: int, clip: float, width: int, room: float | None = None
) -> Layout:
    """Fields of a round's sum.

    Args:
        former: the tensors that all sites train, as they were sent.
        sites: largest number of sites.
        max_weight: largest weight of one.
        clip: largest change of an entry of a floating tensor in one round.
        width: bytes of an entry.
        room: largest entry with its noise, where sites add noise; their own weights multiply their updates before.

    Raises:
        PrivacyError: these do not fit together.
    """
    fields = [
        Field(_TENSOR + name, value.shape, room or _clip(value.dtype, clip), weighted=room is None)
        for name, value in sorted(former.items())
    ]
    fields += [Field(_METRIC + name, (), _MOST_METRIC) for name in METRICS]
    fields += [Field(_HAS + name, (), 1, integer=True) for name in METRICS]
    return Layout(tuple(fields), sites, max_weight, width)


def site_arrays(
    former: Weights, weights: Weights, metrics: Mapping[str, float], names: Iterable[str]
) -> dict[str, npt.NDArray[Any]]:
    """A site's part of the sum.

    Args:
        former: tensors as they came from the server.
        weights: after local training.
        metrics: of the round; those that are missing or no numbers count for nothing.
        names: the tensors that all sites train.

    Raises:
        ShapeError: a tensor changed its shape.
    """
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name in sorted(names):
        if weights[name].shape != former[name].shape:
            raise ShapeError(f"{name} is {weights[name].shape} after training, {former[name].shape} before.")
        # Changes in float64: a float32 difference of large weights would lose what the ring can hold.
        value = weights[name].astype(np.float64)
        arrays[_TENSOR + name] = value if former[name].dtype == np.bool_ else value - former[name].astype(np.float64)
    for name in METRICS:
        measured = math.isfinite(metrics.get(name, math.nan))
        arrays[_METRIC + name] = np.array(metrics[name] if measured else 0.0)
        arrays[_HAS + name] = np.array(float(measured))
    return arrays


def mean_update(total: Sum, former: Weights, max_weight: int = 1) -> MeanUpdate:
    """The next tensors out of the opened sum.

    Args:
        total: of `site_arrays` by `update_layout`.
        former: the tensors as they were sent.
        max_weight: of the layout; where sites add noise they send updates times their weight over this.

    Raises:
        FederationError: no site did any work.
    """
    if not total.weight:
        raise FederationError("No site did any work in this round: the weights in the secure sum are all 0.")
    weights: Weights = {}
    for name, value in sorted(former.items()):
        weighted = _TENSOR + name in total.weighted
        mean = total.mean(_TENSOR + name) if weighted else total.values[_TENSOR + name] * max_weight / total.weight
        start = 0.0 if value.dtype == np.bool_ else value.astype(np.float64)
        weights[name] = as_dtype(start + mean, value.dtype)
    metrics = {}
    for name in METRICS:
        measured = float(total.values[_HAS + name])
        if measured > 0:
            metrics[name] = float(total.values[_METRIC + name]) / measured
    return MeanUpdate(weights, metrics, total.weight, total.clipped)


def _clip(dtype: np.dtype[Any], clip: float) -> float:
    if dtype == np.bool_:
        return 1.0
    return clip if dtype.kind == "f" else _MOST_COUNT
