"""Losses and steps of the CycleGAN harmonizer, centralized and at one site of a federation.

A step has two sides. The source side holds a site's patches x: G(x) has to convince D, B(G(x)) has to be x. The reference
side holds reals r of D: B(r) has to convince D_s, G(B(r)) and G(r) have to be r.

By default both sides are made where genuine reals are, at the reference. Its own patches are given the quantiles of another
site (and turned over, if that site is inverted), blur and noise: pseudo-sources, whose answer is known. The other sites only
vote on their polarity. So a federation trains what a centralized run trains, whatever the number of steps between two
exchanges. With `train_everywhere` all sites train: foreign patches are sources, and as only the reference has genuine reals,
a site without them makes pseudo-references of its own patches, or leaves D alone. Both were measured to teach G less, see
docs/experiments/cyclegan: pseudo-references keep their site's blur and noise, and a D that a site may only ask is fooled by a
change of tone within some local steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from nnunet_fedharm.harmonizers.appearance import AppearanceOptions, random_noise, random_sharpness
from nnunet_fedharm.harmonizers.base import Source
from nnunet_fedharm.harmonizers.judges import dress, expand
from nnunet_fedharm.harmonizers.polarity import dressed_references, polarity_step
from nnunet_fedharm.harmonizers.resnet import PatchDiscriminator, ResidualNetwork
from nnunet_fedharm.harmonizers.training import HarmonizerTraining, is_distributed

if TYPE_CHECKING:
    from nnunet_fedharm.harmonizers.cyclegan import CycleGANHarmonizer

Patch = Float[Tensor, "b c *spatial"]

BETAS = (0.5, 0.999)
"""Adam's, as in the paper: less momentum, because the other player moves."""

MOMENTUM = 0.9
"""Of SGD; linear in the gradients, so that sites' momenta average as their gradients do."""

JUDGE_STEPS = 3
"""Steps of the polarity judge per step of the others: cheap, and G at an inverted site learns nothing before the verdict."""

PARTS = ("loss", "adversarial", "cycle", "identity", "paired", "discriminator")
"""What a step returns."""

HUBER = 0.5
"""Differences below this many standard deviations count squared, larger ones linearly."""


@dataclass(frozen=True)
class Sources:
    """Patches to be mapped to the reference.

    Attributes:
        image: (B, C, *spatial).
        sites: index into the bank of the style that each shows.
        origin: the reference's patch that a pseudo-source was made from; elsewhere the patch itself.
        paired: True where `origin` is the answer.
    """

    image: Tensor
    sites: Tensor
    origin: Tensor
    paired: Tensor


