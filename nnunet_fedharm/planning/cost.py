"""What a harmonizer costs beside the planned segmenter: a count of convolutions, weighted by how well they use the machine.

Measured on one CPU thread (torch 2.14, AVX-512): a convolution with 32 channels or more runs at about 100 GFLOP/s, a narrower
one in proportion to its channels, and in 3d one with a single sample and few input values, which PyTorch keeps from oneDNN, at
about a sixteenth; the harmonizers compute such a sample as one of two instead. On a GPU narrow layers wait for memory; no GPU was
measured. Against 30 CPU measurements of 1.0 to 2.2 times the segmenter's time the count was off by less than .2 as a rule and by
.4 at worst: enough to choose sizes by.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nnunet_fedharm.harmonizers import build_harmonizer
from nnunet_fedharm.harmonizers.resnet import SLOW_PATH_VALUES

FULL_SPEED_CHANNELS = 32
"""From so many channels, on its wider side, a convolution runs at full speed."""

LEAST_CHANNELS = 8
"""Fewer channels leave no more of the machine unused than this many do."""

SLOW_PATH_SPEED = 1 / 16
"""Speed of PyTorch's own 3d convolution."""

SEGMENTER_PASSES = 3
"""A training step of the segmenter is a forward and a backward pass; the backward pass costs twice the forward one."""


@dataclass(frozen=True)
class Convolution:
    """One convolution of a forward pass with one sample.

    Attributes:
        inputs: input channels.
        outputs: output channels.
        taps: voxels of the kernel.
        size: spatial size that it runs over.
        doubled: a single small sample is computed as one of two (`harmonizers.resnet.convolved`) instead of slowly.
    """

    inputs: int
    outputs: int
    taps: int
    size: tuple[int, ...]
    doubled: bool = False

    def work(self, *, batch: int, cpu: bool) -> float:
        """Operations over relative speed: proportional to time."""
        operations = 2.0 * batch * self.inputs * self.outputs * self.taps * math.prod(self.size)
        values = batch * self.inputs * math.prod(self.size[:2])
        if cpu and batch == 1 and len(self.size) == 3 and self.taps > 1 and values <= SLOW_PATH_VALUES:
            if not self.doubled:
                return operations / SLOW_PATH_SPEED
            operations *= 2
        width = max(self.inputs, self.outputs, LEAST_CHANNELS)
        return operations * max(1.0, FULL_SPEED_CHANNELS / width)


@dataclass(frozen=True)
class CostRatio:
    """Times of harmonizer and segmenter together over the segmenter's alone.

    Attributes:
        training: of a training step behind the frozen harmonizer.
        prediction: of a window.
    """

    training: float
    prediction: float


def cost_ratio(
    segmenter: Iterable[Convolution], harmonizer: Iterable[Convolution], *, batch_size: int, cpu: bool
) -> CostRatio:
    """Expected ratios; nnU-Net predicts windows one by one."""
    planned, added = list(segmenter), list(harmonizer)

    def ratio(batch: int) -> float:
        return sum(c.work(batch=batch, cpu=cpu) for c in added) / sum(c.work(batch=batch, cpu=cpu) for c in planned)

    return CostRatio(training=1 + ratio(batch_size) / SEGMENTER_PASSES, prediction=1 + ratio(1))


def segmenter_convolutions(configuration: Mapping[str, Any], channels: int, classes: int) -> list[Convolution]:
    """Convolutions of the planned network, from a forward pass without values (meta tensors)."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    architecture, found = configuration["architecture"], []

    def record(module: nn.Module, arguments: tuple[torch.Tensor, ...], result: torch.Tensor) -> None:
        transposed = isinstance(module, (nn.ConvTranspose2d, nn.ConvTranspose3d))
        taps = math.prod(module.kernel_size)  # type: ignore[arg-type]
        grid = arguments[0] if transposed else result
        found.append(Convolution(arguments[0].shape[1], result.shape[1], taps, tuple(grid.shape[2:])))

    with torch.device("meta"):
        network = get_network_from_plans(
            architecture["network_class_name"],
            dict(architecture["arch_kwargs"]),
            architecture["_kw_requires_import"],
            channels,
            classes,
            allow_init=False,
            deep_supervision=False,
        )
        for module in network.modules():
            if isinstance(module, (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
                module.register_forward_hook(record)
        network(torch.empty(1, channels, *configuration["patch_size"]))
    return found


def harmonizer_convolutions(
    kind: str, options: Mapping[str, Any], *, channels: int, patch_size: Sequence[int]
) -> list[Convolution]:
    """Convolutions of what runs at prediction: all of a harmonizer's are at full resolution."""
    dims = len(patch_size)
    harmonizer = build_harmonizer(kind, options, num_channels=channels, spatial_dims=dims, styles=[], reference=None)
    weights = [weight for weight in harmonizer.mapping_parameters() if weight.ndim == dims + 2]
    once = [
        Convolution(w.shape[1], w.shape[0], math.prod(w.shape[2:]), tuple(patch_size), doubled=True) for w in weights
    ]
    return once * int(options.get("n_steps", 1))
