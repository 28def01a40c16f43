"""The seam between a harmonizer and everything else: what it stores, where its style comes from, and the identity start.

Every harmonizer computes `y = x + gate * m * (H(x, source) - x)` with m = voxels that are not exactly zero (padding and
nnU-Net's outside of the nonzero mask stay zero). Before training y equals x bit for bit, so step 0 is plain nnU-Net. Each site
has a gate of its own. The gate of a site whose style is the reference is shut from the start: its images are what the others
are mapped to, so there nothing can be gained, and a segmenter with labels at the reference alone is plain nnU-Net's.

The source of an input is taken from, in this order: the sites set for the batch by the trainer (each case's site is known),
the source stored for this copy of the network (a site's own checkpoint), the nearest style of the bank judged by the
patch's own quantiles (a checkpoint that serves all sites). The choice is discrete, so windows of one volume agree.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nnunet_fedharm.errors import PlanError, ShapeError
from nnunet_fedharm.harmonizers.style import QUANTILE_LEVELS, Style
from nnunet_fedharm.harmonizers.training import HarmonizerTraining, SelfPairedTraining

SITE_LOCAL = ("source_quantiles", "source_offset", "source_polarity", "source_gate", "source_known")
"""Buffers that belong to one site's copy and are never sent or averaged."""

SITE_ROWS = ("bank_polarity", "bank_gate")
"""Buffers whose row k only site k of the bank may change: a federation takes each row from its site instead of a mean."""

INVERTED_BELOW = -0.25
"""A site counts as inverted when its mean vote, in [-1, 1], falls below this: without evidence nothing is inverted."""

MAX_STYLE_VOXELS = 16384
"""Voxels a patch's quantiles are estimated from; the standard error of a median is then about 0.01 standard deviations."""


