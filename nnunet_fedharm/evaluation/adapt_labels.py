"""A gate judged by labels: the stock predictor's Dice with the gate open and with it shut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from nnunet_fedharm.errors import DataError
from nnunet_fedharm.evaluation.adapt_volumes import Prepared
from nnunet_fedharm.evaluation.distances import dice
from nnunet_fedharm.evaluation.harmonize import HarmonizerModel
from nnunet_fedharm.evaluation.labels import LabelMap, Targets
from nnunet_fedharm.evaluation.volumes import read_segmentation

OPEN, SHUT = 1.0, 0.0


def dice_of_gates(
    folder: Path,
    buffers: Mapping[str, Mapping[str, Tensor]],
    volumes: Sequence[Prepared],
    checkpoint: str,
    model: HarmonizerModel,
    progress: bool,
) -> dict[str, tuple[float, float]]:
    """Mean Dice with the gate open and shut, of each fold alone, without mirroring.

    Args:
        folder: the model's results folder.
        buffers: fold's folder -> the site's source, gate open.
        volumes: preprocessed; those without a label are passed over.
        checkpoint: file name in the folds' folders.
        model: any fold's; tells where it runs, and its reader.
        progress: show a bar.

    Returns:
        Fold's folder -> (open, shut), mean over cases of the mean over labels that occur.

    Raises:
        DataError: a label that is unreadable, or labels without any foreground.
    """
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    reader, targets = model.plans.image_reader_writer_class(), Targets.from_dataset_json(model.dataset_json)
    labelled = [(volume, volume.case.label) for volume in volumes if volume.case.label is not None]
    names = [fold.removeprefix("fold_") for fold in buffers]
    with redirect_stdout(StringIO()):  # the base class talks while it loads and predicts
        predictor = nnUNetPredictor(use_mirroring=False, device=model.harmonizer.gate.device, allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(folder), names, checkpoint)
    weights = dict(zip(buffers, predictor.list_of_parameters, strict=True))
    scores: dict[str, dict[float, list[float]]] = {fold: {OPEN: [], SHUT: []} for fold in buffers}
    for volume, path in tqdm(labelled, "segment", unit="volume", disable=not progress):
        reference = read_segmentation(path, reader).array
        for fold, source in buffers.items():
            for gate in (OPEN, SHUT):
                stored = {**source, "source_gate": torch.tensor(gate)}
                weights[fold].update({f"harmonizer.{name}": value for name, value in stored.items()})
                predictor.list_of_parameters = [weights[fold]]
                scores[fold][gate].append(_mean_dice(reference, _segment(predictor, volume), targets))
    return {fold: (_mean(found[OPEN]), _mean(found[SHUT])) for fold, found in scores.items()}


def _segment(predictor: Any, volume: Prepared) -> LabelMap:
    """Label map on the input's grid."""
    from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape

    with redirect_stdout(StringIO()):
        logits = predictor.predict_logits_from_preprocessed_data(volume.load())
        segmentation = convert_predicted_logits_to_segmentation_with_correct_shape(
            logits,
            predictor.plans_manager,
            predictor.configuration_manager,
            predictor.label_manager,
            volume.properties,
        )
    return np.asarray(segmentation, dtype=np.int64)


def _mean_dice(reference: LabelMap, prediction: LabelMap, targets: Targets) -> float:
    counted = targets.counted(reference)
    return _mean(
        [
            dice(targets.mask(name, reference, counted), targets.mask(name, prediction, counted))
            for name in targets.regions
        ],
        none=float("nan"),
    )


def _mean(values: Sequence[float], *, none: float | None = None) -> float:
    """Mean of the values that are numbers; `none` if there is none, an error if that is not given either."""
    numbers = [value for value in values if not np.isnan(value)]
    if numbers:
        return float(np.mean(numbers))
    if none is None:
        raise DataError("The labels hold no foreground, so they cannot judge the gate. Leave --labels out.")
    return none