class CycleGANTraining(HarmonizerTraining):
    """Alternates a step of the generators and one of the discriminators."""

    uses_references = True
    harmonizer: CycleGANHarmonizer

    def __init__(self, harmonizer: CycleGANHarmonizer, *, lr: float, total_epochs: int) -> None:
        super().__init__(harmonizer, lr=lr, total_epochs=total_epochs)
        self.config = harmonizer.config
        self.reference_sites = harmonizer.reference_sites()
        if harmonizer.shared_backward is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)  # not G's start: two networks that begin alike waste the cycle's first steps
                self.local = harmonizer.new_backward()
            self.local.to(harmonizer.gate.device)
        own = self.local if harmonizer.shared_backward is None else harmonizer.shared_backward
        self.backward = cast(ResidualNetwork, own["generator"])
        self.site_discriminator = cast(PatchDiscriminator, own["discriminator"])
        if self.config.optimizer == "sgd":
            self.clip = math.inf  # clipping is not linear in the gradient either
        self.optimizers["generators"] = self._optimizer([harmonizer.generator, self.backward])
        if harmonizer.polarity_judge is not None:
            self.optimizers["polarity"] = torch.optim.Adam(harmonizer.judge_parameters(), lr=lr)
        self.optimizers["discriminators"] = self._optimizer(
            [harmonizer.reference_discriminator, self.site_discriminator]
        )

    def step(
        self,
        image: Tensor,
        sites: Int[Tensor, " b"],
        generator: torch.Generator,
        references: Tensor | None = None,
    ) -> dict[str, float]:
        references = dressed_references(self.harmonizer, references)
        polarity_step(self, image, sites, generator, references, judge_steps=JUDGE_STEPS)
        if self.config.train_everywhere:
            sources, reals = self.sources(image, sites, generator), self.reals(image, sites, references)
        elif references is None:
            return dict.fromkeys(PARTS, math.nan)  # a vote has no loss
        else:
            sources, reals = self.pseudo_sources(references, generator), references
        judges = nn.ModuleList([self.harmonizer.reference_discriminator, self.site_discriminator])
        with _frozen(judges):
            parts, fake_reference, fake_source = self.generator_losses(sources, reals)
            total = torch.stack(list(parts.values())).sum()
            self.descend("generators", total)
        judged = self.discriminator_loss(sources, reals, fake_reference, fake_source)
        if judged is None and is_distributed():  # the other processes may have both sides, and wait for this one
            judged = torch.stack([parameter.sum() * 0 for parameter in judges.parameters()]).sum()
        if judged is not None:
            self.descend("discriminators", judged)
        judged = total.new_zeros(()) if judged is None else judged
        values = {"loss": total, **parts, "discriminator": judged}
        return {name: float(values[name].detach()) for name in PARTS}

    def sources(self, image: Patch, sites: Tensor, generator: torch.Generator) -> Sources | None:
        """The batch's foreign patches, and those of the reference as pseudo-sources where the plans ask for it.

        Without pseudo-sources the reference's own patches are left out: as fakes they would be reals.
        """
        others = [site for site in range(len(self.harmonizer.bank_quantiles)) if site not in self.reference_sites]
        genuine = self._is_reference(sites)
        if not (self.config.pseudo_sources and others):
            foreign = image[~genuine]
            return Sources(foreign, sites[~genuine], foreign, genuine[~genuine]) if len(foreign) else None
        made = self.pseudo_sources(image, generator, self.harmonizer.bank_quantiles[sites])
        shown = torch.where(expand(genuine, image), made.image, image)
        return Sources(shown, torch.where(genuine, made.sites, sites), image, genuine)

    def pseudo_sources(
        self, origin: Patch, generator: torch.Generator, quantiles: Float[Tensor, "b c q"] | None = None
    ) -> Sources:
        """Patches of the reference as other sites could show them: their quantiles and polarity, blur, noise.

        Args:
            origin: the reference's patches.
            quantiles: their quantiles; the reference's if left out.
        """
        bank = self.harmonizer.bank_quantiles
        others = torch.tensor([k for k in range(len(bank)) if k not in self.reference_sites] or self.reference_sites)
        drawn = others[torch.randint(len(others), (len(origin),), generator=generator)].to(origin.device)
        own = self.harmonizer.reference_quantiles.expand_as(bank[drawn]) if quantiles is None else quantiles
        shown = dress(origin, own, bank[drawn], self.inverted(drawn))
        if self.config.appearance:
            mask = shown != 0
            changed = random_sharpness(shown, mask, AppearanceOptions(), generator)
            changed = random_noise(changed, AppearanceOptions(), generator)
            shown = torch.where(mask, changed, shown)
        return Sources(shown, drawn, origin, torch.ones(len(origin), dtype=torch.bool, device=origin.device))

    def reals(self, image: Patch, sites: Tensor, references: Tensor | None) -> Tensor | None:
        """What D is shown as the reference: genuine patches, else pseudo-references, else nothing."""
        if references is not None:
            return references
        if not self.config.pseudo_references:
            return None
        own = self.harmonizer.bank_quantiles[sites]
        return dress(image, own, self.harmonizer.reference_quantiles.expand_as(own), self.inverted(sites))

    def inverted(self, sites: Int[Tensor, " b"]) -> Bool[Tensor, "b c"]:
        """Whether the sites' contrast is the reference's upside down, per channel."""
        return self.harmonizer.bank_source(sites).inverted

    def generator_losses(
        self, sources: Sources | None, reals: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None]:
        """Weighted parts of the generators' loss, and the fakes of both sides (None where a side is missing)."""
        config, harmonizer = self.config, self.harmonizer
        nothing = harmonizer.gate.new_zeros(())
        adversarial, cycle, identity, paired = nothing, nothing, nothing, nothing
        fake_reference = fake_source = None
        if sources is not None:
            fake_reference = self.forth(sources.image, harmonizer.bank_source(sources.sites))
            adversarial = adversarial + real_loss(harmonizer.reference_discriminator(fake_reference))
            # B cannot know the noise that an answer has lost: the cycle is asked for where no answer is.
            unknown = ~sources.paired if config.appearance else torch.ones_like(sources.paired)
            inside = sources.image * expand(unknown, sources.image)
            cycle = cycle + distance(self.back(fake_reference, sources.sites), sources.image, inside)
            paired = distance(fake_reference, sources.origin, sources.image * expand(sources.paired, sources.image))
        if reals is not None:
            wanted = harmonizer.bank_source(self._wanted_sites(sources, len(reals)))
            fake_source = self.back(reals, self._wanted_sites(sources, len(reals)))
            adversarial = adversarial + real_loss(
                self.site_discriminator(fake_source, harmonizer.style_features(wanted.quantiles))
            )
            cycle = cycle + distance(self.forth(fake_source, wanted), reals, reals)
            identity = distance(self.forth(reals, harmonizer.reference_source(len(reals))), reals, reals)
        parts = {
            "adversarial": config.adversarial_weight * adversarial,
            "cycle": config.cycle_weight * cycle,
            "identity": config.identity_weight * identity,
            "paired": config.paired_weight * paired,
        }
        return parts, fake_reference, fake_source

    def discriminator_loss(
        self,
        sources: Sources | None,
        reals: Tensor | None,
        fake_reference: Tensor | None,
        fake_source: Tensor | None,
    ) -> Tensor | None:
        """Least squares of both discriminators; with one side only they are left alone unless `one_sided`."""
        if (sources is None or reals is None) and not self.config.one_sided:
            return None
        harmonizer, terms = self.harmonizer, []
        if reals is not None and fake_source is not None:
            wanted = harmonizer.bank_quantiles[self._wanted_sites(sources, len(reals))]
            terms.append(real_loss(harmonizer.reference_discriminator(reals)))
            terms.append(fake_loss(self.site_discriminator(fake_source.detach(), harmonizer.style_features(wanted))))
        if sources is not None and fake_reference is not None:
            style = harmonizer.style_features(harmonizer.bank_quantiles[sources.sites])
            terms.append(fake_loss(harmonizer.reference_discriminator(fake_reference.detach())))
            terms.append(real_loss(self.site_discriminator(sources.image, style)))
        return torch.stack(terms).sum() / 2 if terms else None

    def forth(self, image: Patch, source: Source) -> Patch:
        """G: to the reference."""
        return image + (image != 0) * self.harmonizer.transform(image, image != 0, source)

    def back(self, image: Patch, sites: Int[Tensor, " b"]) -> Patch:
        """B: from the reference to these sites, from the inverse of the image at an inverted one."""
        source = self.harmonizer.bank_source(sites)
        reference = self.harmonizer.reference_quantiles.expand_as(source.quantiles)
        turned = dress(image, reference, source.quantiles, source.inverted)
        base = torch.where(expand(source.inverted, image), turned, image)
        return base + (image != 0) * self.backward(base, self.harmonizer.style_features(source.quantiles))

    def _wanted_sites(self, sources: Sources | None, count: int) -> Tensor:
        """Sites that B maps to: those of the sources, cycled to `count`; where there are none every site but the reference's."""
        bank = range(len(self.harmonizer.bank_quantiles))
        others = [site for site in bank if site not in self.reference_sites] or list(bank)
        sites = torch.tensor(others) if sources is None else sources.sites
        return sites[torch.arange(count, device=sites.device) % len(sites)].to(self.harmonizer.gate.device)

    def _optimizer(self, modules: list[nn.Module]) -> torch.optim.Optimizer:
        parameters = [parameter for module in modules for parameter in module.parameters()]
        if self.config.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=self.lr, momentum=MOMENTUM)
        return torch.optim.Adam(parameters, lr=self.lr, betas=BETAS)

    def _is_reference(self, sites: Tensor) -> Tensor:
        chosen = torch.tensor(self.reference_sites, dtype=sites.dtype, device=sites.device)
        return torch.isin(sites, chosen)


def distance(image: Patch, target: Patch, inside: Patch) -> Float[Tensor, ""]:
    """Mean Huber distance where `inside` is not zero, in standard deviations; 0 where nothing is inside.

    The paper's absolute difference has a kink at zero. A generator that starts as the identity starts in it, and never leaves.
    """
    mask = inside != 0
    error = functional.smooth_l1_loss(image, target, reduction="none", beta=HUBER)
    return (error * mask).sum() / mask.sum().clamp(min=1)


def real_loss(score: Tensor) -> Float[Tensor, ""]:
    """Mean squared distance of the scores to 1, what a real should get."""
    return (score - 1).square().mean()


def fake_loss(score: Tensor) -> Float[Tensor, ""]:
    """Mean squared distance of the scores to 0, what a fake should get."""
    return score.square().mean()


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """No gradients for the weights inside the block; gradients still pass through."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in module.parameters():
            parameter.requires_grad_(True)
