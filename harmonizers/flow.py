"""The diffusion harmonizer: a bridge from what a scanner shows to what the reference would show.

Symbols: x* image with the reference's appearance, x' the same anatomy with another appearance, t in [0, 1],
v = x' - x* velocity, x_t a sample on the way, which the process defines: flow (flow_process.py) or DDIM (ddim.py).

The network predicts v from (x_t, x', t, style code). Harmonizing is `n_steps` steps of the process from t = 1 to t = 0, without
random noise: deterministic, and for the flow with one step y = x - v(x, x, 1).

Training is self-paired: x* is a patch of a site that looks like the reference, x' the patch under a random appearance
(harmonizers/appearance.py). The target is known voxel by voxel, so nothing rewards erasing or inventing structure. Patches of
other sites cannot be used: where contrast is inverted no histogram match gives the right target. The other sites only vote on
whether their contrast is the reference's inverse (harmonizers/polarity.py); where it is, the bridge starts at the image turned
over and brought to the reference's quantiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from nnunet_fedharm.errors import PlanError
from nnunet_fedharm.harmonizers.appearance import AppearanceOptions, random_appearance
from nnunet_fedharm.harmonizers.base import Setting, Source
from nnunet_fedharm.harmonizers.ddim import DDIMProcess
from nnunet_fedharm.harmonizers.flow_networks import ResNet3d, UNet2d
from nnunet_fedharm.harmonizers.flow_process import FlowProcess, Process
from nnunet_fedharm.harmonizers.flow_training import FlowTraining
from nnunet_fedharm.harmonizers.polarity import JudgedHarmonizer
from nnunet_fedharm.harmonizers.style import QUANTILE_LEVELS
from nnunet_fedharm.harmonizers.tone import apply_displacement, quantile_map
from nnunet_fedharm.harmonizers.training import HarmonizerTraining

PROCESSES = ("flow", "ddim")


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    process: str = "flow"
    """"flow": straight bridge from the image to the reference's; "ddim": denoising, given the image."""
    ddim_start: float = 0.5
    """Share of the cosine noise schedule where DDIM starts, in (0, 1]."""
    width: int = 16
    """Channels inside the network; multiples of 16 are computed fastest."""
    depth: int = 3
    """Residual blocks in 3d; in 2d `UNet2DModel` has depth // 2 layers per block, at least 1."""
    n_steps: int = 1
    """Steps of harmonization, 1 to 8; cost grows in proportion."""
    start_share: float = 0.5
    """Share of training samples at t = 1, where harmonization starts; the rest is uniform in t. A share of 1 makes the flow a
    plain regression (docs/experiments/flow)."""
    style: bool = True
    """Tell the network the source's quantiles. Without, it judges by the patch alone."""
    style_dropout: float = 0.2
    """Share of training samples whose style is hidden."""
    polarity: bool = True
    """Let a judge trained at the reference vote on whether a site's contrast is inverted, and start from the inverse there.
    Without it, inverted_share has to teach the network to tell from the surroundings, which takes far longer."""
    judge_width: int = 12
    """Channels of the judge's first convolution."""
    judge: str = "network"
    """network; or linear, one direction learned upon random features, which new plans take (docs/experiments/polarity-judge)."""
    block: int = 16
    """Voxels along each axis of the blocks that patches are cut into, each with an appearance of its own."""
    block_share: float = 0.5
    """Share of the training steps that cut; the others keep the surroundings of whole patches."""
    gradient_weight: float = 0.5
    """Weight of the error in differences between neighbouring voxels: edges and texture."""
    inverted_share: float = 0.0
    """Share of training samples with falling tone curves."""
    free_share: float = 0.1
    """Share of training samples with tone curves of any shape."""
    noise: float = 0.15
    """Largest standard deviation of the noise added in training."""

    def __post_init__(self) -> None:
        if self.width < 2 or self.width % 2 or self.depth < 1:
            raise PlanError("harmonizer.width must be even and >= 2, and depth >= 1.")
        if self.block < 4:
            raise PlanError(f"harmonizer.block must be >= 4, got {self.block}.")
        if not 1 <= self.n_steps <= 8:
            raise PlanError(f"harmonizer.n_steps must be 1 to 8, got {self.n_steps}.")
        if self.process not in PROCESSES:
            raise PlanError(f"harmonizer.process must be one of {', '.join(PROCESSES)}, got {self.process!r}.")
        if not 0 < self.ddim_start <= 1:
            raise PlanError(f"harmonizer.ddim_start must lie in (0, 1], got {self.ddim_start}.")
        for name in ("start_share", "style_dropout", "block_share", "inverted_share", "free_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise PlanError(f"harmonizer.{name} must lie in [0, 1], got {getattr(self, name)}.")
        if self.inverted_share + self.free_share > 1:
            raise PlanError("harmonizer.inverted_share + free_share must be <= 1.")
        if self.judge_width < 1 or min(self.gradient_weight, self.noise) < 0:
            raise PlanError("harmonizer.judge_width must be >= 1; gradient_weight and noise >= 0.")

    @property
    def appearance(self) -> AppearanceOptions:
        """What is left by falling and free curves is shared by bank, rising and unchanged as 3 : 2 : 1."""
        rest = 1 - self.inverted_share - self.free_share
        return AppearanceOptions(
            bank_share=rest / 2,
            monotone_share=rest / 3,
            inverted_share=self.inverted_share,
            free_share=self.free_share,
            noise=self.noise,
        )


class FlowHarmonizer(JudgedHarmonizer):
    """Design C: a bridge of one to eight deterministic steps."""

    learned = True

    def __init__(self, setting: Setting, config: FlowConfig) -> None:
        judge_width = config.judge_width if config.polarity else None
        super().__init__(setting, judge_width=judge_width, judge=config.judge)
        num_channels, spatial_dims = setting.num_channels, setting.spatial_dims
        self.config = config
        self.process: Process = DDIMProcess(config.ddim_start) if config.process == "ddim" else FlowProcess()
        embedding = 4 * config.width
        if config.style:
            self.style_code = nn.Sequential(
                nn.Linear(2 * num_channels * len(QUANTILE_LEVELS) + 1, embedding),
                nn.SiLU(),
                nn.Linear(embedding, embedding),
            )
        network = UNet2d if spatial_dims == 2 else ResNet3d
        # x_t, the channels of `_matched`, and one channel that tells padding from tissue of mean intensity.
        images = 1 if not config.style else 2 if config.polarity else 3
        inputs = (1 + images) * num_channels + 1
        self.network = network(inputs, num_channels, config.width, config.depth)

    @property
    def reach(self) -> int:
        """Windows of one volume agree at least this many voxels away from their borders."""
        return self.network.reach * self.config.n_steps

    def transform(self, image: Tensor, mask: Tensor, source: Source) -> Tensor:
        start, quantiles = self.upright(image, source)
        return self.bridge(start, mask, quantiles) - image

    def bridge(self, image: Tensor, mask: Tensor, quantiles: Tensor) -> Tensor:
        """x at t = 0, from `image` at t = 1."""
        known = torch.ones_like(quantiles[:, 0, 0])
        code, matched = self._code(quantiles, known), self._matched(image, mask, quantiles, known)

        def velocity(sample: Tensor, time: float) -> Tensor:
            return mask * self.velocity(sample, matched, mask, torch.full_like(known, time), code)

        return self.process.walk(image, velocity, self.config.n_steps)

    def velocity(
        self, sample: Tensor, matched: Tensor, mask: Tensor, time: Float[Tensor, " b"], code: Float[Tensor, "b e"]
    ) -> Float[Tensor, "b c *spatial"]:
        """Predicted v at x_t = sample, on the way from an image whose `_matched` channels are given."""
        inside = mask.any(dim=1, keepdim=True).to(sample.dtype)
        velocity: Tensor = self.network(torch.cat([sample, matched, inside], dim=1), time, code)
        return velocity

    def _matched(
        self, image: Tensor, mask: Tensor, quantiles: Float[Tensor, "b c q"], known: Float[Tensor, " b"]
    ) -> Float[Tensor, "b m *spatial"]:
        """x' itself and, where the style is known, x' with its quantiles mapped to the reference's: what a histogram allows.

        Without the judge also upside down; the surroundings have to tell which one to trust.
        """
        images = [image]
        if self.config.style:
            reference = self.reference_quantiles.expand_as(quantiles)
            weight = mask * known.reshape(-1, *([1] * (image.ndim - 1)))
            upright = image + apply_displacement(image, quantile_map(quantiles, reference).to(image.dtype))
            images.append(upright * weight)
            if not self.config.polarity:
                fallen = quantile_map(-quantiles.flip(-1), reference).to(image.dtype)
                images.append((apply_displacement(-image, fallen) - image) * weight)
        return torch.cat(images, dim=1)

    def make_training(self, *, lr: float, total_epochs: int) -> HarmonizerTraining:
        return FlowTraining(self, lr=lr, total_epochs=total_epochs)

    def mapping_parameters(self) -> Iterator[nn.Parameter]:
        """Of the bridge alone: the segmentation loss does not reach the judge."""
        yield from self.network.parameters()
        if self.config.style:
            yield from self.style_code.parameters()

    def trained_at_reference(self) -> tuple[str, ...]:
        return ("network.", "style_code.", "polarity_judge.")

    def trains_on(self, site: int) -> bool:
        """The reference's site trains; the others vote, or sit the phase out where there is no judge."""
        return self.config.polarity or site in self.reference_sites()

    def self_paired_loss(self, image: Tensor, sites: Int[Tensor, " b"], generator: torch.Generator) -> Tensor:
        """Mean squared error of the velocity, and of its differences between neighbours, in squared standard deviations."""
        if torch.rand((), generator=generator) < self.config.block_share:
            image, sites = in_blocks(image, sites, self.config.block)
        own, mask = self.bank_quantiles[sites], image != 0
        reference = self.reference_quantiles.expand_as(own)
        with torch.no_grad():
            target = image + mask * apply_displacement(image, quantile_map(own, reference))
            seen, style = random_appearance(
                target, mask, reference, self.bank_quantiles, self.bank_offset, self.config.appearance, generator
            )
            time = self._draw_times(len(sites), generator).to(image)
            sample = self.process.sample_at(target, seen, time, generator)
        known = (torch.rand(len(sites), generator=generator) >= self.config.style_dropout).to(image)
        matched = self._matched(seen, mask, style, known)
        velocity = self.velocity(sample, matched, mask, time, self._code(style, known))
        return velocity_loss(velocity - (seen - target), mask, self.config.gradient_weight)

    def _draw_times(self, count: int, generator: torch.Generator) -> Float[Tensor, " b"]:
        at_start = torch.rand(count, generator=generator) < self.config.start_share
        anywhere = 1 - torch.rand(count, generator=generator)
        return torch.where(at_start, torch.ones(count), anywhere)

    def _code(self, quantiles: Float[Tensor, "b c q"], known: Float[Tensor, " b"]) -> Float[Tensor, "b e"]:
        if not self.config.style:
            return quantiles.new_zeros(quantiles.shape[0], 4 * self.config.width)
        pair = torch.stack([quantiles, self.reference_quantiles.expand_as(quantiles) - quantiles], dim=1)
        features = rearrange(pair, "b two c q -> b (two c q)") * known[:, None]
        code: Tensor = self.style_code(torch.cat([features, known[:, None]], dim=1))
        return code


def in_blocks(
    image: Float[Tensor, "b c *spatial"], sites: Int[Tensor, " b"], size: int
) -> tuple[Float[Tensor, "n c *block"], Int[Tensor, " n"]]:
    """Patches cut into blocks of at least `size` voxels along each axis: more appearances in one step at the same cost.

    What a whole number of blocks does not cover is left out.
    """
    for axis in range(2, image.ndim):
        count = max(1, image.shape[axis] // size)
        length = image.shape[axis] // count
        blocks = [image.narrow(axis, index * length, length) for index in range(count)]
        image, sites = torch.cat(blocks), sites.repeat(count)
    return image, sites


def velocity_loss(error: Float[Tensor, "b c *spatial"], mask: Tensor, gradient_weight: float) -> Float[Tensor, ""]:
    """Mean squared error inside the mask, plus that of differences along each axis between voxels that are both inside.

    Squared: where a patch leaves two appearances possible the answer is their mean, and evidence moves it from the start;
    absolute errors would stay with the likelier one.
    """
    error = error.float() * mask
    loss = error.square().sum() / mask.sum().clamp(min=1)
    if gradient_weight == 0:
        return loss
    for axis in range(2, error.ndim):
        size = error.shape[axis] - 1
        both = mask.narrow(axis, 0, size) & mask.narrow(axis, 1, size)
        step = error.diff(dim=axis) * both
        loss = loss + gradient_weight / (error.ndim - 2) * step.square().sum() / both.sum().clamp(min=1)
    return loss
