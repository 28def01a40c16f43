"""Server optimizers on the averaged change of a round, the running average of rounds, and control variates: pure functions.

| here | paper |
|---|---|
| former, (name -> array) | x_t |
| mean: combined replies | x_t + Δ_t |
| velocity, first, second | m_t (FedAvgM: v_t), m_t, v_t |
| lr, beta1, beta2, tau | η, β1, β2, τ |

Everything is computed in float64 and kept in the tensor's own dtype, so that a resumed run goes on with the very same
numbers. Integers and booleans take the mean: they have no gradient.

References:
    Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification", 2019 (FedAvgM).
    Reddi et al., "Adaptive Federated Optimization", ICLR 2021, algorithm 2 (FedAdam, FedYogi).
    Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_fedharm.federation.aggregation import as_dtype
from nnunet_fedharm.federation.codec import Tensors, Weights

Wide = npt.NDArray[np.float64]


def relaxed(former: Weights, mean: Weights, *, lr: float) -> Weights:
    """x + η Δ; the mean itself, bit for bit, where η is 1."""
    if lr == 1.0:
        return dict(mean)
    return {name: _moved(former[name], lr * _change(former, mean, name), mean[name]) for name in sorted(mean)}


def momentum_step(
    former: Weights, mean: Weights, velocity: Weights, *, lr: float, momentum: float
) -> tuple[Weights, Weights]:
    """FedAvgM: v ← β v + Δ, x ← x + η v.

    Args:
        velocity: of the round before; names that are missing count as zero.

    Returns:
        Next weights, next velocity.
    """
    after: Weights = {}
    kept: Weights = {}
    for name in sorted(mean):
        fresh = momentum * _kept(velocity, name, former) + _change(former, mean, name)
        after[name] = _moved(former[name], lr * fresh, mean[name])
        if _is_float(former[name]):
            kept[name] = as_dtype(fresh, former[name].dtype)
    return after, kept


def adaptive_step(
    former: Weights,
    mean: Weights,
    first: Weights,
    second: Weights,
    *,
    kind: str,
    number: int,
    lr: float,
    beta1: float,
    beta2: float,
    tau: float,
) -> tuple[Weights, Weights, Weights]:
    """FedAdam or FedYogi.

    m ← β1 m + (1 - β1) Δ;
    FedAdam: v ← β2 v + (1 - β2) Δ², FedYogi: v ← v - (1 - β2) Δ² sign(v - Δ²);
    x ← x + η' m / (sqrt(v) + τ), with η' = η for FedYogi and η sqrt(1 - β2^t) / (1 - β1^t) for FedAdam, as Flower has it
    (t counts rounds from 1; Flower counts from 2).

    Args:
        first, second: m and v of the round before; names that are missing count as zero.
        kind: "fedadam" or "fedyogi".
        number: t, from 1.

    Returns:
        Next weights, m, v.
    """
    rate = lr * np.sqrt(1 - beta2**number) / (1 - beta1**number) if kind == "fedadam" else lr
    after: Weights = {}
    kept_first: Weights = {}
    kept_second: Weights = {}
    for name in sorted(mean):
        change = _change(former, mean, name)
        square, before = change**2, _kept(second, name, former)
        m = beta1 * _kept(first, name, former) + (1 - beta1) * change
        if kind == "fedadam":
            v = beta2 * before + (1 - beta2) * square
        else:
            v = before - (1 - beta2) * square * np.sign(before - square)
        after[name] = _moved(former[name], rate * m / (np.sqrt(v) + tau), mean[name])
        if _is_float(former[name]):
            kept_first[name], kept_second[name] = as_dtype(m, former[name].dtype), as_dtype(v, former[name].dtype)
    return after, kept_first, kept_second


def running_average(average: Weights, value: Weights, *, decay: float, count: int) -> Weights:
    """Exponential average of the rounds so far, without a start that would pull at it.

    The mean of rounds 1 to t with weights d^(t - k): avg_t = d_t avg_(t-1) + (1 - d_t) x_t, d_t = d (1 - d^(t-1)) / (1 - d^t).
    The first round is its own average; many rounds make it the usual d x + (1 - d) x'.

    Args:
        average: after the round before; names that are missing take the value.
        value: weights after this round.
        decay: d, in [0, 1).
        count: t, from 1.
    """
    effective = decay * (1 - decay ** (count - 1)) / (1 - decay**count)
    return {
        name: as_dtype(effective * _wide(average[name]) + (1 - effective) * _wide(new), new.dtype)
        if name in average and _is_float(new)
        else new
        for name, new in sorted(value.items())
    }


def mean_control(summed: Weights, amounts: Mapping[str, float], like: Weights, names: Iterable[str]) -> Weights:
    """SCAFFOLD's c: mean of the sites' control variates, weighted as their weights are.

    Args:
        summed: Σ a_i c_i over the sites that ever replied; names that are missing count as zero.
        amounts: site -> a_i.
        like: weights, for shapes and dtypes.
        names: of the tensors with a control variate.
    """
    total = sum(amounts.values()) or 1.0
    return {name: as_dtype(_kept(summed, name, like) / total, like[name].dtype) for name in sorted(names)}


def add_controls(
    summed: Weights, changes: Mapping[str, Tensors], amounts: Mapping[str, float], like: Weights
) -> Weights:
    """Σ a_i c_i after the sites' changes of their control variates.

    A sum over sites, not a mean over those that replied: whoever is away keeps its part of it, and sites may weigh differently.

    Args:
        summed: before; names that are missing count as zero.
        changes: site -> c_i' - c_i.
        amounts: site -> a_i, the same in every round.
        like: weights, for shapes and dtypes.
    """
    names = sorted({name for change in changes.values() for name in change})
    after: Weights = dict(summed)
    for name in names:
        total = _kept(summed, name, like)
        for site in sorted(changes):
            total = total + amounts[site] * _wide(changes[site][name])
        after[name] = as_dtype(total, like[name].dtype)
    return after


def _change(former: Weights, mean: Weights, name: str) -> Wide:
    return _wide(mean[name]) - _wide(former[name])


def _kept(memory: Weights, name: str, like: Weights) -> Wide:
    return _wide(memory[name]) if name in memory else np.zeros(like[name].shape)


def _moved(former: npt.NDArray[Any], step: Wide, mean: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return as_dtype(_wide(former) + step, former.dtype) if _is_float(former) else mean


def _wide(value: npt.NDArray[Any]) -> Wide:
    return value.astype(np.float64)


def _is_float(value: npt.NDArray[Any]) -> bool:
    return value.dtype.kind == "f"
