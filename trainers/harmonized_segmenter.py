"""S(H(x)): harmonizer and planned segmenter as one network with one state dict."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nnunet_fedharm.harmonizers import Harmonizer


class HarmonizedSegmenter(nn.Module):
    """One module whose state dict has the keys `harmonizer.*` and `segmenter.*`.

    Args:
        harmonizer: (B, C, *spatial) -> (B, C, *spatial).
        segmenter: the network that nnU-Net planned; (B, C, *spatial) -> logits, a list of them under deep supervision.
    """

    def __init__(self, harmonizer: Harmonizer, segmenter: nn.Module) -> None:
        super().__init__()
        self.harmonizer = harmonizer
        self.segmenter = segmenter

    @property
    def encoder(self) -> Any:
        return self.segmenter.encoder

    @property
    def decoder(self) -> Any:
        """nnU-Net switches deep supervision at `network.decoder.deep_supervision`."""
        return self.segmenter.decoder

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        logits: Tensor | list[Tensor] = self.segmenter(self.harmonizer(image))
        return logits

    def compute_conv_feature_map_size(self, input_size: Any) -> Any:
        """Of the segmenter alone, as nnU-Net's memory estimate asks for it."""
        estimate: Any = self.segmenter.compute_conv_feature_map_size
        return estimate(input_size)
