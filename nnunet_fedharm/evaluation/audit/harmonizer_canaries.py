"""One-run audit of the harmonizer's private steps, as `gradient_canaries` audits the segmenter's.

The trainer's own epoch draws the canaries, clips, adds up, adds the noise and steps; only where a canary's patch would be read
and its loss computed, the audit's linear loss stands. All optimizers of a harmonizer (of `cyclegan` the generator's and the
critics') share one clip and one noise, so the canaries lie in the tensors of all of them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnunet_fedharm.errors import PrivacyError
from nnunet_fedharm.evaluation.audit.gradient_canaries import Canaries, CanaryOptions, GradientAudit
from nnunet_fedharm.evaluation.audit.one_run import audited_delta
from nnunet_fedharm.evaluation.audit.site import claim_of
from nnunet_fedharm.harmonizers.training import HarmonizerTraining
from nnunet_fedharm.trainers.fedharm_trainer import nnUNetTrainerFedHarm
from nnunet_fedharm.trainers.harmonizer_phase import trainable
from nnunet_fedharm.trainers.patches import PatchSampler
from nnunet_fedharm.trainers.private_sampling import HARMONIZER


class _Sampler:
    """The real sampler, whose patch of a canary is empty."""

    def __init__(self, real: PatchSampler, canaries: Canaries, site: int) -> None:
        self.real, self.canaries, self.site = real, canaries, site

    def of(self, names: Collection[str], batch_size: int) -> Any:
        if not self.canaries.take(list(names)):
            return self.real.of(names, batch_size)
        return SimpleNamespace(next=lambda: (torch.zeros(1), torch.tensor([self.site])))


def audit_harmonizer(trainer: nnUNetTrainerFedHarm, options: CanaryOptions, *, delta: float) -> GradientAudit:
    """Run `options.steps` private steps of the harmonizer with canaries, and bound epsilon from what they release.

    Args:
        trainer: under differential privacy, with a harmonizer that learns here; its weights move.
        delta: of the claim; the audit takes a smaller one if it has to, see `audited_delta`.

    Raises:
        PrivacyError: no differential privacy, nothing to audit, or more canaries than weights.
    """
    private, schedule = trainer.private, trainer.section.schedule
    if private is None or HARMONIZER not in private.phases:
        raise PrivacyError(
            f"No private step of a harmonizer is taken here: {trainer.section.kind!r} learns nothing, not at this site, or for "
            "no epoch. Audit the segmenter, or the site whose images it learns from."
        )
    noise, rate = claim_of(trainer, HARMONIZER)
    training = trainer.harmonizer.make_training(lr=schedule.harmonizer_lr, total_epochs=schedule.harmonizer_epochs)
    training.set_epoch(0)
    parameters = _parameters(training)
    canaries = Canaries(parameters, private.options.clip, options)
    phase = private.phases[HARMONIZER]
    everybody = replace(phase, patients=(*phase.patients, *canaries.names), steps_per_epoch=options.steps)
    real = trainer.harmonizer_sampler(np.random.default_rng(options.seed))
    sampler: Any = _Sampler(real, canaries, real.cases[0].site)
    own_step = training.step

    def step(
        image: Tensor, sites: Tensor, generator: torch.Generator, references: Tensor | None = None
    ) -> dict[str, float]:
        if canaries.current is None:
            return own_step(image, sites, generator, references)
        canaries.loss().backward()
        return {"loss": 0.0}

    first = next(iter(training.optimizers.values()))
    hook = first.register_step_pre_hook(lambda *_: canaries.observe(everybody.expected))
    private.phases[HARMONIZER] = everybody
    training.step = step  # type: ignore[method-assign]
    try:
        with trainable(trainer.harmonizer):
            private.harmonizer_epoch(
                training, sampler, generator=torch.Generator().manual_seed(options.seed), last=False
            )
    finally:
        hook.remove()
        private.phases[HARMONIZER] = phase
    return canaries.found(
        noise=noise,
        rate=rate,
        delta=audited_delta(delta, canaries.count),
        patients=len(phase.patients),
        options=options,
    )


def _parameters(training: HarmonizerTraining) -> list[nn.Parameter]:
    """What the steps train, each once."""
    groups = (group for optimizer in training.optimizers.values() for group in optimizer.param_groups)
    return list(dict.fromkeys(parameter for group in groups for parameter in group["params"]))
