"""CycleGAN harmonizer, many sites to one reference: a shared generator, and what trains it.

G maps every site to the reference, B maps the reference back to a site, D judges whether a patch looks like the reference
and D_s whether it looks like a site. Only G is needed for prediction; D travels with it so that all sites face one judge; B
and D_s stay at the site unless `share_backward` is set. The losses stand in `cyclegan_training`.

| symbol | here |
|---|---|
| G: X -> Y | `forward`, the wrapper x + gate * mask * R around `generator` |
| F: Y -> X | B, `CycleGANTraining.backward` |
| D_Y, D_X | `reference_discriminator`, `CycleGANTraining.site_discriminator` |
| lambda | `cycle_weight` |

References:
    Zhu et al., "Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks", ICCV 2017, eq. 3.
    Roca et al., "IGUANe: a 3D generalizable CycleGAN for multicenter harmonization of brain MR images", MedIA 2025.
    Mao et al., "Least Squares Generative Adversarial Networks", ICCV 2017.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from nnunet_fedharm.errors import PlanError
from nnunet_fedharm.harmonizers.base import Setting, Source
from nnunet_fedharm.harmonizers.cyclegan_training import CycleGANTraining
from nnunet_fedharm.harmonizers.polarity import JudgedHarmonizer
from nnunet_fedharm.harmonizers.resnet import PatchDiscriminator, ResidualNetwork
from nnunet_fedharm.harmonizers.style import QUANTILE_LEVELS


@dataclass(frozen=True, kw_only=True)
class CycleGANConfig:
    width: int = 16
    """Channels inside the generators; a step of the segmenter pays for one forward pass of G. Keep it a multiple of 16: on a CPU
    12 channels take five times as long as 16."""
    dilations: Sequence[int] = (1, 2, 4)
    """One residual block each; G sees 1 + their sum voxels in every direction."""
    discriminator_width: int = 16
    """Channels after the discriminators' first convolution."""
    adversarial_weight: float = 0.1
    """Weight of the least-squares adversarial terms; the paper's 1 is for training without answers (`train_everywhere`)."""
    cycle_weight: float = 1.0
    """Lambda of the cycle terms; 0 turns them off."""
    identity_weight: float = 5.0
    """Weight of G(reference) = reference; 0 turns it off."""
    paired_weight: float = 10.0
    """Weight of the distance between G(pseudo-source) and the reference's own image that it was made from."""
    appearance: bool = True
    """Blur (or sharpen) pseudo-sources and add noise, at random: G learns to mend both where the answer is known."""
    train_everywhere: bool = False
    """Train G and D at every site and average them. Off: at the reference's sites, on pseudo-sources; the others only vote."""
    pseudo_references: bool = True
    """With `train_everywhere`, where a site has no image of the reference, train D on its own images mapped to the reference's
    quantiles. Off: D is not trained at such a site, only asked."""
    pseudo_sources: bool = True
    """At the reference, use its images in another site's quantiles (and inverted, if that site is) as what is to be mapped."""
    polarity: bool = True
    """Let a judge trained at the reference vote on whether a site's contrast is inverted, and start from the inverse there."""
    judge: str = "network"
    """network; or linear, one direction learned upon random features, which new plans take (docs/experiments/polarity-judge)."""
    share_backward: bool = False
    """Export and average B and D_s too, as an exact split of CycleGAN over sites does; off: they never leave the site."""
    one_sided: bool = False
    """Train each discriminator on whichever side a site has. Only for one step per exchange: over many local steps a
    one-sided discriminator learns nothing."""
    optimizer: str = "adam"
    """adam; or sgd, with momentum and without clipping: linear in the gradient, so that the mean of the sites' weights after one
    step each is one step on the mean of their gradients."""

    def __post_init__(self) -> None:
        # A frozen configuration holds no list, and plans are JSON, which knows no tuples.
        object.__setattr__(self, "dilations", tuple(self.dilations))
        if self.width < 1 or self.discriminator_width < 1:
            raise PlanError("harmonizer.width and discriminator_width must be >= 1.")
        if not self.dilations or min(self.dilations) < 1:
            raise PlanError(f"harmonizer.dilations needs at least one value, all >= 1, got {self.dilations}.")
        for name in ("adversarial_weight", "cycle_weight", "identity_weight", "paired_weight"):
            if getattr(self, name) < 0:
                raise PlanError(f"harmonizer.{name} must be >= 0, got {getattr(self, name)}. Use 0 to turn it off.")
        if self.optimizer not in ("adam", "sgd"):
            raise PlanError(f"harmonizer.optimizer must be adam or sgd, got {self.optimizer!r}.")
        if not (self.train_everywhere or self.pseudo_sources):
            raise PlanError(
                "harmonizer.pseudo_sources is all that the reference trains on; without them set train_everywhere to true."
            )
        if not self.train_everywhere and (self.one_sided or self.share_backward):
            raise PlanError(
                "harmonizer.one_sided and share_backward are for training at every site: set train_everywhere to true."
            )
        if self.one_sided and self.pseudo_references:
            raise PlanError("harmonizer.one_sided is the mode without pseudo_references; switch one of them off.")


