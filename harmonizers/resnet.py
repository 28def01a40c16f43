"""Norm-free convolutional networks: the image-to-image residual network and the patch discriminator.

Both convolve with kernels averaged over all mirrorings, so mirroring commutes with them exactly: nnU-Net's test-time
mirroring sees one harmonizer, and a learned filter cannot shift anatomy. Neither has a normalisation layer or pooling over
the patch, so what happens at a voxel depends on its surroundings alone and overlapping windows agree.

References:
    He et al., "Deep Residual Learning for Image Recognition", CVPR 2016.
    Perez et al., "FiLM: Visual Reasoning with a General Conditioning Layer", AAAI 2018.
    Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks", CVPR 2017 (the patch discriminator).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

SLOW_PATH_VALUES = 20480
"""On a CPU PyTorch keeps a single sample with up to so many values in its first four axes from oneDNN (`use_mkldnn`)."""

AGAIN_ABOVE = 2**18
"""Voxels of a patch above which a block's inside is computed again for its gradient instead of kept."""


def convolved(convolution: Callable[[Tensor], Tensor], image: Float[Tensor, "b i *spatial"]) -> Tensor:
    """The convolution of an image, without PyTorch's slow path for a single small 3d sample on a CPU.

    nnU-Net predicts windows one by one. A window of 32 x 40 x 32 voxels with 16 channels takes .051 s alone and .015 s as one of
    two equal samples (one thread, torch 2.14), so it is computed twice and one half is thrown away.
    """
    alone = image.ndim == 5 and image.shape[0] == 1 and image.device.type == "cpu"
    if alone and math.prod(image.shape[:4]) <= SLOW_PATH_VALUES:
        return convolution(torch.cat([image, image]))[:1]
    return convolution(image)


