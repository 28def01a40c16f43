"""The seam between a harmonizer and everything else: what it stores, where its style comes from, and the identity start.

Every harmonizer computes `y = x + gate * m * (H(x, style) - x)` with m = voxels that are not exactly zero (padding and
nnU-Net's outside of the nonzero mask stay zero). Before training y equals x bit for bit, so step 0 is plain nnU-Net.

The style of an input is taken from, in this order: the styles set for the batch by the trainer (each case's site is known),
the source style stored for this copy of the network (a site's own checkpoint), the nearest style of the bank judged by the
patch's own quantiles (a checkpoint that serves all sites). The choice is discrete, so windows of one volume agree.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from nnunet_fedharm.errors import PlanError, ShapeError
from nnunet_fedharm.harmonizers.style import QUANTILE_LEVELS, Style
from nnunet_fedharm.harmonizers.training import HarmonizerTraining, SelfPairedTraining

SITE_LOCAL = ("source_quantiles", "source_offset", "source_known")
"""Buffers that belong to one site's copy and are never sent or averaged."""

MAX_STYLE_VOXELS = 16384
"""Voxels a patch's quantiles are estimated from; the standard error of a median is then about 0.01 standard deviations."""


class Harmonizer(nn.Module, ABC):
    """H: (B, C, *spatial) -> (B, C, *spatial) on z-scored patches.

    Args:
        num_channels: C, number of MR channels.
        spatial_dims: 2 or 3.
        styles: the style bank, one style per site in the plans' order; may be empty.
        reference: the style to map to; None with an empty bank.

    Raises:
        PlanError: a style has another number of channels than the images.
    """

    learned: bool = False
    """True when there are weights to train in the harmonizer phase."""

    gate: Tensor
    reference_quantiles: Tensor
    reference_offset: Tensor
    bank_quantiles: Tensor
    bank_offset: Tensor
    source_quantiles: Tensor
    source_offset: Tensor
    source_known: Tensor
    trained_epochs: Tensor

    def __init__(self, *, num_channels: int, spatial_dims: int, styles: list[Style], reference: Style | None) -> None:
        super().__init__()
        for style in [*styles, *([reference] if reference else [])]:
            if style.quantiles.shape[0] != num_channels:
                raise PlanError(
                    f"A style in the plans has {style.quantiles.shape[0]} channels, the images have {num_channels}. "
                    "Make the plans again with `nnunet-fedharm plan`."
                )
        self.num_channels = num_channels
        self.spatial_dims = spatial_dims
        levels = len(QUANTILE_LEVELS)
        neutral = torch.zeros(num_channels, levels)
        self.register_buffer("gate", torch.ones(()))
        self.register_buffer("trained_epochs", torch.zeros((), dtype=torch.int64))
        self.register_buffer("reference_quantiles", _tensor(reference.quantiles) if reference else neutral.clone())
        self.register_buffer("reference_offset", _tensor(reference.offset) if reference else torch.zeros(num_channels))
        empty = torch.zeros(0, num_channels, levels)
        self.register_buffer("bank_quantiles", torch.stack([_tensor(s.quantiles) for s in styles]) if styles else empty)
        self.register_buffer(
            "bank_offset", torch.stack([_tensor(s.offset) for s in styles]) if styles else torch.zeros(0, num_channels)
        )
        self.register_buffer("source_quantiles", neutral.clone())
        self.register_buffer("source_offset", torch.zeros(num_channels))
        self.register_buffer("source_known", torch.zeros((), dtype=torch.bool))
        # A Python copy of `source_known`: reading the buffer in forward would synchronise the GPU at every patch.
        self._source_known = False
        self._batch_styles: Int[Tensor, " b"] | None = None
        self.register_load_state_dict_post_hook(_read_source_known)  # type: ignore[no-untyped-call]

    @abstractmethod
    def transform(
        self,
        image: Float[Tensor, "b c *spatial"],
        mask: Tensor,
        quantiles: Float[Tensor, "b c q"],
        offset: Float[Tensor, "b c"],
    ) -> Float[Tensor, "b c *spatial"]:
        """The residual H(x, style) - x, (B, C, *spatial); exactly zero before training.

        Args:
            image: z-scored patch.
            mask: True where the voxel counts, same shape.
            quantiles: source style per sample.
            offset: source offset (mu / sigma) per sample.
        """

    def forward(self, image: Float[Tensor, "b c *spatial"]) -> Float[Tensor, "b c *spatial"]:
        """Map a patch to the reference style.

        Raises:
            ShapeError: channels or spatial dimensions differ from the plans'.
        """
        if image.ndim != self.spatial_dims + 2 or image.shape[1] != self.num_channels:
            raise ShapeError(
                f"The harmonizer was planned for (B, {self.num_channels}, {self.spatial_dims} spatial axes), "
                f"got {tuple(image.shape)}."
            )
        mask = image != 0
        quantiles, offset = self.style_of(image, mask)
        return image + self.gate * mask * self.transform(image, mask, quantiles, offset)

    def style_of(self, image: Tensor, mask: Tensor) -> tuple[Float[Tensor, "b c q"], Float[Tensor, "b c"]]:
        """Source quantiles (B, C, Q) and offset (B, C) of each sample; see the module's docstring for the order."""
        batch = image.shape[0]
        if self._batch_styles is not None:
            if self._batch_styles.shape[0] != batch:
                raise ShapeError(f"Styles were set for {self._batch_styles.shape[0]} samples, the batch has {batch}.")
            return self.bank_quantiles[self._batch_styles], self.bank_offset[self._batch_styles]
        if self._source_known:
            return self.source_quantiles.expand(batch, -1, -1), self.source_offset.expand(batch, -1)
        if self.bank_quantiles.shape[0] == 0:
            return self.reference_quantiles.expand(batch, -1, -1), self.reference_offset.expand(batch, -1)
        nearest = self.nearest_style(image, mask)
        return self.bank_quantiles[nearest], self.bank_offset[nearest]

    @torch.no_grad()
    def nearest_style(self, image: Tensor, mask: Tensor) -> Int[Tensor, " b"]:
        """Index (B,) of the bank's style with the smallest mean Wasserstein-1 distance to the patch's histogram."""
        quantiles = patch_quantiles(image, mask)
        distance = (quantiles[:, None] - self.bank_quantiles[None]).abs().mean(dim=(2, 3))
        return distance.argmin(dim=1)

    def set_batch_styles(self, sites: Int[Tensor, " b"] | None) -> None:
        """Tell the site (index into the bank) of each sample of the next batches; None returns to the stored style."""
        self._batch_styles = None if sites is None else sites.to(self.bank_quantiles.device)

    def set_source(self, style: Style | None) -> None:
        """Store the style of the one site that this copy serves; None makes the copy serve all sites of the bank."""
        self._source_known = style is not None
        self.source_known.fill_(self._source_known)
        if style is not None:
            self.source_quantiles.copy_(_tensor(style.quantiles))
            self.source_offset.copy_(_tensor(style.offset))

    def open_gate(self) -> None:
        """Let the residual through: called once the harmonizer phase is over (or has nothing to learn)."""
        self.gate.fill_(1.0)

    def make_training(self, *, lr: float, total_epochs: int) -> HarmonizerTraining:
        """Optimizers and steps of the harmonizer phase; a harmonizer that needs more than one optimizer brings its own."""
        return SelfPairedTraining(self, lr=lr, total_epochs=total_epochs)

    def mapping_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that the output depends on: those that a segmentation loss may move."""
        return self.parameters()

    def trains_on(self, site: int) -> bool:
        """Whether images of that site of the bank take part in the harmonizer phase; a site without such images sits it out."""
        return True

    def round_weight(self, site: int) -> float:
        """What a federated round of that site weighs in the mean, against one that trains everything."""
        return 1.0

    def reference_sites(self) -> list[int]:
        """Sites of the bank whose style is the reference; none where the reference is a consensus of several sites."""
        equal = (self.bank_quantiles == self.reference_quantiles).flatten(1).all(dim=1)
        return [int(site) for site in equal.nonzero().flatten()]

    def self_paired_loss(self, image: Tensor, sites: Int[Tensor, " b"], generator: torch.Generator) -> Tensor:
        """Scalar loss of the unsupervised harmonizer phase; no labels, no other site's image.

        Args:
            image: own patches, (B, C, *spatial).
            sites: index into the bank of each patch's site.
            generator: source of every random draw, on the CPU.

        Raises:
            PlanError: this harmonizer has nothing to learn.
        """
        raise PlanError(f"The harmonizer {type(self).__name__} has nothing to learn; set harmonizer_epochs to 0.")


def patch_quantiles(image: Float[Tensor, "b c *spatial"], mask: Tensor) -> Float[Tensor, "b c q"]:
    """Quantiles of the voxels inside the mask, at QUANTILE_LEVELS, from at most MAX_STYLE_VOXELS evenly strided voxels.

    Samples without any voxel give zeros.
    """
    stride = _even_stride(image.shape[2:])
    values = rearrange(image.float(), "b c ... -> b c (...)")
    inside = rearrange(mask, "b c ... -> b c (...)")
    values = torch.where(inside[..., ::stride], values[..., ::stride], torch.nan)
    levels = torch.tensor(QUANTILE_LEVELS, device=image.device, dtype=values.dtype)
    return rearrange(torch.nanquantile(values, levels, dim=-1), "q b c -> b c q").nan_to_num(0.0)


def _even_stride(spatial: Sequence[int]) -> int:
    """Stride over the flattened patch that leaves about MAX_STYLE_VOXELS voxels and visits every row and column alike.

    A stride that shares a factor with an axis would see some of its positions only: 128 on 128^3 a single column.
    """
    stride = max(1, math.prod(spatial) // MAX_STYLE_VOXELS)
    while any(math.gcd(stride, size) > 1 for size in spatial):
        stride += 1
    return stride


def _tensor(array: Any) -> Tensor:
    return torch.as_tensor(array, dtype=torch.float32)


def _read_source_known(module: nn.Module, _incompatible: Any) -> None:
    if isinstance(module, Harmonizer):
        module._source_known = bool(module.source_known)
