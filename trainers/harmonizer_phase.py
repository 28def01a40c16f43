"""The unsupervised harmonizer phase: epochs of the harmonizer's own training steps, for one machine or one round."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from nnunet_fedharm.harmonizers.training import HarmonizerTraining
from nnunet_fedharm.trainers.patches import PatchSampler


@contextmanager
def trainable(harmonizer: nn.Module) -> Iterator[None]:
    """Let gradients reach the harmonizer inside the block only; outside it is frozen as it was."""
    before = [parameter.requires_grad for parameter in harmonizer.parameters()]
    for parameter in harmonizer.parameters():
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, state in zip(harmonizer.parameters(), before, strict=True):
            parameter.requires_grad_(state)
            parameter.grad = None


def harmonizer_epoch(
    training: HarmonizerTraining,
    sampler: PatchSampler,
    *,
    steps: int,
    device: torch.device,
    generator: torch.Generator,
) -> dict[str, float]:
    """One epoch; returns the means of what `step` returns.

    Raises:
        FedHarmError: a loss became NaN or infinite; the weights are left as they were before that step.
    """
    harmonizer = training.harmonizer
    references = sampler.only(harmonizer.reference_sites()) if training.uses_references else None
    harmonizer.train()
    parts: list[dict[str, float]] = []
    for _ in range(steps):
        image, sites = sampler.next()
        genuine = None if references is None else references.next()[0].to(device)
        parts.append(training.step(image.to(device), sites.to(device), generator, genuine))
    harmonizer.trained_epochs += 1
    return {name: float(np.mean([part[name] for part in parts])) for name in parts[0]}
