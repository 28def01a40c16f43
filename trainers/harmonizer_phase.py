"""The unsupervised harmonizer phase: epochs of `self_paired_loss` with AdamW, for one machine or one round."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist

from nnunet_fedharm.errors import FedHarmError
from nnunet_fedharm.harmonizers import Harmonizer
from nnunet_fedharm.trainers.patches import PatchSampler

GRADIENT_CLIP = 12.0
"""nnU-Net's own bound on the gradient norm."""


@dataclass
class HarmonizerOptimizer:
    """AdamW over the harmonizer's weights with a linear decay to zero over `total_epochs`."""

    harmonizer: Harmonizer
    lr: float
    total_epochs: int

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.harmonizer.parameters(), lr=self.lr)

    def set_epoch(self, epoch: int) -> None:
        """Set the learning rate of `epoch`, on the clock that all sites share."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * (1 - epoch / self.total_epochs)


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
    training: HarmonizerOptimizer,
    sampler: PatchSampler,
    *,
    steps: int,
    device: torch.device,
    generator: torch.Generator,
) -> float:
    """One epoch; returns the mean loss.

    Raises:
        FedHarmError: the loss became NaN or infinite; the weights are left as they were before that step.
    """
    harmonizer = training.harmonizer
    harmonizer.train()
    losses: list[float] = []
    for _ in range(steps):
        image, sites = sampler.next()
        loss: Tensor = harmonizer.self_paired_loss(image.to(device), sites.to(device), generator)
        if not torch.isfinite(loss):
            raise FedHarmError(
                f"The harmonizer's loss became {loss.item()} after {len(losses)} steps of this epoch. "
                "Lower schedule.harmonizer_lr, or look for extreme intensities with `nnunet-fedharm sites check`."
            )
        training.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        _average_gradients(harmonizer)
        torch.nn.utils.clip_grad_norm_(harmonizer.parameters(), GRADIENT_CLIP)
        training.optimizer.step()
        losses.append(float(loss.detach()))
    harmonizer.trained_epochs += 1
    return float(np.mean(losses))


def _average_gradients(module: nn.Module) -> None:
    """Mean gradient over DDP processes; this phase calls the harmonizer itself, not the DDP wrapper."""
    if dist.is_available() and dist.is_initialized():
        for parameter in module.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
