"""CurveHarm: a learned monotone tone curve and a smooth multiplicative gain per volume.

y = T_c(gain(x)), T_c monotone with slopes in [1 / max_slope, max_slope], predicted from the source and the reference style;
gain(z) = z + (z + mu / sigma) * (exp(b(x)) - 1), multiplicative in raw units, b smooth and bounded.

A point map keeps the order of intensities, so it cannot erase a lesion, and a band-limited gain cannot draw one. There is
no normalisation layer and no pooling, so windows of one volume agree wherever both see the same surroundings.

Training is self-paired: a site's own patch x is given the appearance x' of a style drawn from the bank and a random smooth
gain, and the network learns the way from x' to x mapped to the reference. Every site thus trains on every style, and FedAvg
averages solutions of the same regression.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from nnunet_fedharm.errors import PlanError
from nnunet_fedharm.harmonizers.base import Harmonizer, Setting, Source
from nnunet_fedharm.harmonizers.smooth import MaskedBlur, random_log_gain
from nnunet_fedharm.harmonizers.style import QUANTILE_LEVELS
from nnunet_fedharm.harmonizers.tone import apply_displacement, monotone_displacement, quantile_map


@dataclass(frozen=True, kw_only=True)
class CurveConfig:
    knots: int = 33
    """Knots of the tone curve over [-6, 6] standard deviations; odd, so that one lies at zero."""
    max_slope: float = 3.0
    """Contrast is changed by at most this factor, up or down."""
    width: int = 64
    """Hidden units of the predictor."""
    gain: bool = True
    """Predict a smooth multiplicative gain (bias field) as well."""
    gain_sigma: float = 5.0
    """Smoothness of the gain in voxels (standard deviation of the Gaussian that limits its band)."""
    max_log_gain: float = 0.4
    """|b| is at most this: 0.4 allows factors from 0.67 to 1.49, BrainWeb's 40% field and more."""
    gain_sd: float = 0.5
    """|b| is also at most this over mu / sigma, so that the gain moves a mean intensity by at most so many standard
    deviations. Where contrast is low against the signal (large mu / sigma), a field of 0.4 would bury all tissue contrast."""
    gain_weight: float = 0.1
    """Weight of the squared log gain: without evidence the field stays flat."""
    curvature_weight: float = 1e-3
    """Weight of the squared change of log slope between neighbouring intervals."""

    def __post_init__(self) -> None:
        if self.knots < 3 or self.knots % 2 == 0:
            raise PlanError(f"harmonizer.knots must be odd and >= 3, got {self.knots}.")
        if self.max_slope <= 1:
            raise PlanError(f"harmonizer.max_slope must be > 1, got {self.max_slope}.")
        if self.width < 1 or self.gain_sigma <= 0 or self.max_log_gain <= 0 or self.gain_sd <= 0:
            raise PlanError("harmonizer.width, gain_sigma, max_log_gain and gain_sd must be > 0.")
        if self.gain_weight < 0 or self.curvature_weight < 0:
            raise PlanError("harmonizer.gain_weight and curvature_weight must be >= 0; use 0 to turn a term off.")


