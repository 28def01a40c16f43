"""Painted lesions: what a training set of healthy tissue does not teach a harmonizer to keep."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

PER_BLOCK = 2
"""Lesions in one painted sample."""
RADIUS = (0.7, 4.0)
"""Half-axes in voxels, each axis drawn by itself."""
STRENGTH = 1.5
"""Standard deviation of a lesion's change, in standard deviations of the volume, brighter as often as darker."""


def paint_lesions(
    image: Float[Tensor, "b c *spatial"], mask: Tensor, share: float, generator: torch.Generator
) -> Float[Tensor, "b c *spatial"]:
    """Add smooth ellipsoids to a share of the samples, the same in every channel but for their strength.

    Their profile exp(-r^4) is flat inside and smooth at the rim; evaluation paints hard spheres of one strength.

    Args:
        image: z-scored patches.
        mask: True where voxels count; the others stay exactly as they are.
        share: of the samples, in [0, 1].
    """
    count, channels, *shape = image.shape
    painted = torch.rand(count, generator=generator) < share
    change = torch.zeros_like(image)
    for _ in range(PER_BLOCK):
        distance = torch.zeros(count, 1, *shape, device=image.device)
        for axis, size in enumerate(shape):
            centre = torch.rand(count, generator=generator) * size - 0.5
            half = RADIUS[0] + (RADIUS[1] - RADIUS[0]) * torch.rand(count, generator=generator)
            place = torch.arange(size, device=image.device) - centre[:, None].to(image.device)
            view = [count, 1, *(size if other == axis else 1 for other in range(len(shape)))]
            distance = distance + (place / half[:, None].to(image.device)).square().reshape(view)
        strength = STRENGTH * torch.randn(count, channels, generator=generator) * painted[:, None]
        change = change + torch.exp(-distance.square()) * strength.to(image).reshape(count, channels, *[1] * len(shape))
    return torch.where(mask, image + change.to(image.dtype), image)
