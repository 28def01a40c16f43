"""What a model has to know of a site that it was not trained with: style, polarity and gate; no weight moves.

1. The style is the average of the volumes' quantiles, as for the sites of the training.
2. Each fold's judge votes on whether a channel is inverted; the votes are averaged over the volumes. A kind without a judge
   (nyul, curve) takes every channel as it is.
3. Each fold's gate: without labels it is open at an inverted site, which quantiles cannot judge, and elsewhere if the harmonized
   volumes' average quantiles are nearer to the reference's than the volumes' own are; with labels, if the stock predictor's Dice
   is higher with the gate open than with it shut.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor
from tqdm import tqdm

from nnunet_fedharm.errors import CheckpointError, PlanError
from nnunet_fedharm.evaluation.adapt_labels import dice_of_gates
from nnunet_fedharm.evaluation.adapt_volumes import (
    Prepared,
    Preprocessing,
    prepare_all,
    quantiles_of,
)
from nnunet_fedharm.evaluation.harmonize import HarmonizerModel, load_harmonizer
from nnunet_fedharm.harmonizers.adaptation import FIXED_KINDS, measure_source, source_buffers
from nnunet_fedharm.harmonizers.base import INVERTED_BELOW, Harmonizer
from nnunet_fedharm.harmonizers.polarity import JudgedHarmonizer
from nnunet_fedharm.harmonizers.style import Style, average_styles
from nnunet_fedharm.sites.files import CaseFiles
from nnunet_fedharm.trainers.whole_volumes import harmonize_in_patches

Models = Mapping[str, HarmonizerModel]
"""Name of the fold's folder -> harmonizer."""

Quantiles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Appearance:
    """What one fold's harmonizer makes of the volumes, gate open.

    Attributes:
        before, after: (C, Q), average quantiles of the volumes.
        samples: some volumes before and after, (C, D, H, W) each.
    """

    before: Quantiles
    after: Quantiles
    samples: list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class FoldEvidence:
    """What one fold's source was decided by.

    Attributes:
        votes: the judge's mean vote per channel, in [-1, 1]; None for a kind without a judge.
        inverted: per channel.
        distance_before, distance_after: Wasserstein-1 of the average quantiles to the reference's, standard deviations.
        dice_open, dice_shut: mean Dice of the labelled volumes; None without labels.
        gate: 1 open, 0 shut.
    """

    votes: tuple[float, ...] | None
    inverted: tuple[bool, ...]
    distance_before: float
    distance_after: float
    dice_open: float | None
    dice_shut: float | None
    gate: float


@dataclass(frozen=True)
class Adaptation:
    """A site's source, fold by fold.

    Attributes:
        style: average over the volumes.
        n_labelled: volumes whose labels judged the gates.
        folds: name of the fold's folder -> evidence.
        buffers: name of the fold's folder -> what is stored in its checkpoint.
        reference: (C, Q), the reference's quantiles.
        shown: of the first fold, for the picture.
    """

    style: Style
    n_labelled: int
    folds: dict[str, FoldEvidence]
    buffers: dict[str, dict[str, Tensor]]
    reference: Quantiles
    shown: Appearance

    def evidence(self) -> dict[str, Any]:
        """JSON form of style and evidence; no name of a case."""
        return {
            "n_volumes": self.style.n_cases,
            "n_labelled": self.n_labelled,
            "gate_judged_by": "dice" if self.n_labelled else "appearance",
            "style": self.style.to_dict(),
            "folds": {fold: asdict(found) for fold, found in self.folds.items()},
        }


def load_folds(model: Path, folds: Sequence[str] | None, *, checkpoint: str, device: str) -> dict[str, HarmonizerModel]:
    """The model's named folds, or all that have the checkpoint, by their folders' names.

    Raises:
        CheckpointError: no such checkpoint, or of another trainer.
        PlanError: a kind that changes nothing at prediction.
    """
    found = [path.parent.name.removeprefix("fold_") for path in sorted(model.glob(f"fold_*/{checkpoint}"))]
    if not (folds or found):
        raise CheckpointError(
            f"{model} has no fold_*/{checkpoint}. Give a results folder whose training has finished, "
            "or another checkpoint with --checkpoint."
        )
    models = {
        f"fold_{fold}": load_harmonizer(model, fold=fold, checkpoint=checkpoint, device=device)
        for fold in folds or found
    }
    kind = next(iter(models.values())).section.kind
    if kind in FIXED_KINDS:
        raise PlanError(
            f"The model's harmonizer is {kind!r}, which changes nothing at prediction, so there is nothing to adapt to a "
            "site. Predict with the model as it is."
        )
    return models


