"""Where a training starts other than at random: the weights of a trained model, for example one of public data.

A start costs no privacy as far as the patients of this training are concerned; those of the model's own training are another
matter, so it should come from public or simulated images, or from a training with a budget of its own.

nnU-Net's `-pretrained_weights` does not fit these trainers: it leaves out the output layers and copies every buffer, the style
bank of the other model's sites among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnunet_fedharm.errors import CheckpointError, PlanError
from nnunet_fedharm.harmonizers import AT_REFERENCE, Harmonizer
from nnunet_fedharm.planning.section import FedHarmSection
from nnunet_fedharm.planning.start import find_checkpoint, read_checkpoint
from nnunet_fedharm.trainers.weights import bare_module

SEGMENTER, HEADS, JUDGE = "segmenter.", ".seg_layers.", "harmonizer.polarity_judge."


@dataclass(frozen=True)
class Start:
    """What became of a start.

    Attributes:
        copied: tensors that were taken over.
        fresh: tensors that begin as they would have without it: output layers for other labels, another harmonizer.
    """

    copied: int
    fresh: tuple[str, ...]

    def __str__(self) -> str:
        kept = f"; {len(self.fresh)} begin at random: {', '.join(self.fresh[:3])}" if self.fresh else ""
        return f"{self.copied} tensors{kept}"


def start_from(network: nn.Module, model: str | Path) -> Start:
    """Copy a trained model's segmenter, and the trained tensors of a harmonizer of the same kind, into a network.

    Styles, polarities and gates stay the network's own: they describe the sites of its plans. Output layers of another number
    of labels begin at random, as in stock nnU-Net; everything else of the segmenter has to fit.

    Args:
        network: a harmonized segmenter, compiled or not.
        model: as for `find_checkpoint`; of our trainers or of a stock nnU-Net trainer with the same architecture.

    Raises:
        CheckpointError: no readable checkpoint, another architecture, or values that are not finite.
    """
    file, bare = find_checkpoint(model), bare_module(network)
    given = {_our_name(name): tensor for name, tensor in _read(file).items()}
    own, parameters = bare.state_dict(), {name for name, _ in bare.named_parameters(remove_duplicate=False)}
    if _judge_in(given) != _judge_in(own):
        # Their networks look alike, but a linear judge's is drawn and its whitening made for it: a trained one would spoil it.
        given = {name: tensor for name, tensor in given.items() if not name.startswith(JUDGE)}
    taken, fresh = {}, []
    for name in sorted(parameters):
        fits = name in given and given[name].shape == own[name].shape
        if fits:
            taken[name] = given[name]
        elif name.startswith(SEGMENTER) and HEADS not in name:
            shape = "is missing there" if name not in given else f"is {tuple(given[name].shape)} there"
            raise CheckpointError(
                f"{file} cannot be a start for these plans: {name}, here {tuple(own[name].shape)}, {shape}. "
                "Train it with plans of the same networks (sizes, patch and stages)."
            )
        else:
            fresh.append(name)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in taken.values()):
        raise CheckpointError(f"{file} holds NaN or infinity; nothing was loaded.")
    bare.load_state_dict({**own, **taken})
    return Start(len({bare.state_dict()[name].data_ptr() for name in taken}), tuple(fresh))


def with_judge_of(start: str | Path, kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """A harmonizer's options with the judge of contrast that its start brings, where none was asked for; plans choose otherwise.

    Args:
        start: as for `find_checkpoint`; "" brings nothing.
        kind: of the harmonizer.
        options: that were asked for.

    Raises:
        CheckpointError: no readable checkpoint.
    """
    if not start or kind not in AT_REFERENCE or "judge" in options:
        return dict(options)
    judge = _judge_in(_read(find_checkpoint(start)))
    return {**options, **({"judge": judge} if judge else {})}


def refuse_foreign_styles(harmonizer: Harmonizer, section: FedHarmSection) -> None:
    """Refuse what `nnUNetv2_train -pretrained_weights` makes of a network: one that knows another model's sites.

    Raises:
        PlanError: the network's style bank is not the plans'.
    """
    planned = [style.quantiles for style in section.styles.values()]
    held = harmonizer.bank_quantiles.cpu().numpy()
    if planned and not np.allclose(held, np.asarray(planned), atol=1e-4):
        raise PlanError(
            "The network's styles are not those of the plans: -pretrained_weights brought another model's. "
            "Plan with `nnunet-fedharm plan --start-from MODEL` instead, which leaves them alone."
        )


def _judge_in(weights: Mapping[str, Tensor]) -> str:
    """Its kind, as plans name it; "" where there is none."""
    if JUDGE + "direction" in weights:
        return "linear"
    return "network" if any(name.startswith(JUDGE) for name in weights) else ""


def _our_name(name: str) -> str:
    """Stock nnU-Net's networks have no harmonizer in front."""
    return name if name.startswith((SEGMENTER, "harmonizer.")) else SEGMENTER + name


def _read(file: Path) -> Mapping[str, Tensor]:
    """The weights, by the names of a network that is neither compiled nor distributed."""
    weights = read_checkpoint(file)["network_weights"]
    return {name.removeprefix("module.").removeprefix("_orig_mod."): tensor for name, tensor in weights.items()}
