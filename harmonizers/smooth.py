"""Gaussian blur inside a mask, and random smooth fields."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

TRUNCATE = 2.5
"""Kernels end at this many standard deviations: the receptive field that decides how far from a border windows agree."""


def gaussian_blur(
    image: Float[Tensor, "b c *spatial"], inside: Float[Tensor, "b m *spatial"], sigma: float
) -> Float[Tensor, "b c *spatial"]:
    """Normalised convolution: the Gaussian mean of the voxels inside the mask.

    Args:
        image: (B, C, *spatial).
        inside: 1 where a voxel counts, 0 elsewhere; (B, C, *spatial), or one channel for all.
        sigma: standard deviation in voxels.

    Returns:
        Same shape as `image`; 0 where no voxel inside the mask is within reach.
    """
    weight = _blur_axes(inside, sigma)
    return _blur_axes(image * inside, sigma) / weight.clamp(min=1e-3)


def _blur_axes(image: Tensor, sigma: float) -> Tensor:
    """Separable Gaussian with zero padding, one axis after the other."""
    radius = max(1, math.ceil(TRUNCATE * sigma))
    taps = torch.arange(-radius, radius + 1, device=image.device, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (taps / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(image.dtype)
    spatial = image.ndim - 2
    convolve = functional.conv2d if spatial == 2 else functional.conv3d
    flat = image.reshape(-1, 1, *image.shape[2:])
    for axis in range(spatial):
        shape = [1] * spatial
        shape[axis] = len(kernel)
        padding = [0] * spatial
        padding[axis] = radius
        flat = convolve(flat, kernel.reshape(1, 1, *shape), padding=padding)
    return flat.reshape(image.shape)


def random_log_gain(image: Float[Tensor, "b c *spatial"], scale: float, generator: torch.Generator) -> Tensor:
    """Random smooth log gain: a coarse grid of normal values, cubic or linear in between, mean zero over the patch.

    Args:
        image: gives batch, channels and size.
        scale: standard deviation of the field.
        generator: on the CPU.

    Returns:
        (B, C, *spatial); all channels of a sample share the field up to a sign-free factor, as coils do.
    """
    spatial = image.ndim - 2
    coarse = torch.randn((image.shape[0], 1, *([3] * spatial)), generator=generator).to(image.device, image.dtype)
    mode = "bicubic" if spatial == 2 else "trilinear"
    field = functional.interpolate(coarse, size=image.shape[2:], mode=mode, align_corners=True)
    field = field - field.mean(dim=tuple(range(2, field.ndim)), keepdim=True)
    return scale * field.expand_as(image)
