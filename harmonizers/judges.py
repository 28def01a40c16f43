"""Judges of contrast: which of a patch and its inverse is the right way up, both in the reference's quantiles.

`NetworkJudge` is a small network, trained as a whole. `LinearJudge` weighs fixed random features and learns one direction a
channel from zero: some dozens of numbers, which learn under the noise of differential privacy where thousands drown in it
(docs/experiments/private-harmonizer).

References:
    Rahimi, Recht, "Random features for large-scale kernel machines", NeurIPS 2007 (features that are drawn and not learned).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cache

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from nnunet_fedharm.harmonizers.base import patch_quantiles
from nnunet_fedharm.harmonizers.resnet import MirrorConv, PatchDiscriminator
from nnunet_fedharm.harmonizers.smooth import random_log_gain
from nnunet_fedharm.harmonizers.style import QUANTILE_LEVELS
from nnunet_fedharm.harmonizers.tone import apply_displacement, quantile_map

FIELD = 0.15
"""Standard deviation of the random log gain that a judge has to look through."""

SHARPNESS = 5.0
"""Factor on a network's mean score: the mean over a patch starts so small that it would first have to learn to speak up."""
PACE = 250.0
"""Factor on a direction, which starts at zero: with the learning rates of networks it is outspoken after some dozens of steps."""

GAIN = 2.0
"""Factor on the kernels that a judge begins with. At 1, and in batches of a few slices, the network's score falls to zero before
it has learned anything, and the loss has a plateau there (docs/experiments/polarity-judge).
"""

FIELDS = 64
"""Random fields from which `whitening` is measured."""
FIELD_SIZE = {2: 48, 3: 24}
"""Their length in voxels, by dimensions."""
FIELD_SCALES = (2, 4, 8, 16)
"""Voxels between the knots of what such a field is a random mixture of."""
RIDGE = 0.1
"""Share of the mean variance that is added to every direction before it is whitened."""


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


class Judge(nn.Module, ABC):
    """Scores how much a patch looks the right way up, one channel at a time.

    Args:
        channels: C; the judge is told which channel it sees.
        spatial_dims: 2 or 3.
        width: channels after the first convolution.
    """

    def __init__(self, *, channels: int, spatial_dims: int, width: int, style_size: int = 0) -> None:
        super().__init__()
        self.channels = channels
        self.network = _network(spatial_dims, width, style_size)

    def forward(
        self,
        image: Float[Tensor, "b c *spatial"],
        own: Float[Tensor, "b c q"],
        reference: Float[Tensor, "b c q"],
    ) -> Float[Tensor, "b c"]:
        """Log odds that each channel is the right way up; changes sign with the image."""
        inverted = torch.zeros(image.shape[:2], dtype=torch.bool, device=image.device)
        return self.compare(dress(image, own, reference, inverted), dress(image, own, reference, ~inverted))

    @abstractmethod
    def compare(self, upright: Tensor, upset: Tensor) -> Float[Tensor, "b c"]:
        """Log odds that the first and not the second is the right way up; both (B, C, *spatial)."""

    @abstractmethod
    def taught(self) -> list[nn.Parameter]:
        """The parameters that are trained."""

    def loss(self, image: Tensor, reference: Float[Tensor, "b c q"], generator: torch.Generator) -> Float[Tensor, ""]:
        """Cross-entropy on the reference's own patches, under a random smooth field."""
        field = torch.exp(random_log_gain(image, FIELD, generator))
        return functional.softplus(-self(image * field, reference, reference)).mean()


class NetworkJudge(Judge):
    """A patch discriminator, trained as a whole; arguments as of `Judge`."""

    def __init__(self, *, channels: int, spatial_dims: int, width: int) -> None:
        super().__init__(channels=channels, spatial_dims=spatial_dims, width=width, style_size=channels)

    def compare(self, upright: Tensor, upset: Tensor) -> Float[Tensor, "b c"]:
        return self._score(upright) - self._score(upset)

    def taught(self) -> list[nn.Parameter]:
        return list(self.network.parameters())

    def _score(self, image: Tensor) -> Float[Tensor, "b c"]:
        which = repeat(torch.eye(self.channels, device=image.device), "c d -> (b c) d", b=len(image))
        scores = self.network(rearrange(image, "b c ... -> (b c) 1 ..."), which)
        return SHARPNESS * rearrange(scores.flatten(1).mean(dim=1), "(b c) -> b c", b=len(image))


