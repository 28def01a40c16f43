"""Networks that predict a velocity field: diffusers' `UNet2DModel` for 2d plans, a 3D residual network of ours for 3d plans.

Both are free of seams: no normalisation layer (its statistics differ from window to window), no attention, and no stride
(a strided network commutes only with shifts by multiples of its stride, and nnU-Net's windows start anywhere). Surroundings
are seen through dilated convolutions instead. Both commute with mirroring: kernels are averaged over their flips, so
nnU-Net's mirroring at test time meets the same harmonizer. Both end in the one layer that starts at zero.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nnunet_fedharm.harmonizers.resnet import convolved

WIDEST_DILATION = 4
"""Wider ones see past nnU-Net's smallest patches."""


class MirrorMean(nn.Module):
    """A kernel made symmetric along every axis; scaled so that independent weights keep their variance (3 taps an axis)."""

    def forward(self, weight: Tensor) -> Tensor:
        for axis in range(2, weight.ndim):
            weight = (weight + weight.flip(axis)) * math.sqrt(3 / 8)
        return weight


def mirror_symmetric(network: nn.Module) -> None:
    """Make every convolution wider than one voxel commute with flips of its input."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)) and module.kernel_size[0] > 1:
            parametrize.register_parametrization(module, "weight", MirrorMean())


class UNet2d(nn.Module):
    """`diffusers.UNet2DModel` with one resolution, identity in place of its norms, and dilated residual blocks.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the velocity.
        width: channels inside.
        depth: as of `ResNet3d`; the model has 2 * layers + 3 residual blocks, layers = depth // 2 and at least 1.
    """

    def __init__(self, in_channels: int, out_channels: int, width: int, depth: int) -> None:
        super().__init__()
        from diffusers import UNet2DModel  # 4 s to import: only where a 2d diffusion harmonizer is built

        self.model: Any = UNet2DModel(
            in_channels=in_channels,
            out_channels=out_channels,
            layers_per_block=max(1, depth // 2),
            block_out_channels=(width,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            add_attention=False,
            norm_num_groups=1,
            resnet_time_scale_shift="scale_shift",
            class_embed_type="identity",
        )
        blocks = [module for module in self.model.modules() if type(module).__name__ == "ResnetBlock2D"]
        self.dilations = [min(2 ** min(i, len(blocks) - 1 - i), WIDEST_DILATION) for i in range(len(blocks))]
        for block, dilation in zip(blocks, self.dilations, strict=True):
            for conv in (block.conv1, block.conv2):
                conv.dilation = conv.padding = (dilation, dilation)
            block.norm1, block.norm2 = nn.Identity(), nn.Identity()
        self.model.conv_norm_out = nn.Identity()
        mirror_symmetric(self.model)
        zero(self.model.conv_out)

    @property
    def reach(self) -> int:
        """Farthest voxel along an axis that has a say in a voxel's velocity."""
        return 2 + 2 * sum(self.dilations)

    def forward(
        self, sample: Float[Tensor, "b c h w"], time: Float[Tensor, " b"], code: Float[Tensor, "b e"]
    ) -> Float[Tensor, "b o h w"]:
        velocity: Tensor = self.model(sample, 1000 * time, class_labels=code).sample
        return velocity


class Residual3d(nn.Module):
    """x + conv(silu(film(conv(silu(x))))), both convolutions dilated."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(width, width, 3, padding=dilation, dilation=dilation)
        self.film = nn.Linear(4 * width, 2 * width)
        self.conv2 = nn.Conv3d(width, width, 3, padding=dilation, dilation=dilation)

    def forward(self, features: Tensor, embedding: Float[Tensor, "b e"]) -> Tensor:
        inner = convolved(self.conv1, nn.functional.silu(features))
        scale, shift = self.film(embedding)[..., None, None, None].chunk(2, dim=1)
        return features + convolved(self.conv2, nn.functional.silu(inner * (1 + scale) + shift))


class ResNet3d(nn.Module):
    """Residual network at full resolution whose dilations grow: 1, 2, 4, 4, …

    Args:
        in_channels: channels of the input.
        out_channels: channels of the velocity.
        width: channels inside.
        depth: residual blocks.
    """

    def __init__(self, in_channels: int, out_channels: int, width: int, depth: int) -> None:
        super().__init__()
        self.dilations = [min(2**i, WIDEST_DILATION) for i in range(depth)]
        self.time = nn.Sequential(nn.Linear(1, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))
        self.conv_in = nn.Conv3d(in_channels, width, 3, padding=1)
        self.blocks = nn.ModuleList([Residual3d(width, dilation) for dilation in self.dilations])
        self.conv_out = nn.Conv3d(width, out_channels, 3, padding=1)
        mirror_symmetric(self)
        zero(self.conv_out)

    @property
    def reach(self) -> int:
        """Farthest voxel along an axis that has a say in a voxel's velocity."""
        return 2 + 2 * sum(self.dilations)

    def forward(
        self, sample: Float[Tensor, "b c d h w"], time: Float[Tensor, " b"], code: Float[Tensor, "b e"]
    ) -> Float[Tensor, "b o d h w"]:
        embedding = nn.functional.silu(self.time(time[:, None]) + code)
        features = convolved(self.conv_in, sample)
        for block in self.blocks:
            features = block(features, embedding)
        velocity: Tensor = convolved(self.conv_out, nn.functional.silu(features))
        return velocity


@torch.no_grad()
def zero(layer: nn.Module) -> None:
    """Set every weight of a layer to zero: no residual before training, and gradients from the first step."""
    for parameter in layer.parameters():
        parameter.zero_()
