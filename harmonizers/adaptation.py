"""A site, or a volume, that the harmonizer was not trained with: its source is measured, no weight moves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from nnunet_fedharm.harmonizers.base import INVERTED_BELOW, SITE_LOCAL, Harmonizer, read_source
from nnunet_fedharm.harmonizers.polarity import JudgedHarmonizer
from nnunet_fedharm.harmonizers.style import Style, volume_quantiles

JUDGED_SLICES = 32
"""Slices of a volume that a 2d judge votes on."""

MAX_JUDGED_VOXELS = 2**22
"""Voxels of a channel that a 3d judge sees, the centre of a larger volume: its activations are kept for all of them at once."""

LIKENESS = 0.75
"""A volume is taken for a known site's up to this share of the distance between that site and its nearest neighbour. On the
hippocampus sites the whole distance leaves too many volumes of a site that is missing from the bank as they are, half of it
too few of the reference's."""

FIXED_KINDS = frozenset({"none", "augment"})
"""Kinds that change nothing at prediction, so that there is nothing to adapt to a site."""


@torch.no_grad()
def measure_source(harmonizer: Harmonizer, volume: Float[Tensor, "c d h w"]) -> tuple[Style, list[float]]:
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
    else:
        batch = _centre(batch)
    quantiles = torch.as_tensor(style.quantiles, dtype=torch.float32, device=device).expand(len(batch), -1, -1)
    return style, harmonizer.votes(batch.to(device), quantiles).mean(dim=0).tolist()


def _centre(batch: Float[Tensor, "b c *spatial"]) -> Float[Tensor, "b c *kept"]:
    """At most MAX_JUDGED_VOXELS of each channel, in the volume's proportions."""
    share = min(1.0, (MAX_JUDGED_VOXELS / batch[0, 0].numel()) ** (1 / 3))
    sizes = [max(1, int(share * size)) for size in batch.shape[2:]]
    window = tuple(
        slice((size - kept) // 2, (size - kept) // 2 + kept) for size, kept in zip(batch.shape[2:], sizes, strict=True)
    )
    return batch[(slice(None), slice(None), *window)]


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


@contextmanager
def volume_source(harmonizer: Harmonizer, volume: Float[Tensor, "c d h w"]) -> Iterator[None]:
    """Inside the block the source is the volume's own style and polarity; afterwards the stored one holds again.

    The gate is the stored one if a source is stored, else `known_gate`'s.
    """
    style, polarity = measure_source(harmonizer, volume)
    stored = bool(harmonizer.source_known)
    gate = float(harmonizer.source_gate) if stored else known_gate(harmonizer, style, polarity)
    with kept_source(harmonizer):
        harmonizer.set_source(style, polarity=polarity, gate=gate)
        yield


@torch.no_grad()
def known_gate(harmonizer: Harmonizer, style: Style, polarity: Sequence[float]) -> float:
    """Gate of the site of the bank that a volume cannot be told from; 1 if there is none.

    That site is the nearest one of the volume's polarity, if the volume is nearer to it than LIKENESS of the way to the
    site's nearest neighbour in the bank. So a volume like the reference's keeps its images, and one unlike every site is
    harmonized. Nearest alone would not do: a site that is missing from the bank may lie nearest to the reference, though
    far from it.
    """
    bank = harmonizer.bank_quantiles
    inverted = torch.tensor([polarity], device=bank.device) < INVERTED_BELOW
    agrees = harmonizer.agrees_with_bank(inverted)[0]
    if not agrees.any():
        return 1.0
    quantiles = torch.as_tensor(style.quantiles, dtype=bank.dtype, device=bank.device)
    distance = harmonizer.distance_to_bank(quantiles[None])[0]
    nearest = int(torch.where(agrees, distance, torch.inf).argmin())
    apart = harmonizer.distance_to_bank(bank[nearest : nearest + 1])[0]
    others = apart[apart > 0]
    if not len(others) or distance[nearest] > LIKENESS * others.min():
        return 1.0
    return float(harmonizer.bank_gate[nearest])


def source_buffers(harmonizer: Harmonizer) -> dict[str, Tensor]:
    """Copies of the buffers that say where a copy's images come from, on the CPU, by their names in the harmonizer."""
    return {name: getattr(harmonizer, name).detach().cpu().clone() for name in SITE_LOCAL}
