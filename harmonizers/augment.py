"""No harmonizer but strong augmentation: the baseline that every harmonizer has to beat.

In training a share of the patches is shown as another scanner could show them (harmonizers/appearance.py: random tone curves
that rise, fall or do both, styles of the bank, smooth gain, blur, noise), on top of nnU-Net's own augmentation; in evaluation
nothing is changed. The segmenter has to learn to see through all of it.

References:
    Ouyang et al., "Causality-inspired single-source domain generalization for medical image segmentation", IEEE TMI 2023
    (random intensity maps as augmentation; here they are drawn as curves instead of as networks).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nnunet_fedharm.errors import PlanError
from nnunet_fedharm.harmonizers.appearance import AppearanceOptions, random_appearance
from nnunet_fedharm.harmonizers.base import Harmonizer, Setting, Source


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    probability: float = 0.5
    """Share of training patches that are changed."""
    inverted_share: float = 0.25
    """Share of the changed ones with falling tone curves."""
    free_share: float = 0.15
    """Share of the changed ones with tone curves of any shape."""
    noise: float = 0.15
    """Largest standard deviation of the added noise."""

    def __post_init__(self) -> None:
        for name in ("probability", "inverted_share", "free_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise PlanError(f"harmonizer.{name} must lie in [0, 1], got {getattr(self, name)}.")
        if self.inverted_share + self.free_share > 1 or self.noise < 0:
            raise PlanError("harmonizer.inverted_share + free_share must be <= 1, and noise >= 0.")


class AugmentHarmonizer(Harmonizer):
    """H(x) = x in evaluation mode; a random appearance of x in training mode. Gates do not matter."""

    def __init__(self, setting: Setting, config: AugmentConfig) -> None:
        super().__init__(setting)
        self.config = config
        rest = 1 - config.inverted_share - config.free_share
        self.options = AppearanceOptions(
            bank_share=rest / 2,
            monotone_share=rest / 3,
            inverted_share=config.inverted_share,
            free_share=config.free_share,
            noise=config.noise,
        )

    @torch.compiler.disable  # draws on the CPU
    def forward(self, image: Tensor) -> Tensor:
        if not self.training:
            return image
        mask = image != 0
        return image + self.transform(image, mask, self.source_of(image, mask))

    @torch.no_grad()
    def transform(self, image: Tensor, mask: Tensor, source: Source) -> Tensor:
        """What the random appearances change, drawn from a generator that PyTorch's global one seeds."""
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        drawn = torch.rand(len(image), generator=generator) < self.config.probability
        # Under autocast a blurred image would be half precision, which cannot be blended with its float32 original.
        with torch.autocast(image.device.type, enabled=False):
            changed, _ = random_appearance(
                image.float(), mask, source.quantiles, self.bank_quantiles, self.bank_offset, self.options, generator
            )
        chosen = drawn.to(image.device).reshape(-1, *([1] * (image.ndim - 1)))
        return torch.where(chosen, changed - image, 0.0)