def adapt(
    folder: Path,
    models: Models,
    cases: Sequence[CaseFiles],
    *,
    site: str,
    checkpoint: str,
    num_processes: int = 1,
    n_samples: int = 4,
    progress: bool = True,
) -> Adaptation:
    """Measure a site's source; see the module's docstring.

    Args:
        folder: the model's results folder.
        models: from `load_folds`; the site's source is set in them.
        cases: from `find_cases`; if some have labels, these judge the gates.
        site: its name, for messages.
        checkpoint: file name in the folds' folders.
        num_processes: cases preprocessed side by side.
        n_samples: volumes to keep for pictures.
        progress: show bars.

    Raises:
        DataError: a volume or a label that cannot be used.
    """
    first = next(iter(models.values()))
    recipe = Preprocessing(first.plans, first.configuration, first.dataset_json, site)
    n_labelled = sum(case.label is not None for case in cases)
    with tempfile.TemporaryDirectory(prefix="fedharm-adapt-") as scratch:
        work = prepare_all(recipe, cases, Path(scratch), num_processes=num_processes)
        volumes = list(tqdm(work, "preprocess", len(cases), unit="volume", disable=not progress))
        style, votes = _measure(models, volumes, progress)
        for fold, model in models.items():
            model.harmonizer.set_source(style, polarity=votes[fold])
        seen = {
            fold: _appearance(model, volumes, n_samples, f"harmonize {fold}", progress)
            for fold, model in models.items()
        }
        buffers = {fold: source_buffers(model.harmonizer) for fold, model in models.items()}
        scores = dice_of_gates(folder, buffers, volumes, checkpoint, first, progress) if n_labelled else {}
    evidence = {}
    for fold, model in models.items():
        evidence[fold] = _evidence(model.harmonizer, votes[fold], seen[fold], scores.get(fold))
        model.harmonizer.set_source(style, polarity=votes[fold], gate=evidence[fold].gate)
    buffers = {fold: source_buffers(model.harmonizer) for fold, model in models.items()}
    reference = _reference(first.harmonizer)
    return Adaptation(style, n_labelled, evidence, buffers, reference, next(iter(seen.values())))


def has_judge(harmonizer: Harmonizer) -> bool:
    """Whether anything can be said on polarity."""
    return isinstance(harmonizer, JudgedHarmonizer) and harmonizer.polarity_judge is not None


def _measure(models: Models, volumes: Sequence[Prepared], progress: bool) -> tuple[Style, dict[str, list[float]]]:
    """The volumes' average style, and each fold's mean votes."""
    styles: list[Style] = []
    votes: dict[str, list[list[float]]] = {fold: [] for fold in models}
    for volume in tqdm(volumes, "measure", unit="volume", disable=not progress):
        image = volume.load()
        for fold, model in models.items():
            style, polarity = measure_source(model.harmonizer, image)
            votes[fold].append(polarity)
        styles.append(style)  # does not depend on the fold
    return average_styles(styles), {fold: np.mean(found, axis=0).tolist() for fold, found in votes.items()}


def _appearance(
    model: HarmonizerModel, volumes: Sequence[Prepared], n_samples: int, name: str, progress: bool
) -> Appearance:
    before: list[Quantiles] = []
    after: list[Quantiles] = []
    samples: list[tuple[Tensor, Tensor]] = []
    for volume in tqdm(volumes, name, unit="volume", disable=not progress):
        image = volume.load()
        changed = harmonize_in_patches(model.harmonizer, image, model.configuration.patch_size)
        before.append(quantiles_of(image))
        after.append(quantiles_of(changed))
        if len(samples) < n_samples:
            samples.append((image, changed))
    return Appearance(np.mean(before, axis=0), np.mean(after, axis=0), samples)


def _evidence(
    harmonizer: Harmonizer, votes: Sequence[float], seen: Appearance, scores: tuple[float, float] | None
) -> FoldEvidence:
    before, after = (float(np.abs(found - _reference(harmonizer)).mean()) for found in (seen.before, seen.after))
    opened, shut = scores or (None, None)
    inverted = tuple(vote < INVERTED_BELOW for vote in votes)
    # Quantiles do not see inversion, so they do not judge a site that is turned over.
    gains = after < before or any(inverted) if opened is None or shut is None else opened > shut
    return FoldEvidence(
        votes=tuple(votes) if has_judge(harmonizer) else None,
        inverted=inverted,
        distance_before=before,
        distance_after=after,
        dice_open=opened,
        dice_shut=shut,
        gate=float(gains),
    )


def _reference(harmonizer: Harmonizer) -> Quantiles:
    return np.asarray(harmonizer.reference_quantiles.double().cpu().numpy())