class CurveHarmonizer(Harmonizer):
    """Design A: tone curve from styles, gain from blurred surroundings."""

    learned = True

    def __init__(self, setting: Setting, config: CurveConfig) -> None:
        super().__init__(setting)
        num_channels = setting.num_channels
        self.config = config
        style_size = num_channels * len(QUANTILE_LEVELS)
        self.tone = nn.Sequential(
            nn.Linear(2 * style_size, config.width),
            nn.SiLU(),
            nn.Linear(config.width, config.width),
            nn.SiLU(),
            # One zero-initialised layer, and only one: two in a row would pass no gradient.
            _zeroed(nn.Linear(config.width, num_channels * config.knots)),
        )
        if config.gain:
            conv = nn.Conv2d if setting.spatial_dims == 2 else nn.Conv3d
            self.gain = nn.Sequential(
                conv(2 * num_channels, config.width // 4 + 1, kernel_size=1),
                nn.SiLU(),
                _zeroed(conv(config.width // 4 + 1, num_channels, kernel_size=1)),
            )

    def transform(self, image: Tensor, mask: Tensor, source: Source) -> Tensor:
        # Half precision would quantise the tone curve; it costs nothing beside the segmenter to leave it out here.
        with torch.autocast(image.device.type, enabled=False):
            return self._residual(image.float(), mask, source.quantiles, source.offset)[0]

    def _residual(
        self, image: Tensor, mask: Tensor, quantiles: Tensor, offset: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Residual, slope logits (B, C, K - 1) and log gain (B, C, *spatial) or None."""
        slope_logits, shift = self._tone_parameters(quantiles)
        displacement = monotone_displacement(slope_logits, shift, self.config.max_slope)
        log_gain = self.log_gain(image, mask, offset) if self.config.gain else None
        gained = torch.zeros_like(image) if log_gain is None else self._gain_change(image, offset, log_gain)
        return gained + apply_displacement(image + gained, displacement.to(image.dtype)), slope_logits, log_gain

    def _tone_parameters(self, quantiles: Float[Tensor, "b c q"]) -> tuple[Tensor, Tensor]:
        reference = self.reference_quantiles.expand_as(quantiles)
        features = rearrange(torch.stack([quantiles, reference - quantiles], dim=1), "b two c q -> b (two c q)")
        predicted = rearrange(self.tone(features), "b (c k) -> b c k", c=self.num_channels)
        return predicted[..., 1:], predicted[..., 0]

    def _gain_change(self, image: Tensor, offset: Tensor, log_gain: Tensor) -> Tensor:
        return (image + self._per_voxel(offset).to(image.dtype)) * torch.expm1(log_gain)

    def _per_voxel(self, values: Float[Tensor, "b c"]) -> Tensor:
        return values.reshape(*values.shape, *([1] * self.spatial_dims))

    def _gain_bound(self, offset: Float[Tensor, "b c"]) -> Float[Tensor, "b c"]:
        """Largest |b| of each sample and channel."""
        return (self.config.gain_sd / offset.clamp(min=1e-3)).clamp(max=self.config.max_log_gain)

    def log_gain(self, image: Tensor, mask: Tensor, offset: Float[Tensor, "b c"]) -> Float[Tensor, "b c *spatial"]:
        """b(x): smooth and bounded, from each voxel's surroundings at two scales."""
        inside = mask.to(image.dtype)
        near = MaskedBlur(inside, self.config.gain_sigma)
        far = MaskedBlur(inside, 2 * self.config.gain_sigma)
        raw = self.gain(torch.cat([near(image), far(image)], dim=1))
        return self._per_voxel(self._gain_bound(offset)) * torch.tanh(near(raw))

    def self_paired_loss(self, image: Tensor, sites: Int[Tensor, " b"], generator: torch.Generator) -> Tensor:
        """Mean absolute error to the own patch mapped to the reference, plus the two regularisers, in standard deviations."""
        own = self.bank_quantiles[sites]
        drawn, drawn_offset = self._draw_styles(len(sites), generator)
        mask = image != 0
        with torch.no_grad():
            reference = self.reference_quantiles.expand_as(own)
            target = image + mask * apply_displacement(image, quantile_map(own, reference))
            seen = image + mask * apply_displacement(image, quantile_map(own, drawn))
            if self.config.gain:
                field = self._per_voxel(self._gain_bound(drawn_offset) / 2) * random_log_gain(image, 1.0, generator)
                seen = seen + mask * self._gain_change(seen, drawn_offset, field)
        residual, slope_logits, log_gain = self._residual(seen, mask, drawn, drawn_offset)
        error = ((seen + mask * residual - target).abs() * mask).sum() / mask.sum().clamp(min=1)
        loss = error + self.config.curvature_weight * slope_logits.diff(dim=-1).square().mean()
        if log_gain is not None:
            loss = loss + self.config.gain_weight * log_gain.square().mean()
        return loss

    def _draw_styles(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Styles (count, C, Q) and offsets: half of them sites of the bank, half mixtures of two, for sites not seen yet."""
        bank = self.bank_quantiles.shape[0]
        pair = torch.randint(bank, (2, count), generator=generator)
        share = torch.rand(count, generator=generator) * (torch.rand(count, generator=generator) < 0.5)
        share = share.to(self.bank_quantiles.device)
        first, second = pair.to(self.bank_quantiles.device)
        quantiles = torch.lerp(self.bank_quantiles[first], self.bank_quantiles[second], share[:, None, None])
        offset = torch.lerp(self.bank_offset[first], self.bank_offset[second], share[:, None])
        return quantiles, offset


def _zeroed(layer: nn.Linear | nn.Conv2d | nn.Conv3d) -> nn.Module:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
