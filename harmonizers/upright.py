"""Polarity: sites of inverted contrast are turned over, and every site's quantiles are mapped to the reference's.

The judge of `harmonizers/polarity.py` is all that is learned, at the reference; the other sites vote. What is done to an image
is then one sign and one monotone curve per channel: no network runs at prediction, nothing can be drawn or erased, and the order
of intensities is kept or reversed as a whole. On the hippocampus benchmark this is most of what the networks reach.

References:
    Nyul, Udupa, Zhang, "New variants of a method of MRI scale standardization", IEEE TMI 2000 (the quantile map).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nnunet_fedharm.errors import PlanError
from nnunet_fedharm.harmonizers.base import INVERTED_BELOW, Setting, Source
from nnunet_fedharm.harmonizers.judges import dress
from nnunet_fedharm.harmonizers.polarity import JudgedHarmonizer, dressed_references, polarity_step
from nnunet_fedharm.harmonizers.training import HarmonizerTraining

_LEARNED = 0.9
"""Share of the loss of guessing, above which a judge has learned nothing. On the hippocampus sites, judges that left
the inverted one as it was ended at .91 of it and more, one that found it at .47.
"""


@dataclass(frozen=True, kw_only=True)
class PolarityConfig:
    judge_width: int = 16
    """Channels of the judge's first convolution."""
    judge: str = "network"
    """network; or linear, one direction learned upon random features, which new plans take (docs/experiments/polarity-judge)."""

    def __post_init__(self) -> None:
        if self.judge_width < 1:
            raise PlanError(f"harmonizer.judge_width must be >= 1, got {self.judge_width}.")


class PolarityHarmonizer(JudgedHarmonizer):
    """Sign and quantile map; its gate is shut until `open_gate`, as `nyul`'s is."""

    learned = True

    def __init__(self, setting: Setting, config: PolarityConfig) -> None:
        super().__init__(setting, judge_width=config.judge_width, judge=config.judge)
        self.gate.zero_()

    def transform(self, image: Tensor, mask: Tensor, source: Source) -> Tensor:
        # Half precision would quantise the curve; it costs nothing beside the segmenter to leave it out here.
        with torch.autocast(image.device.type, enabled=False):
            image = image.float()
            reference = self.reference_quantiles.expand_as(source.quantiles)
            return dress(image, source.quantiles, reference, source.inverted) - image

    def mapping_parameters(self) -> Iterator[nn.Parameter]:
        """None: a segmentation loss cannot move a sign."""
        return iter(())

    def trained_at_reference(self) -> tuple[str, ...]:
        return ("polarity_judge.",)

    def make_training(self, *, lr: float, total_epochs: int) -> HarmonizerTraining:
        return PolarityTraining(self, lr=lr, total_epochs=total_epochs)


class PolarityTraining(HarmonizerTraining):
    """Adam for the judge; arguments as of `HarmonizerTraining`."""

    uses_references = True

    def __init__(self, harmonizer: PolarityHarmonizer, *, lr: float, total_epochs: int) -> None:
        super().__init__(harmonizer, lr=lr, total_epochs=total_epochs)
        self.optimizers["polarity"] = torch.optim.Adam(harmonizer.judge_parameters(), lr=lr)

    def step(
        self,
        image: Float[Tensor, "b c *spatial"],
        sites: Int[Tensor, " b"],
        generator: torch.Generator,
        references: Float[Tensor, "b c *spatial"] | None = None,
    ) -> dict[str, float]:
        """As of the base class; a site that only votes has no loss: NaN."""
        dressed = dressed_references(self.harmonizer, references)
        loss = polarity_step(self, image, sites, generator, dressed, judge_steps=1)
        return {"loss": float("nan") if loss is None else loss}


def undecided(votes: Mapping[str, float]) -> str:
    """Sites whose votes are too near to neither: what inverts them is a vote below INVERTED_BELOW.

    Args:
        votes: site -> polarity; 1 before anybody has voted.
    """
    unsure = [f"{site} {vote:+.2f}" for site, vote in votes.items() if abs(vote) <= -INVERTED_BELOW]
    if not unsure:
        return ""
    return (
        f"Whether their contrast is inverted was not decided for {', '.join(unsure)} (the vote; +1 upright, -1 inverted): such "
        f"sites stay as they are, as a vote has to be below {INVERTED_BELOW}. Plan more harmonizer epochs (in a federation: "
        "rounds): a vote begins at +1 and needs some 60 steps to arrive. Under differential privacy it carries noise."
    )


def guessing(losses: Mapping[str, float]) -> str:
    """A judge that guesses has the loss log 2, and its votes say nothing; a site that only votes has no loss."""
    loss, chance = losses.get("loss", math.nan), math.log(2)
    if not loss > _LEARNED * chance:
        return ""
    return (
        f"The judge of polarity guesses (loss {loss:.3f}, by chance {chance:.3f}): sites of inverted contrast stay as they "
        "are. Plan more harmonizer epochs (in a federation: rounds), or a larger batch."
    )
