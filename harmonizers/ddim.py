"""Conditional DDIM: the classical diffusion process, as an alternative to the flow.

Symbols: x* image with the reference's appearance, x' the same anatomy as seen (the condition), e normal noise,
a(t) share of signal, x_t = sqrt(a(t)) x* + sqrt(1 - a(t)) e.

The network is trained to denoise x_t given x'. It predicts the sample itself, as x' - v, and not the noise: then a network of
zeros says "x* is x'", and harmonization starts as the identity. Sampling is deterministic (eta = 0) and draws nothing: it
starts from the image without noise, sqrt(a(1)) x', which at the end of the schedule is next to zero. Random noise at the start
would differ between overlapping windows and leave seams.

The identity is exact in float32, whatever the number of steps. The last DDIM step is sqrt(a_0) x* + sqrt(1 - a_0) e with a_0 = 1
(`set_alpha_to_one`): a product by one plus a product of zero and a finite number (a(t) < 1 on the whole grid), and x' - 0 is x'.

References:
    Song et al., "Denoising Diffusion Implicit Models", ICLR 2021, eq. 12.
    Nichol, Dhariwal, "Improved Denoising Diffusion Probabilistic Models", ICML 2021, eq. 17 (the cosine schedule).
    Meng et al., "SDEdit: Guided Image Synthesis and Editing with SDEs", ICLR 2022 (starting at a chosen time).
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from nnunet_fedharm.harmonizers.flow_process import Velocity

TIMESTEPS = 840
"""Grid of the schedule: 1 to 8 equal steps all divide it, so no step of the scheduler is rounded."""

LARGEST_BETA = 0.999
"""Keeps a(1) above zero at the end of the cosine schedule, as in the paper."""


def cosine_betas(start: float) -> list[float]:
    """Noise per grid step of the cosine schedule cut off at `start`, a share of its length."""

    def signal(share: float) -> float:
        return math.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2

    edges = [signal(start * step / TIMESTEPS) for step in range(TIMESTEPS + 1)]
    return [min(1 - after / before, LARGEST_BETA) for before, after in pairwise(edges)]


class DDIMProcess:
    """`diffusers.DDIMScheduler` that predicts the sample.

    Args:
        start: share of the cosine schedule that is used; at 1 the start holds nothing of the image, at 0.5 about half.
    """

    def __init__(self, start: float) -> None:
        from diffusers import DDIMScheduler  # slow to import: only where this harmonizer is built

        self.scheduler: Any = DDIMScheduler(
            num_train_timesteps=TIMESTEPS,
            trained_betas=cosine_betas(start),
            prediction_type="sample",
            clip_sample=False,
            set_alpha_to_one=True,
            timestep_spacing="trailing",
        )

    def sample_at(self, target: Tensor, seen: Tensor, time: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(target.shape, generator=generator).to(target) * (seen != 0)
        timestep = (time * TIMESTEPS).ceil().long() - 1
        noisy: Tensor = self.scheduler.add_noise(target, noise, timestep)
        return noisy

    def walk(self, image: Tensor, velocity: Velocity, steps: int) -> Tensor:
        self.scheduler.set_timesteps(steps)
        sample = self.scheduler.alphas_cumprod[-1].sqrt().to(image) * image
        for timestep in self.scheduler.timesteps.tolist():
            guess = image - velocity(sample, (timestep + 1) / TIMESTEPS)
            sample = self.scheduler.step(guess, timestep, sample).prev_sample
        return sample