class MirrorConv(nn.Module):
    """A 3-wide convolution with zero padding whose kernel is symmetric along every axis.

    Args:
        inputs: channels in.
        outputs: channels out.
        spatial_dims: 2 or 3.
        dilation: distance between taps in voxels.
        stride: step of the output grid; 1 in anything that has to be seam-free.
    """

    def __init__(self, inputs: int, outputs: int, *, spatial_dims: int, dilation: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.dilation = dilation
        self.stride = stride
        self.axes = tuple(range(2, spatial_dims + 2))
        self.weight = nn.Parameter(torch.empty(outputs, inputs, *([3] * spatial_dims)))
        self.bias = nn.Parameter(torch.zeros(outputs))
        # Images are smooth, so a kernel's taps see nearly the same value and its sum acts: that sum gets unit variance, which
        # is less than Kaiming's rule for independent inputs gives it.
        nn.init.normal_(self.weight, std=math.sqrt(1 / (inputs * 3**spatial_dims)))

    def symmetric(self) -> Tensor:
        """The kernel in use: the mean of `weight` over the mirrorings of every axis."""
        weight: Tensor = self.weight
        for axis in self.axes:
            weight = (weight + weight.flip(axis)) / 2
        return weight

    def forward(self, image: Float[Tensor, "b i *spatial"]) -> Float[Tensor, "b o *out"]:
        kernel = self.symmetric()

        def convolve(batch: Tensor) -> Tensor:
            function = functional.conv2d if len(self.axes) == 2 else functional.conv3d
            result: Tensor = function(
                batch, kernel, self.bias, stride=self.stride, padding=self.dilation, dilation=self.dilation
            )
            return result

        return convolved(convolve, image)


class ResidualNetwork(nn.Module):
    """R(x, style): dilated residual blocks modulated by a style; exactly zero before training.

    Args:
        channels: C of the image.
        spatial_dims: 2 or 3.
        style_size: length of the style's feature vector.
        width: channels inside.
        dilations: one block each; the receptive field reaches 1 + their sum voxels.
    """

    def __init__(
        self, *, channels: int, spatial_dims: int, style_size: int, width: int, dilations: Sequence[int]
    ) -> None:
        super().__init__()
        self.head = MirrorConv(channels, width, spatial_dims=spatial_dims)
        self.context = nn.ModuleList(
            MirrorConv(width, width, spatial_dims=spatial_dims, dilation=dilation) for dilation in dilations
        )
        self.mix = nn.ModuleList(_pointwise(width, width, spatial_dims) for _ in dilations)
        self.style = nn.Sequential(
            nn.Linear(style_size, 2 * width), nn.SiLU(), nn.Linear(2 * width, 2 * width * len(dilations))
        )
        # The one zero-initialised layer: R is zero, and its gradient is not.
        self.tail = _pointwise(width, channels, spatial_dims)
        nn.init.zeros_(self.tail.weight)
        nn.init.zeros_(self.tail.bias)  # type: ignore[arg-type]  # it has a bias

    def forward(self, image: Float[Tensor, "b c *s"], style: Float[Tensor, "b f"]) -> Float[Tensor, "b c *s"]:
        modulation = self.style(style).reshape(len(style), len(self.context), 2, -1, *([1] * (image.ndim - 2)))
        hidden = self.head(image)
        again = torch.is_grad_enabled() and image[0, 0].numel() > AGAIN_ABOVE and not torch.compiler.is_compiling()
        for index in range(len(self.context)):
            scale, shift = modulation[:, index].to(hidden.dtype).unbind(1)
            if again:
                hidden = checkpoint(self._block, index, hidden, scale, shift, use_reentrant=False)
            else:
                hidden = self._block(index, hidden, scale, shift)
        result: Tensor = self.tail(functional.silu(hidden))
        return result

    def _block(self, index: int, hidden: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        inside = self.context[index](functional.silu(hidden)) * (1 + scale) + shift
        result: Tensor = hidden + self.mix[index](functional.silu(inside))
        return result


class PatchDiscriminator(nn.Module):
    """A score per neighbourhood of about 17 voxels; with a style, whether the neighbourhood looks like that style.

    Args:
        channels: C of the image.
        spatial_dims: 2 or 3.
        width: channels after the first convolution.
        style_size: length of the style's feature vector; 0 judges without one.
        levels: halvings of the grid; each doubles the neighbourhood.
    """

    def __init__(self, *, channels: int, spatial_dims: int, width: int, style_size: int = 0, levels: int = 2) -> None:
        super().__init__()
        self.first = MirrorConv(channels, width, spatial_dims=spatial_dims)
        self.style = nn.Linear(style_size, width) if style_size else None
        layers: list[nn.Module] = []
        for level in range(levels):
            inputs = width if level == 0 else 2 * width
            layers += [MirrorConv(inputs, 2 * width, spatial_dims=spatial_dims, stride=2), nn.LeakyReLU(0.2)]
        layers += [MirrorConv(2 * width, 2 * width, spatial_dims=spatial_dims), nn.LeakyReLU(0.2)]
        self.rest = nn.Sequential(*layers, _pointwise(2 * width, 1, spatial_dims))

    def forward(self, image: Float[Tensor, "b c *s"], style: Tensor | None = None) -> Float[Tensor, "b 1 *out"]:
        result: Tensor = self.rest[-1](self.features(image, style))
        return result

    def features(self, image: Float[Tensor, "b c *s"], style: Tensor | None = None) -> Float[Tensor, "b f *out"]:
        """What the last layer weighs."""
        hidden = self.first(image)
        if self.style is not None and style is not None:
            hidden = hidden + self.style(style).reshape(len(style), -1, *([1] * (image.ndim - 2)))
        result: Tensor = self.rest[:-1](functional.leaky_relu(hidden, 0.2))
        return result


def _pointwise(inputs: int, outputs: int, spatial_dims: int) -> nn.Conv2d | nn.Conv3d:
    layer = (nn.Conv2d if spatial_dims == 2 else nn.Conv3d)(inputs, outputs, kernel_size=1)
    nn.init.normal_(layer.weight, std=1 / math.sqrt(inputs))
    return layer