@dataclass(frozen=True)
class Source:
    """Where the samples of a batch come from.

    Attributes:
        quantiles: (B, C, Q) of the site's style.
        offset: (B, C), mu / sigma.
        polarity: (B, C), the site's mean vote in [-1, 1] on being the right way up.
        gate: (B,), 1 where the residual passes, 0 where the site keeps its images.
    """

    quantiles: Float[Tensor, "b c q"]
    offset: Float[Tensor, "b c"]
    polarity: Float[Tensor, "b c"]
    gate: Float[Tensor, " b"]

    @property
    def inverted(self) -> Bool[Tensor, "b c"]:
        """Whether a channel shows the reference's contrast upside down."""
        return self.polarity < INVERTED_BELOW


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What every harmonizer is built for, whatever its kind.

    Attributes:
        num_channels: C, number of MR channels.
        spatial_dims: 2 or 3.
        styles: the style bank, one style per site in the plans' order; may be empty.
        reference: the style to map to; None with an empty bank.

    Raises:
        PlanError: a style has another number of channels than the images.
    """

    num_channels: int
    spatial_dims: int
    styles: Sequence[Style]
    reference: Style | None

    def __post_init__(self) -> None:
        for style in [*self.styles, *([self.reference] if self.reference else [])]:
            if style.quantiles.shape[0] != self.num_channels:
                raise PlanError(
                    f"A style in the plans has {style.quantiles.shape[0]} channels, the images have "
                    f"{self.num_channels}. Make the plans again with `nnunet-fedharm plan`."
                )


class Harmonizer(nn.Module, ABC):
    """H: (B, C, *spatial) -> (B, C, *spatial) on z-scored patches."""

    learned: bool = False
    """True when there are weights to train in the harmonizer phase."""

    gate: Tensor
    reference_quantiles: Tensor
    reference_offset: Tensor
    bank_quantiles: Tensor
    bank_offset: Tensor
    bank_polarity: Tensor
    bank_gate: Tensor
    source_quantiles: Tensor
    source_offset: Tensor
    source_polarity: Tensor
    source_gate: Tensor
    source_known: Tensor
    trained_epochs: Tensor

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        num_channels, styles, reference = setting.num_channels, setting.styles, setting.reference
        self.num_channels = num_channels
        self.spatial_dims = setting.spatial_dims
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
        self.register_buffer("bank_polarity", torch.ones(len(styles), num_channels))
        self.register_buffer("bank_gate", torch.ones(len(styles)))
        self.bank_gate[self._equal_to_reference()] = 0.0
        self.register_buffer("source_quantiles", neutral.clone())
        self.register_buffer("source_offset", torch.zeros(num_channels))
        self.register_buffer("source_polarity", torch.ones(num_channels))
        self.register_buffer("source_gate", torch.ones(()))
        self.register_buffer("source_known", torch.zeros((), dtype=torch.bool))
        # Python copies: reading the buffers in forward would synchronise the GPU at every patch.
        self._source_known = False
        self._source_shut = False
        self._batch_styles: Int[Tensor, " b"] | None = None
        self._batch_shut = False
        self.register_load_state_dict_post_hook(read_source)  # type: ignore[no-untyped-call]

    @abstractmethod
    def transform(
        self, image: Float[Tensor, "b c *spatial"], mask: Tensor, source: Source
    ) -> Float[Tensor, "b c *spatial"]:
        """The residual H(x, source) - x, (B, C, *spatial); exactly zero before training.

        Args:
            image: z-scored patch.
            mask: True where the voxel counts, same shape.
            source: what is known of where each sample comes from.
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
        if self._shut():
            return image
        mask = image != 0
        source = self.source_of(image, mask)
        gate = source.gate.reshape(-1, *([1] * (image.ndim - 1))).to(image.dtype)
        return image + self.gate * gate * mask * self.transform(image, mask, source)

    def _shut(self) -> bool:
        """Whether no sample's gate is open, so that the residual need not be computed."""
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters()):
            return False  # DDP waits for a gradient of every trainable weight
        return self._batch_shut if self._batch_styles is not None else self._source_known and self._source_shut

    def source_of(self, image: Tensor, mask: Tensor) -> Source:
        """Source of each sample; see the module's docstring for the order."""
        batch = image.shape[0]
        if self._batch_styles is not None:
            if self._batch_styles.shape[0] != batch:
                raise ShapeError(f"Styles were set for {self._batch_styles.shape[0]} samples, the batch has {batch}.")
            return self.bank_source(self._batch_styles)
        if self._source_known:
            return Source(
                self.source_quantiles.expand(batch, -1, -1),
                self.source_offset.expand(batch, -1),
                self.source_polarity.expand(batch, -1),
                self.source_gate.expand(batch),
            )
        if self.bank_quantiles.shape[0] == 0:
            return self.reference_source(batch)
        return self.bank_source(self.nearest_style(image, mask))

    def bank_source(self, sites: Int[Tensor, " b"]) -> Source:
        """Source of samples whose sites of the bank are known."""
        return Source(
            self.bank_quantiles[sites], self.bank_offset[sites], self.bank_polarity[sites], self.bank_gate[sites]
        )

    def reference_source(self, batch: int) -> Source:
        """Source of samples that look like the reference, gate open."""
        quantiles, offset = self.reference_quantiles.expand(batch, -1, -1), self.reference_offset.expand(batch, -1)
        return Source(quantiles, offset, torch.ones_like(offset), torch.ones_like(offset[:, 0]))

    @torch.no_grad()
    def nearest_style(self, image: Tensor, mask: Tensor) -> Int[Tensor, " b"]:
        """Index (B,) of the bank's style that is nearest to the patch's."""
        return self.distance_to_bank(patch_quantiles(image, mask)).argmin(dim=1)

    def distance_to_bank(self, quantiles: Float[Tensor, "b c q"]) -> Float[Tensor, "b k"]:
        """Wasserstein-1 distance of histograms to each style of the bank, mean over channels."""
        return (quantiles[:, None] - self.bank_quantiles).abs().mean(dim=(2, 3))

    def agrees_with_bank(self, inverted: Bool[Tensor, "b c"]) -> Bool[Tensor, "b k"]:
        """Whether each site of the bank is inverted in just these channels."""
        return ((self.bank_polarity < INVERTED_BELOW) == inverted[:, None]).all(dim=2)

    def set_batch_styles(self, sites: Int[Tensor, " b"] | None) -> None:
        """Tell the site (index into the bank) of each sample of the next batches; None returns to the stored source."""
        self._batch_styles, self._batch_shut = None, False
        if sites is not None:
            shut = self.bank_gate == 0
            self._batch_shut = bool(shut[sites.to(shut.device)].all())
            self._batch_styles = sites.to(self.bank_quantiles.device)

    def set_source(self, style: Style | None, *, polarity: Sequence[float] | None = None, gate: float = 1.0) -> None:
        """Store the source of the one site that this copy serves; None makes the copy serve all sites of the bank.

        Args:
            style: the site's style.
            polarity: its vote per channel, in [-1, 1]; None: nothing is inverted.
            gate: 0 leaves the site's images as they are.
        """
        self.source_known.fill_(style is not None)
        if style is not None:
            self.source_quantiles.copy_(_tensor(style.quantiles))
            self.source_offset.copy_(_tensor(style.offset))
        self.source_polarity.copy_(torch.ones(self.num_channels) if polarity is None else _tensor(polarity))
        self.source_gate.fill_(gate)
        read_source(self, None)

    def serve(self, site: int, *, gate: float | None = None) -> None:
        """Store a site of the bank, with its polarity and gate (unless another is given), as the one that this copy serves."""
        self.source_known.fill_(True)
        self.source_quantiles.copy_(self.bank_quantiles[site])
        self.source_offset.copy_(self.bank_offset[site])
        self.source_polarity.copy_(self.bank_polarity[site])
        self.source_gate.copy_(self.bank_gate[site] if gate is None else torch.tensor(gate))
        read_source(self, None)

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

    def trained_at_reference(self) -> tuple[str, ...]:
        """Prefixes of the tensors that only the reference's sites train; a federation takes them from these sites alone."""
        return ()

    def reference_sites(self) -> list[int]:
        """Sites of the bank whose images are the reference's: those of its style, else (a consensus) the nearest one."""
        equal = [int(site) for site in self._equal_to_reference().nonzero().flatten()]
        if equal or not len(self.bank_quantiles):
            return equal
        return [int(self.distance_to_bank(self.reference_quantiles[None]).argmin())]

    def _equal_to_reference(self) -> Bool[Tensor, " k"]:
        return (self.bank_quantiles == self.reference_quantiles).flatten(1).all(dim=1)

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


def read_source(module: nn.Module, _incompatible: Any) -> None:
    if isinstance(module, Harmonizer):
        module._source_known = bool(module.source_known)
        module._source_shut = bool(module.source_gate == 0)