class LinearJudge(Judge):
    """Mean random features of a patch less those of its inverse, whitened and of length 1, weighed by a learned direction.

    Both are brought to the reference's quantiles from the patch's own, not from its site's: what tells is then structure alone. A
    site's quantiles can carry noise, and with it this judge would learn that noise instead of anatomy.

    What is whitened are the differences between random smooth fields and their inverses, which have no right way up: without it
    they drown the ones that tell. Length 1 bounds what any patch can do to the direction's gradient. Untrained it has no opinion.

    Args:
        channels, spatial_dims, width: as of `Judge`; the direction has 2 * width numbers a channel.
    """

    direction: nn.Parameter
    whitening: Tensor

    def __init__(self, *, channels: int, spatial_dims: int, width: int) -> None:
        super().__init__(channels=channels, spatial_dims=spatial_dims, width=width)
        self.network.load_state_dict(_random_network(spatial_dims, width).state_dict())
        self.register_buffer("whitening", _whitening(spatial_dims, width).clone())
        self.direction = nn.Parameter(torch.zeros(channels, 2 * width))

    def forward(
        self,
        image: Float[Tensor, "b c *spatial"],
        own: Float[Tensor, "b c q"],
        reference: Float[Tensor, "b c q"],
    ) -> Float[Tensor, "b c"]:
        """As of `Judge`; `own` is not looked at."""
        return super().forward(image, patch_quantiles(image, image != 0), reference)

    def compare(self, upright: Tensor, upset: Tensor) -> Float[Tensor, "b c"]:
        with torch.no_grad():
            difference = _mean_features(self.network, upright) - _mean_features(self.network, upset)
            seen = functional.normalize(einsum(difference, self.whitening, "b c f, g f -> b c g"), dim=-1)
        return PACE * einsum(seen, self.direction, "b c f, c f -> b c")

    def taught(self) -> list[nn.Parameter]:
        return [self.direction]


JUDGES: dict[str, type[NetworkJudge | LinearJudge]] = {"network": NetworkJudge, "linear": LinearJudge}
"""Judges by the name that plans have for them."""


def _mean_features(network: PatchDiscriminator, image: Float[Tensor, "b c *spatial"]) -> Float[Tensor, "b c f"]:
    found = network.features(rearrange(image, "b c ... -> (b c) 1 ..."))
    return rearrange(found.flatten(2).mean(dim=2), "(b c) f -> b c f", b=len(image))


def _network(spatial_dims: int, width: int, style_size: int = 0) -> PatchDiscriminator:
    """For one channel, with the kernels that judges begin with."""
    network = PatchDiscriminator(channels=1, spatial_dims=spatial_dims, width=width, style_size=style_size)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, MirrorConv):
                module.weight.mul_(GAIN)
    return network


@cache
def _random_network(spatial_dims: int, width: int) -> PatchDiscriminator:
    """One that nobody trains: the same in every process, as `_whitening` belongs to it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _network(spatial_dims, width)


@cache
@torch.no_grad()
def _whitening(spatial_dims: int, width: int) -> Float[Tensor, "f f"]:
    """Inverse Cholesky factor of the differences' second moment over random smooth fields and their inverses."""
    network = _random_network(spatial_dims, width)
    fields = torch.cat([_random_field(spatial_dims, index) for index in range(FIELDS)])
    normal = torch.special.ndtri(torch.tensor(QUANTILE_LEVELS, dtype=torch.float32)).expand(FIELDS, 1, -1)
    upright = torch.zeros(FIELDS, 1, dtype=torch.bool)
    seen = [_mean_features(network, dress(fields, normal, normal, turned)) for turned in (upright, ~upright)]
    difference = rearrange(seen[0] - seen[1], "b 1 f -> b f").double()
    moment = difference.mT @ difference / FIELDS
    identity = torch.eye(len(moment), dtype=moment.dtype)
    ridge = RIDGE * moment.diagonal().mean() * identity
    return torch.linalg.solve_triangular(torch.linalg.cholesky(moment + ridge), identity, upper=False).float()


def _random_field(spatial_dims: int, index: int) -> Float[Tensor, "1 1 *spatial"]:
    generator = torch.Generator().manual_seed(index)
    shape = (FIELD_SIZE[spatial_dims],) * spatial_dims
    field = torch.zeros(1, 1, *shape)
    for scale in FIELD_SCALES:
        knots = torch.randn(1, 1, *(math.ceil(size / scale) + 1 for size in shape), generator=generator)
        mode = "bilinear" if spatial_dims == 2 else "trilinear"
        field += torch.rand(1, generator=generator) * functional.interpolate(knots, size=shape, mode=mode)
    return (field - field.mean()) / field.std()
