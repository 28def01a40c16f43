"""One step of the diffusion harmonizer: the bridge and the judge learn from the reference's patches, other sites vote."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nnunet_fedharm.harmonizers.polarity import dressed_references, polarity_step
from nnunet_fedharm.harmonizers.training import HarmonizerTraining

if TYPE_CHECKING:
    from nnunet_fedharm.harmonizers.flow import FlowHarmonizer

BRIDGE_CLIP = 1.0
"""Bound on the gradient norm. Typical norms are about 1; an appearance that tears tissues apart gives over 50."""

BRIDGE_BETAS = (0.9, 0.99)
"""AdamW's: with the default 0.999 one such outlier slows a thousand steps down."""


class FlowTraining(HarmonizerTraining):
    """AdamW for the bridge, Adam for the judge of polarity; arguments as of `HarmonizerTraining`."""

    uses_references = True

    def __init__(self, harmonizer: FlowHarmonizer, *, lr: float, total_epochs: int) -> None:
        super().__init__(harmonizer, lr=lr, total_epochs=total_epochs)
        self.flow = harmonizer
        self.optimizers["bridge"] = torch.optim.AdamW(list(harmonizer.mapping_parameters()), lr=lr, betas=BRIDGE_BETAS)
        if harmonizer.polarity_judge is not None:
            self.optimizers["polarity"] = torch.optim.Adam(harmonizer.judge_parameters(), lr=lr)

    def step(
        self,
        image: Float[Tensor, "b c *spatial"],
        sites: Int[Tensor, " b"],
        generator: torch.Generator,
        references: Float[Tensor, "b c *spatial"] | None = None,
    ) -> dict[str, float]:
        """As of the base class; a site that only votes has no loss: NaN."""
        if self.flow.polarity_judge is not None:
            polarity_step(self, image, sites, generator, dressed_references(self.flow, references), judge_steps=1)
        if references is None:
            return {"loss": float("nan")}
        own = torch.full((len(references),), self.flow.reference_sites()[0], device=references.device)
        loss = self.flow.self_paired_loss(references, own, generator)
        self.descend("bridge", loss, clip=BRIDGE_CLIP)
        return {"loss": float(loss.detach())}
