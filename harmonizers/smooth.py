"""Gaussian blur inside a mask, and random smooth fields."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

TRUNCATE = 2.5
"""Kernels end at this many standard deviations: the receptive field that decides how far from a border windows agree."""


class MaskedBlur:
    """Normalised convolution: the Gaussian mean of the voxels inside a mask.

    Args:
        inside: 1 where a voxel counts, 0 elsewhere; (B, C, *spatial).
        sigma: standard deviation in voxels.
    """

    def __init__(self, inside: Float[Tensor, "b c *spatial"], sigma: float) -> None:
        self.inside = inside
        self.sigma = sigma
        self.weight = gaussian_filter(inside, sigma).clamp(min=1e-3)

    def __call__(self, image: Float[Tensor, "b c *spatial"]) -> Float[Tensor, "b c *spatial"]:
        """Same shape as `image`; 0 where no voxel inside the mask is within reach."""
        return gaussian_filter(image * self.inside, self.sigma) / self.weight


def gaussian_filter(image: Float[Tensor, "b c *spatial"], sigma: float) -> Float[Tensor, "b c *spatial"]:
    """Separable Gaussian, cut at TRUNCATE standard deviations, zeros outside.

    Each axis is one product with a banded matrix: on patches, whose axes are short, this is many times faster than a
    one-channel convolution with a long kernel, on CPU and on GPU.
    """
    radius = max(1, math.ceil(TRUNCATE * sigma))
    taps = torch.arange(-radius, radius + 1, device=image.device, dtype=torch.float32)
    total = torch.exp(-0.5 * (taps / sigma) ** 2).sum()
    for axis in range(2, image.ndim):
        place = torch.arange(image.shape[axis], device=image.device, dtype=torch.float32)
        distance = (place[:, None] - place[None, :]).abs()
        band = torch.where(distance <= radius, torch.exp(-0.5 * (distance / sigma) ** 2) / total, 0.0)
        image = (image.movedim(axis, -1) @ band.to(image.dtype)).movedim(-1, axis)
    return image


def random_log_gain(image: Float[Tensor, "b c *spatial"], scale: float, generator: torch.Generator) -> Tensor:
    """Random smooth log gain: a coarse grid of normal values, cubic or linear in between, mean zero over the patch.

    Args:
        image: gives batch, channels and size.
        scale: standard deviation of the field.
        generator: on the CPU.

    Returns:
        (B, C, *spatial); all channels of a sample share the field, as they share the coil.
    """
    spatial = image.ndim - 2
    coarse = torch.randn((image.shape[0], 1, *([3] * spatial)), generator=generator).to(image.device, image.dtype)
    mode = "bicubic" if spatial == 2 else "trilinear"
    field = functional.interpolate(coarse, size=image.shape[2:], mode=mode, align_corners=True)
    field = field - field.mean(dim=tuple(range(2, field.ndim)), keepdim=True)
    return scale * field.expand_as(image)
