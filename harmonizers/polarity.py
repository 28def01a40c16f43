"""Whether a site shows the reference's contrast or its inverse, as T2 does to T1: one sign per site and channel.

Quantiles cannot tell: on the hippocampus sites the inverted reference's quantiles are nearer to an uninverted site's than
the reference's own are. Anatomy can. A small judge learns at the reference, from the reference's own patches, which of a patch
and its inverse is the right way up, both brought to the reference's quantiles so that only structure is left to look at.
Every site then lets it vote on its own patches. Judge and votes are shared; images are not.
"""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from nnunet_fedharm.harmonizers.resnet import PatchDiscriminator
from nnunet_fedharm.harmonizers.smooth import random_log_gain
from nnunet_fedharm.harmonizers.tone import apply_displacement, quantile_map

INVERTED_BELOW = -0.25
"""A site counts as inverted when its mean vote, in [-1, 1], falls below this: without evidence nothing is inverted."""

VOTE_MOMENTUM = 0.05
"""Share of a batch's vote in the running mean."""

FIELD = 0.15
"""Standard deviation of the random log gain that the judge has to look through."""

SHARPNESS = 5.0
"""Factor on the mean score: the mean over a patch starts so small that the judge would first have to learn to speak up."""


def dress(
    image: Float[Tensor, "b c *spatial"],
    own: Float[Tensor, "b c q"],
    wanted: Float[Tensor, "b c q"],
    inverted: Bool[Tensor, "b c"],
) -> Float[Tensor, "b c *spatial"]:
    """The image in the wanted quantiles, after a change of sign where `inverted` says so; zeros stay zero.

    Args:
        image: z-scored.
        own: its quantiles.
        wanted: quantiles to map to.
        inverted: per sample and channel.
    """
    turned_own = torch.where(inverted[..., None], -own.flip(-1), own)
    turned = torch.where(expand(inverted, image), -image, image)
    return turned + (image != 0) * apply_displacement(turned, quantile_map(turned_own, wanted).to(image.dtype))


def expand(value: Tensor, image: Tensor) -> Tensor:
    """(B,) or (B, C) with trailing axes of length 1, so that it broadcasts over the image."""
    return value.reshape(*value.shape, *([1] * (image.ndim - value.ndim)))


class PolarityJudge(nn.Module):
    """Scores how much a patch looks the right way up, one channel at a time.

    Args:
        channels: C; the judge is told which channel it sees.
        spatial_dims: 2 or 3.
        width: channels after the first convolution.
    """

    def __init__(self, *, channels: int, spatial_dims: int, width: int) -> None:
        super().__init__()
        self.channels = channels
        self.network = PatchDiscriminator(channels=1, spatial_dims=spatial_dims, width=width, style_size=channels)

    def forward(
        self,
        image: Float[Tensor, "b c *spatial"],
        own: Float[Tensor, "b c q"],
        reference: Float[Tensor, "b c q"],
    ) -> Float[Tensor, "b c"]:
        """Log odds that each channel is the right way up; changes sign with the image."""
        inverted = torch.zeros(image.shape[:2], dtype=torch.bool, device=image.device)
        upright, upset = dress(image, own, reference, inverted), dress(image, own, reference, ~inverted)
        return self._score(upright) - self._score(upset)

    def _score(self, image: Tensor) -> Float[Tensor, "b c"]:
        which = repeat(torch.eye(self.channels, device=image.device), "c d -> (b c) d", b=len(image))
        scores = self.network(rearrange(image, "b c ... -> (b c) 1 ..."), which)
        return SHARPNESS * rearrange(scores.flatten(1).mean(dim=1), "(b c) -> b c", b=len(image))

    def loss(self, image: Tensor, reference: Float[Tensor, "b c q"], generator: torch.Generator) -> Float[Tensor, ""]:
        """Cross-entropy on the reference's own patches, under a random smooth field."""
        field = torch.exp(random_log_gain(image, FIELD, generator))
        return functional.softplus(-self(image * field, reference, reference)).mean()


@torch.no_grad()
def vote(polarity: Float[Tensor, "k c"], log_odds: Float[Tensor, "b c"], sites: Int[Tensor, " b"]) -> None:
    """Move the running mean votes of the batch's sites, in place."""
    votes = torch.tanh(log_odds / 2)  # the judge's probability, as a number between -1 and 1
    for site in sites.unique():
        polarity[site].lerp_(votes[sites == site].mean(dim=0), VOTE_MOMENTUM)
