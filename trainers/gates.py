"""Each site's gate: back to the identity where harmonization does not gain at that site.

Two questions, the second only where it can be asked:

1. without labels, after the harmonizer phase: do the site's own volumes come nearer to the reference's quantiles? Not asked of
   inverted sites, as quantiles do not see inversion. Whole volumes, as those of the reference are: the mean of patches' quantiles
   is narrower than a volume's, so an exact map would seem to lead away.
2. with labels and a validation split, after the segmenter phase: is the Dice of the site's validation patches higher with the
   gate open than with it shut?

A no to either shuts the gate. Neither is a promise for the test set; both keep a harmonizer that plainly harms out of use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nnunet_fedharm.harmonizers import Harmonizer
from nnunet_fedharm.harmonizers.base import INVERTED_BELOW, patch_quantiles
from nnunet_fedharm.harmonizers.training import share_from_first
from nnunet_fedharm.trainers.patches import PatchSampler
from nnunet_fedharm.trainers.whole_volumes import harmonize_in_patches

if TYPE_CHECKING:
    from nnunet_fedharm.trainers.fedharm_trainer import nnUNetTrainerFedHarm

GATE_CASES = 8
"""Cases of a site, drawn at random, that its gate is judged by without labels."""

GATE_BATCHES = 20
"""Validation batches that the labelled gates are judged by; the same ones with the gates open and shut."""


@contextmanager
def gates(harmonizer: Harmonizer, value: float) -> Iterator[None]:
    """All gates of the bank at `value` inside the block, and the phase's own gate open, as at prediction."""
    before, phase = harmonizer.bank_gate.clone(), harmonizer.gate.clone()
    harmonizer.bank_gate.fill_(value)
    harmonizer.open_gate()
    try:
        yield
    finally:
        harmonizer.bank_gate.copy_(before)
        harmonizer.gate.copy_(phase)


@torch.no_grad()
def appearance_gains(harmonizer: Harmonizer, sampler: PatchSampler, device: torch.device) -> dict[int, float]:
    """By how many standard deviations each site's volumes come nearer to the reference (Wasserstein-1, mean over channels).

    Args:
        harmonizer: with its styles; the gates do not matter.
        sampler: cases of one or more sites, and the size of patches; the reference, whose gate is shut by definition, and
            inverted sites, whose gate stays open, are left out.
        device: where the harmonizer is.

    Returns:
        Index of the site in the bank -> gain; negative where the images moved away.
    """
    harmonizer.eval()
    gains: dict[int, float] = {}
    for site in sorted({case.site for case in sampler.cases}):
        own = sampler.only([site])
        # Quantiles do not see inversion: turned over, a site may be no nearer by them and yet be what the reference shows.
        inverted = bool((harmonizer.bank_polarity[site] < INVERTED_BELOW).any())
        if own is None or inverted or harmonizer.bank_gate[site] == 0:
            continue
        before, after = [], []
        for volume in own.volumes(GATE_CASES):
            with gates(harmonizer, 1.0):
                changed = harmonize_in_patches(harmonizer, volume, sampler.patch_size, site=site)
            mask = (volume != 0)[None].to(device)
            before.append(patch_quantiles(volume[None].to(device), mask))
            after.append(patch_quantiles(changed[None].to(device), mask))
        gains[site] = _distance(harmonizer, before) - _distance(harmonizer, after)
    return gains


def _distance(harmonizer: Harmonizer, quantiles: list[Tensor]) -> float:
    """Mean absolute difference of the volumes' average quantiles to the reference's."""
    mean = torch.cat(quantiles).mean(dim=0)
    return float((mean - harmonizer.reference_quantiles).abs().mean())


@torch.no_grad()
def close_without_gain(harmonizer: Harmonizer, sampler: PatchSampler, device: torch.device) -> dict[int, float]:
    """Shut the gates of the sampler's sites that do not come nearer to the reference; returns the gains."""
    found = appearance_gains(harmonizer, sampler, device)
    for site, gain in found.items():
        harmonizer.bank_gate[site] = float(gain > 0)
    share_from_first(harmonizer.bank_gate)
    return found


@torch.no_grad()
def validation_dice(trainer: nnUNetTrainerFedHarm, batches: Sequence[dict[str, Any]]) -> dict[int, float]:
    """nnU-Net's pseudo Dice of validation patches, site by site; sites without foreground in the batches are left out."""
    counts: dict[int, list[dict[str, Any]]] = {}
    trainer.network.eval()
    for batch in batches:
        for index, name in enumerate(batch["keys"]):
            target = batch["target"]
            one = {
                "data": batch["data"][index : index + 1],
                # validation_step writes into the target where labels are ignored
                "target": [level[index : index + 1].clone() for level in target]
                if isinstance(target, list)
                else target[index : index + 1].clone(),
                "keys": [name],
            }
            site = trainer.bank.index(trainer.site_of_case[str(name)])
            counts.setdefault(site, []).append(trainer.validation_step(one))
    return {site: dice for site, found in counts.items() if not np.isnan(dice := _dice(found))}


def _dice(outputs: list[dict[str, Any]]) -> float:
    tp, fp, fn = (np.sum([output[key] for output in outputs], axis=0) for key in ("tp_hard", "fp_hard", "fn_hard"))
    size = 2 * tp + fp + fn
    return float(np.mean((2 * tp / np.maximum(size, 1))[size > 0])) if (size > 0).any() else float("nan")


def close_where_dice_falls(trainer: nnUNetTrainerFedHarm) -> dict[str, tuple[float, float]]:
    """Shut the gates of labelled sites whose validation patches are segmented no better with the gate open.

    Does nothing for harmonizers without weights, and with fold "all", whose validation cases are its training cases.

    Returns:
        Site -> Dice with the gate open, and with it shut, of the sites whose gate was open.
    """
    harmonizer = trainer.harmonizer
    if not harmonizer.learned or trainer.fold == "all" or not trainer.site_of_case:
        return {}
    batches = [next(trainer.dataloader_val) for _ in range(GATE_BATCHES)]
    open_dice = validation_dice(trainer, batches)
    with gates(harmonizer, 0.0):
        shut_dice = validation_dice(trainer, batches)
    found: dict[str, tuple[float, float]] = {}
    for site, dice in open_dice.items():
        if harmonizer.bank_gate[site] == 0 or site not in shut_dice:
            continue
        found[trainer.bank[site]] = (dice, shut_dice[site])
        harmonizer.bank_gate[site] = float(dice > shut_dice[site])
    share_from_first(harmonizer.bank_gate)
    return found