class CycleGANHarmonizer(JudgedHarmonizer):
    """G of a many-to-one CycleGAN: x + gate * mask * R(x, style)."""

    learned = True

    def __init__(self, setting: Setting, config: CycleGANConfig) -> None:
        judge_width = config.discriminator_width if config.polarity else None
        super().__init__(setting, judge_width=judge_width, judge=config.judge)
        self.config = config
        self.generator = self.new_generator()
        self.reference_discriminator = self.new_discriminator(conditional=False)
        self.shared_backward = self.new_backward() if config.share_backward else None

    def transform(self, image: Tensor, mask: Tensor, source: Source) -> Tensor:
        base, _ = self.upright(image, source)
        result: Tensor = (base - image) + self.generator(base, self.style_features(source.quantiles))
        return result

    def trained_at_reference(self) -> tuple[str, ...]:
        """The judge; G and D unless every site trains; D also then, where no other site has reals to show it."""
        if not self.config.train_everywhere:
            return ("polarity_judge.", "generator.", "reference_discriminator.")
        alone = self.config.pseudo_sources and not (self.config.pseudo_references or self.config.one_sided)
        return ("polarity_judge.", "reference_discriminator.") if alone else ("polarity_judge.",)

    def trains_on(self, site: int) -> bool:
        """Where nothing but the judge's question is left to a site, and there is no judge, it sits the phase out."""
        return self.config.train_everywhere or self.config.polarity or site in self.reference_sites()

    def style_features(self, quantiles: Float[Tensor, "b c q"]) -> Float[Tensor, "b f"]:
        """What the networks are told of a site: its quantiles and their distance to the reference's."""
        reference = self.reference_quantiles.expand_as(quantiles)
        return rearrange(torch.stack([quantiles, reference - quantiles], dim=1), "b two c q -> b (two c q)")

    def mapping_parameters(self) -> Iterator[nn.Parameter]:
        """Of G alone: the segmentation loss does not reach the discriminators."""
        return self.generator.parameters()

    def make_training(self, *, lr: float, total_epochs: int) -> CycleGANTraining:
        """Two optimizers: one for the generators, one for the discriminators."""
        return CycleGANTraining(self, lr=lr, total_epochs=total_epochs)

    def new_generator(self) -> ResidualNetwork:
        """A network of G's and B's form."""
        return ResidualNetwork(
            channels=self.num_channels,
            spatial_dims=self.spatial_dims,
            style_size=self._style_size,
            width=self.config.width,
            dilations=self.config.dilations,
        )

    def new_discriminator(self, *, conditional: bool) -> PatchDiscriminator:
        """A judge of the reference, or (conditional) of the site whose style it is told."""
        return PatchDiscriminator(
            channels=self.num_channels,
            spatial_dims=self.spatial_dims,
            width=self.config.discriminator_width,
            style_size=self._style_size if conditional else 0,
        )

    def new_backward(self) -> nn.ModuleDict:
        """B and D_s."""
        return nn.ModuleDict(
            {"generator": self.new_generator(), "discriminator": self.new_discriminator(conditional=True)}
        )

    @property
    def _style_size(self) -> int:
        return 2 * self.num_channels * len(QUANTILE_LEVELS)
