"""How the diffusion harmonizer walks from an image to the reference's: what every process has to say, and the flow.

Symbols: x* image with the reference's appearance, x' the same anatomy as seen, t in [0, 1], x_t = (1 - t) x* + t x',
v = x' - x*. Every process asks the network for v, so that x' - v is its guess of x* and a network of zeros leaves x' alone.

References:
    Lipman et al., "Flow Matching for Generative Modeling", ICLR 2023; Liu et al., "Flow Straight and Fast", ICLR 2023.
    Esser et al., "Scaling Rectified Flow Transformers", ICML 2024 (the scheduler's conventions).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]
"""v(x_t, t), zero outside the mask; x' and the styles are bound already."""


class Process(Protocol):
    """Where training samples lie, and how sampling goes from t = 1 to t = 0."""

    def sample_at(
        self,
        target: Float[Tensor, "b c *spatial"],
        seen: Float[Tensor, "b c *spatial"],
        time: Float[Tensor, " b"],
        generator: torch.Generator,
    ) -> Float[Tensor, "b c *spatial"]:
        """x_t of training, from x* = target and x' = seen; zero where the image is exactly zero."""

    def walk(self, image: Float[Tensor, "b c *spatial"], velocity: Velocity, steps: int) -> Tensor:
        """The guess of x* after `steps` deterministic steps from x' = image; exactly `image` when the velocity is zero."""


class FlowProcess:
    """Flow matching: straight lines from x' to x*; Euler steps without noise.

    `FlowMatchEulerDiscreteScheduler` has the same conventions (sample = sigma noise + (1 - sigma) data, output = noise -
    data), with the image in noise's place. One step is y = x - v(x, 1).
    """

    def __init__(self) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler  # slow to import: only where this harmonizer is built

        self.scheduler: Any = FlowMatchEulerDiscreteScheduler()

    def sample_at(self, target: Tensor, seen: Tensor, time: Tensor, generator: torch.Generator) -> Tensor:
        return torch.lerp(target, seen, time.reshape(-1, *([1] * (seen.ndim - 1))))

    def walk(self, image: Tensor, velocity: Velocity, steps: int) -> Tensor:
        # The default grid of the scheduler stops short of 0; these sigmas are n equal steps from 1 to 0.
        self.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
        self.scheduler.set_begin_index(0)
        sample = image
        for step, timestep in enumerate(self.scheduler.timesteps):
            sample = self.scheduler.step(velocity(sample, 1 - step / steps), timestep, sample).prev_sample
        return sample
