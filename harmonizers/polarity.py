"""Whether a site shows the reference's contrast or its inverse, as T2 does to T1: one sign per site and channel.

Quantiles cannot tell: on the hippocampus sites the inverted reference's quantiles are nearer to an uninverted site's than
the reference's own are. Anatomy can. A small judge learns at the reference, from the reference's own patches, which of a patch
and its inverse is the right way up, both brought to the reference's quantiles so that only structure is left to look at.
Every site then lets it vote on its own patches. Judge and votes are shared; images are not.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nnunet_fedharm.errors import PlanError
from nnunet_fedharm.harmonizers.base import INVERTED_BELOW, Harmonizer, Setting, Source, patch_quantiles
from nnunet_fedharm.harmonizers.judges import JUDGES, dress, expand
from nnunet_fedharm.harmonizers.training import HarmonizerTraining, average_over_processes

VOTE_MOMENTUM = 0.05
"""Share of a batch's vote in the running mean."""


class JudgedHarmonizer(Harmonizer):
    """A harmonizer that knows which sites are inverted, and starts from the inverse there.

    Args:
        judge_width: channels of the judge's first convolution; None does without a judge, and nothing is inverted.
        judge: one of `JUDGES`.
        setting: arguments of `Harmonizer`.

    Raises:
        PlanError: no such judge.
    """

    def __init__(self, setting: Setting, *, judge_width: int | None, judge: str = "network") -> None:
        super().__init__(setting)
        if judge not in JUDGES:
            raise PlanError(f"harmonizer.judge must be one of {', '.join(JUDGES)}, got {judge!r}.")
        self.polarity_judge = None
        if judge_width is not None:
            self.polarity_judge = JUDGES[judge](
                channels=self.num_channels, spatial_dims=self.spatial_dims, width=judge_width
            )

    def judge_parameters(self) -> list[nn.Parameter]:
        """Of the judge, what is trained."""
        return [] if self.polarity_judge is None else self.polarity_judge.taught()

    def upright(self, image: Tensor, source: Source) -> tuple[Tensor, Tensor]:
        """Where the mapping starts, and its quantiles: the image itself, or its inverse dressed as the reference."""
        if self.polarity_judge is None:
            return image, source.quantiles
        inverted, reference = source.inverted, self.reference_quantiles.expand_as(source.quantiles)
        turned = dress(image, source.quantiles, reference, inverted)
        quantiles = torch.where(inverted[..., None], reference, source.quantiles)
        return torch.where(expand(inverted, image), turned, image), quantiles

    @torch.no_grad()
    def nearest_style(self, image: Tensor, mask: Tensor) -> Int[Tensor, " b"]:
        """As of the base class, among the styles whose polarity is the one that the judge sees in the patch, if there are any."""
        if self.polarity_judge is None:
            return super().nearest_style(image, mask)
        quantiles = patch_quantiles(image, mask)
        agrees = self.agrees_with_bank(self.votes(image, quantiles) < INVERTED_BELOW)
        return (self.distance_to_bank(quantiles) + 1e3 * ~agrees).argmin(dim=1)

    @torch.no_grad()
    def votes(self, image: Float[Tensor, "b c *spatial"], quantiles: Float[Tensor, "b c q"]) -> Float[Tensor, "b c"]:
        """The judge's probability that each channel of each patch is the right way up, as a number between -1 and 1.

        Raises:
            PlanError: this harmonizer has no judge.
        """
        if self.polarity_judge is None:
            raise PlanError("This harmonizer was planned without a judge of polarity (harmonizer.polarity is false).")
        log_odds: Tensor = self.polarity_judge(image, quantiles, self.reference_quantiles.expand_as(quantiles))
        return torch.tanh(log_odds / 2)


def polarity_step(
    training: HarmonizerTraining,
    image: Float[Tensor, "b c *spatial"],
    sites: Int[Tensor, " b"],
    generator: torch.Generator,
    references: Float[Tensor, "b c *spatial"] | None,
    *,
    judge_steps: int,
) -> float | None:
    """Teach the judge where there are genuine references; let it vote on every other site's patches.

    Args:
        training: of a `JudgedHarmonizer`, with an optimizer named "polarity".
        references: patches of the reference's site in the reference's quantiles, see `dressed_references`; or None.
        judge_steps: steps of the judge, all on the same references.

    Returns:
        The judge's last loss; None where it was not taught.
    """
    harmonizer = training.harmonizer
    if not isinstance(harmonizer, JudgedHarmonizer) or harmonizer.polarity_judge is None:
        return None
    taught = None
    if references is not None:
        wanted = harmonizer.reference_quantiles.expand(len(references), -1, -1)
        for _ in range(judge_steps):
            loss = harmonizer.polarity_judge.loss(references, wanted, generator)
            training.descend("polarity", loss)
            taught = float(loss.detach())
    foreign = ~torch.isin(sites, torch.tensor(harmonizer.reference_sites(), device=sites.device))
    if foreign.any():
        votes = harmonizer.votes(image[foreign], harmonizer.bank_quantiles[sites[foreign]])
        vote(harmonizer.bank_polarity, votes, sites[foreign])
    average_over_processes(harmonizer.bank_polarity)
    return taught


def dressed_references(harmonizer: Harmonizer, references: Float[Tensor, "b c *spatial"] | None) -> Tensor | None:
    """Patches of the reference's site in the reference's quantiles: unchanged unless the reference is a consensus."""
    if references is None:
        return None
    own = harmonizer.bank_quantiles[harmonizer.reference_sites()[:1]].expand(len(references), -1, -1)
    upright = torch.zeros(references.shape[:2], dtype=torch.bool, device=references.device)
    return dress(references, own, harmonizer.reference_quantiles.expand_as(own), upright)


@torch.no_grad()
def vote(polarity: Float[Tensor, "k c"], votes: Float[Tensor, "b c"], sites: Int[Tensor, " b"]) -> None:
    """Move the running mean votes of the batch's sites, in place."""
    for site in sites.unique():
        polarity[site].lerp_(votes[sites == site].mean(dim=0), VOTE_MOMENTUM)
