"""Updates in the shapes of a small nnU-Net for `site_level.py`, and what the mean of a round should be."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from site_level_wrappers import CLIP, Round, Weights
from torch import nn

SITES = {4: (8, 16, 40, 136), 20: (*range(10, 29), 180)}
"""Cases of the sites; the largest has 68 % and 33 % of them."""


def network() -> nn.Module:
    """A small 2D nnU-Net, as its planner builds it."""
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    torch.manual_seed(0)
    norm = {"norm_op": nn.InstanceNorm2d, "norm_op_kwargs": {"affine": True, "eps": 1e-5}}
    return PlainConvUNet(
        1, 4, [8, 16, 32, 32], nn.Conv2d, 3, [1, 2, 2, 2], 2, 3, 2, conv_bias=True, **norm,
        nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True}, deep_supervision=True,
    )  # fmt: skip


def former_weights() -> Weights:
    """Each tensor once, as both sides should be given it."""
    from nnunet_fedharm.trainers.weights import export_weights

    return dict(export_weights(network()))


def moved(former: Weights, direction: Weights, norm: float) -> Weights:
    """The weights after an update of that norm in that direction."""
    scale = norm / length(direction)
    return {name: (value + scale * direction[name]).astype(value.dtype) for name, value in former.items()}


def length(tensors: Weights) -> float:
    return math.sqrt(sum(float((value.astype(np.float64) ** 2).sum()) for value in tensors.values()))


def difference(one: Weights, other: Weights) -> Weights:
    return {name: value.astype(np.float64) - other[name].astype(np.float64) for name, value in one.items()}


def direction_of(former: Weights, seed: int) -> Weights:
    """Random, of the size that each tensor's weights have."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, value.std() + 1e-3, value.shape) for name, value in former.items()}


def round_of(former: Weights, count: int) -> Round:
    """Updates that share half of their direction, of .3 to 3 clips."""
    common = direction_of(former, 0)
    updates, cases = {}, {}
    for number, (norm, size) in enumerate(zip(np.geomspace(0.3, 3, count), SITES[count], strict=True)):
        own = direction_of(former, number + 1)
        towards = {name: common[name] + own[name] for name in former}
        updates[f"site{number:02d}"] = moved(former, towards, float(norm) * CLIP)
        cases[f"site{number:02d}"] = size
    return Round(former, updates, cases)


def exact_mean(one: Round) -> Weights:
    """Of the clipped updates, in double precision, without noise."""
    total = sum(one.cases.values())
    mean = {name: value.astype(np.float64) for name, value in one.former.items()}
    for site, weights in one.updates.items():
        change = difference(weights, one.former)
        factor = min(1.0, CLIP / length(change)) * one.cases[site] / total
        mean = {name: mean[name] + factor * change[name] for name in mean}
    return mean


def flat(tensors: Weights) -> npt.NDArray[np.float64]:
    return np.concatenate([np.ravel(value).astype(np.float64) for value in tensors.values()])


def worst_inputs(one: Round) -> tuple[Round, Round, Round]:
    """All other sites on one side, the largest on the other; the same with nothing of it; and with it on their side."""
    towards = direction_of(one.former, 99)
    largest = max(one.cases, key=lambda site: one.cases[site])
    there, against = (moved(one.former, towards, 10 * sign * CLIP) for sign in (1, -1))
    nothing = {name: value.copy() for name, value in one.former.items()}
    first = next(iter(nothing.values())).reshape(-1)
    first[0] = np.nextafter(first[0], np.float32(10))  # Flower divides by the norm of an update: 0 is tried apart
    others = dict.fromkeys(one.updates, there)
    return (
        replace(one, updates=others | {largest: against}),
        replace(one, updates=others | {largest: nothing}),
        replace(one, updates=others),
    )
