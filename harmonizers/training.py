"""How a harmonizer is trained: its optimizers, its steps, and whatever has to survive between rounds.

The phase (epochs, patches, checkpoints, rounds) belongs to the trainers; they call `step` and keep `state_dict`. Modules
that train beside the harmonizer and serve one site only lie in `local`: they are no part of the network, so they are never
exported, averaged or needed for prediction, but they are part of the training's state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch import distributed as dist

from nnunet_fedharm.errors import FedHarmError

if TYPE_CHECKING:
    from nnunet_fedharm.harmonizers.base import Harmonizer

GRADIENT_CLIP = 12.0
"""nnU-Net's own bound on the gradient norm."""


class HarmonizerTraining(ABC):
    """Optimizers and steps of one harmonizer.

    Args:
        harmonizer: what is trained, on its device.
        lr: learning rate of epoch 0; it falls linearly to zero.
        total_epochs: length of the clock that all sites share.

    Attributes:
        optimizers: by name; their states are kept between rounds.
        local: modules that never leave the site.
        clip: bound on the gradient's norm in `descend`.
        collecting: `descend` only adds its gradients to those that are there, and no weight changes: whoever set this clips
            them, adds noise and steps the optimizers.
    """

    uses_references: bool = False
    """Whether `step` wants a second batch, of the reference site's own patches, wherever there are any."""

    def __init__(self, harmonizer: Harmonizer, *, lr: float, total_epochs: int) -> None:
        self.harmonizer = harmonizer
        self.lr = lr
        self.total_epochs = total_epochs
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.local = nn.ModuleDict()
        self.clip = GRADIENT_CLIP
        self.collecting = False

    @abstractmethod
    def step(
        self,
        image: Float[Tensor, "b c *spatial"],
        sites: Int[Tensor, " b"],
        generator: torch.Generator,
        references: Float[Tensor, "b c *spatial"] | None = None,
    ) -> dict[str, float]:
        """One step of every optimizer.

        Args:
            image: own patches.
            sites: index into the bank of each patch's site.
            generator: source of every random draw, on the CPU.
            references: patches of the reference site, or None where there are none or `uses_references` is False.

        Returns:
            Parts of the loss; "loss" is the one to watch.

        Raises:
            FedHarmError: a loss became NaN or infinite; the weights are left as they were before that step.
        """

    def set_epoch(self, epoch: int) -> None:
        """Set the learning rates of `epoch`."""
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = self.lr * (1 - epoch / self.total_epochs)

    def state_dict(self) -> dict[str, Any]:
        """Optimizers and site-local modules: everything but the harmonizer's own weights."""
        return {
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "local": self.local.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.local.load_state_dict(state["local"])

    def descend(self, name: str, loss: Tensor, *, clip: float | None = None) -> None:
        """One step of the optimizer `name` down `loss`: averaged over DDP processes, its norm clipped.

        Args:
            clip: bound on the norm; None for the training's own.

        Raises:
            FedHarmError: the loss is NaN or infinite.
        """
        if self.collecting:
            loss.backward()
            return
        if not torch.isfinite(loss):
            raise FedHarmError(
                f"The harmonizer's loss ({name}) became {loss.item()}. Lower schedule.harmonizer_lr, or look for extreme "
                "intensities with `nnunet-fedharm sites check`."
            )
        optimizer = self.optimizers[name]
        parameters = list(chain.from_iterable(group["params"] for group in optimizer.param_groups))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, self.clip if clip is None else clip)
        optimizer.step()


class SelfPairedTraining(HarmonizerTraining):
    """AdamW on `self_paired_loss`: enough for every harmonizer that learns by regression."""

    def __init__(self, harmonizer: Harmonizer, *, lr: float, total_epochs: int) -> None:
        super().__init__(harmonizer, lr=lr, total_epochs=total_epochs)
        self.optimizers["harmonizer"] = torch.optim.AdamW(harmonizer.parameters(), lr=lr)

    def step(
        self, image: Tensor, sites: Tensor, generator: torch.Generator, references: Tensor | None = None
    ) -> dict[str, float]:
        loss = self.harmonizer.self_paired_loss(image, sites, generator)
        self.descend("harmonizer", loss)
        return {"loss": float(loss.detach())}


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Mean gradient over DDP processes; the harmonizer phase calls the harmonizer itself, not the DDP wrapper."""
    for parameter in parameters:
        if parameter.grad is not None:
            average_over_processes(parameter.grad)


def average_over_processes(tensor: Tensor) -> None:
    """Mean over DDP processes, in place; nothing happens in a single process. Every process has to call it."""
    if is_distributed():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()


def share_from_first(tensor: Tensor) -> None:
    """The first DDP process's values, in place at all of them: it writes the checkpoint. Every process has to call it."""
    if is_distributed():
        dist.broadcast(tensor, 0)


def is_distributed() -> bool:
    """Whether this is one of several DDP processes."""
    return dist.is_available() and dist.is_initialized()
