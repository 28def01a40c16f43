"""A site, or a volume, that the harmonizer was not trained with: its source is measured, no weight moves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from nnunet_fedharm.harmonizers.base import SITE_LOCAL, Harmonizer, read_source
from nnunet_fedharm.harmonizers.polarity import JudgedHarmonizer
from nnunet_fedharm.harmonizers.style import Style, volume_quantiles

JUDGED_SLICES = 32
"""Slices of a volume that a 2d judge votes on."""


@torch.no_grad()
def measure_source(harmonizer: Harmonizer, volume: Float[Tensor, c * spatial]) -> tuple[Style, list[float]]:
    """Style and polarity of one preprocessed volume.

    Args:
        harmonizer: whose judge of polarity votes; without one nothing is inverted.
        volume: (C, D, H, W), z-scored, also for a 2d harmonizer.

    Returns:
        The style, and the judge's vote per channel in [-1, 1].
    """
    style = Style(*volume_quantiles(np.asarray(volume.cpu())), n_cases=1)
    if not isinstance(harmonizer, JudgedHarmonizer) or harmonizer.polarity_judge is None:
        return style, [1.0] * harmonizer.num_channels
    device = harmonizer.gate.device
    batch = volume[None]
    if harmonizer.spatial_dims == 2:
        batch = rearrange(volume, "c d h w -> d c h w")
        middle = torch.linspace(0.25, 0.75, min(JUDGED_SLICES, len(batch))) * (len(batch) - 1)
        batch = batch[middle.round().long()]
    quantiles = torch.as_tensor(style.quantiles, dtype=torch.float32, device=device).expand(len(batch), -1, -1)
    return style, harmonizer.votes(batch.to(device), quantiles).mean(dim=0).tolist()


@contextmanager
def kept_source(harmonizer: Harmonizer) -> Iterator[None]:
    """Whatever is set as source inside the block, afterwards the stored one holds again."""
    before = {name: getattr(harmonizer, name).clone() for name in SITE_LOCAL}
    try:
        yield
    finally:
        for name, value in before.items():
            getattr(harmonizer, name).copy_(value)
        read_source(harmonizer, None)
