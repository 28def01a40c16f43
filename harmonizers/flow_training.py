"""One step of the diffusion harmonizer: the bridge and the judge learn from the reference's patches, other sites vote."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nnunet_fedharm.harmonizers.polarity import vote
from nnunet_fedharm.harmonizers.training import HarmonizerTraining

if TYPE_CHECKING:
    from nnunet_fedharm.harmonizers.flow import FlowHarmonizer


class FlowTraining(HarmonizerTraining):
    """AdamW for the bridge, Adam for the judge of polarity; arguments as of `HarmonizerTraining`."""

    uses_references = True

    def __init__(self, harmonizer: FlowHarmonizer, *, lr: float, total_epochs: int) -> None:
        super().__init__(harmonizer, lr=lr, total_epochs=total_epochs)
        self.flow = harmonizer
        self.optimizers["bridge"] = torch.optim.AdamW(list(harmonizer.mapping_parameters()), lr=lr)
        if harmonizer.config.polarity:
            self.optimizers["polarity"] = torch.optim.Adam(harmonizer.polarity_judge.parameters(), lr=lr)

    def step(
        self,
        image: Float[Tensor, "b c *spatial"],
        sites: Int[Tensor, " b"],
        generator: torch.Generator,
        references: Float[Tensor, "b c *spatial"] | None = None,
    ) -> dict[str, float]:
        """As of the base class; a site that only votes has no loss: NaN."""
        if self.flow.config.polarity:
            self._vote(image, sites)
        if references is None:
            return {"loss": float("nan")}
        if self.flow.config.polarity:
            wanted = self.flow.reference_quantiles.expand(len(references), -1, -1)
            self.descend("polarity", self.flow.polarity_judge.loss(references, wanted, generator))
        own = torch.full((len(references),), self.flow.reference_sites()[0], device=references.device)
        loss = self.flow.self_paired_loss(references, own, generator)
        self.descend("bridge", loss)
        return {"loss": float(loss.detach())}

    @torch.no_grad()
    def _vote(self, image: Tensor, sites: Tensor) -> None:
        """Let the judge look at the patches of other sites."""
        foreign = ~torch.isin(sites, torch.tensor(self.flow.reference_sites(), device=sites.device))
        if foreign.any():
            image, sites = image[foreign], sites[foreign]
            wanted = self.flow.reference_quantiles.expand(len(image), -1, -1)
            log_odds = cast(Tensor, self.flow.polarity_judge(image, self.flow.bank_quantiles[sites], wanted))
            vote(self.flow.polarity, log_odds, sites)
