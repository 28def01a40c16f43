"""A trained model and cases to attack it with."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnunet_fedharm.errors import DataError
from nnunet_fedharm.evaluation.harmonize import load_network
from nnunet_fedharm.privacy.options import PRIVACY_FILE
from nnunet_fedharm.sites.files import CaseFiles, cases_in, read_json


@dataclass(frozen=True, eq=False)
class AttackedModel:
    """A results folder's network as the stock predictor uses it, and nnU-Net's loss at full resolution.

    Attributes:
        name: of the folder.
        network: deep supervision off, evaluation mode.
        loss: (logits, labels) -> scalar; cross entropy and Dice of each sample.
        plans, configuration, dataset_json: that its inputs are preprocessed by.
        device: where it runs.
    """

    name: str
    network: nn.Module
    loss: nn.Module
    plans: Any
    configuration: Any
    dataset_json: dict[str, Any]
    device: torch.device

    @property
    def patch_size(self) -> tuple[int, ...]:
        return tuple(int(size) for size in self.configuration.patch_size)


@dataclass(frozen=True)
class CasePatches:
    """Patches of one case, the same for every model.

    Attributes:
        images: (k, C, *patch) z-scored.
        labels: (k, 1, *patch).
        features: what can be said of the case without any model, by name.
    """

    images: Tensor
    labels: Tensor
    features: dict[str, float]


def load_model(folder: Path, *, fold: str | None, checkpoint: str, device: str) -> AttackedModel:
    """Read a results folder TRAINER__PLANS__CONFIGURATION; with pickle, as nnU-Net does, so only from who you trust.

    Raises:
        DataError: plans.json or dataset.json is missing, or labels with regions.
        CheckpointError: no checkpoint, or of another trainer.
    """
    from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

    loaded = load_network(folder, fold=fold, checkpoint=checkpoint)
    labels = loaded.plans.get_label_manager(loaded.dataset_json)
    if labels.has_regions:
        raise DataError(f"{folder} segments regions; the attack knows labels that exclude each other only.")
    dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
    loss = DC_and_CE_loss(dice, {}, ignore_label=labels.ignore_label, dice_class=MemoryEfficientSoftDiceLoss)
    where = torch.device(device)
    network = loaded.network.to(where).eval()
    return AttackedModel(
        f"{folder.parent.name}/{folder.name}",
        network,
        loss,
        loaded.plans,
        loaded.configuration,
        loaded.dataset_json,
        where,
    )


def labelled_cases(folders: Sequence[Path], dataset_json: Mapping[str, Any], *, what: str) -> list[CaseFiles]:
    """Cases of (images, labels) whose label is there.

    Raises:
        DataError: there is none, or a channel is missing.
    """
    images, labels = folders
    cases = [case for case in cases_in(images, dataset_json, labels=labels) if case.label and case.label.is_file()]
    if not cases:
        raise DataError(f"No {what}: {images} and {labels} hold no case with image and label.")
    for case in cases:
        for path in case.images:
            if not path.is_file():
                raise DataError(f"The channel {path} of the {what} is missing.")
    return cases


def members_by_split(cases: Sequence[CaseFiles], splits: Path, fold: int) -> tuple[list[CaseFiles], list[CaseFiles]]:
    """(training cases, validation cases) of a fold, as nnU-Net's splits_final.json has them.

    Raises:
        DataError: no such file or fold, or cases of it that are not here.
    """
    import json

    if not splits.is_file():
        raise DataError(f"{splits} is missing. Give nnU-Net's splits_final.json with --splits.")
    content = json.loads(splits.read_text())
    if not 0 <= fold < len(content):
        raise DataError(f"{splits} has {len(content)} folds, there is no fold {fold}.")
    known = {case.case: case for case in cases}
    missing = [name for part in ("train", "val") for name in content[fold][part] if name not in known]
    if missing:
        raise DataError(f"{splits} names {missing[0]}, which is not among the {len(known)} cases given.")
    train, val = ([known[name] for name in content[fold][part]] for part in ("train", "val"))
    return train, val


def patches_of(model: AttackedModel, case: CaseFiles, *, count: int, seed: int) -> CasePatches:
    """Preprocess a case as nnU-Net does, and cut patches at its labels; the same ones for the same seed.

    Raises:
        DataError: files that cannot be read.
    """
    preprocessor = model.configuration.preprocessor_class(verbose=False)
    assert case.label is not None
    try:
        data, labels, _ = preprocessor.run_case(
            [str(path) for path in case.images], str(case.label), model.plans, model.configuration, model.dataset_json
        )
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(f"Case {case.case} cannot be read: {error}.") from error
    data, labels = np.asarray(data, dtype=np.float32), np.asarray(labels)
    generator = np.random.default_rng([seed, zlib.crc32(case.case.encode())])
    images, targets = [], []
    for centre in _centres(labels[0], count, generator):
        images.append(_cut(data, centre, model.patch_size))
        targets.append(_cut(np.maximum(labels, 0).astype(np.float32), centre, model.patch_size))
    return CasePatches(torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(targets)), _features(data, labels))


def patch_about_labels(data: Any, labels: Any, size: tuple[int, ...]) -> tuple[Any, Any]:
    """The (C, *size) patch about the middle of a preprocessed case's labels, and its labels (1, *size), without padding marks."""
    centre = _centres(labels[0], 1, np.random.default_rng(0))[0]
    return _cut(data, centre, size), _cut(np.maximum(labels, 0).astype(np.float32), centre, size)


def check_alike(model: AttackedModel, reference: AttackedModel) -> None:
    """Refuse a reference model that wants other inputs.

    Raises:
        DataError: patch size, spacing or channels differ.
    """
    for what, own, other in (
        ("patch size", model.patch_size, reference.patch_size),
        ("spacing", list(model.configuration.spacing), list(reference.configuration.spacing)),
        ("labels", model.dataset_json["labels"], reference.dataset_json["labels"]),
        ("channels", model.dataset_json["channel_names"], reference.dataset_json["channel_names"]),
    ):
        if own != other:
            raise DataError(f"The reference model {reference.name} has {what} {other}, the attacked one {own}.")


def read_claim(folder: Path) -> dict[str, Any] | None:
    """`privacy.json` beside the checkpoint, of a federation's server what it promises patients; None without any claim."""
    path = folder / PRIVACY_FILE
    card = read_json(path, what="The privacy card") if path.is_file() else None
    if card is not None and {"patient_level", "site_level", "own_policy"} & set(card):
        return card.get("patient_level")
    return card


def _centres(labels: Any, count: int, generator: np.random.Generator) -> list[tuple[int, ...]]:
    """The voxel of a label nearest to their middle, then random ones of a label; of an unlabelled case the middle."""
    inside = np.argwhere(labels > 0)
    if not len(inside):
        return [tuple(int(size) // 2 for size in labels.shape)] * count
    middle = inside[np.argmin(np.abs(inside - inside.mean(axis=0)).sum(axis=1))]
    others = inside[generator.integers(len(inside), size=count - 1)]
    return [tuple(int(value) for value in voxel) for voxel in (middle, *others)]


def _cut(volume: Any, centre: tuple[int, ...], patch: tuple[int, ...]) -> Any:
    """(C, *patch) about the centre, padded with zeros; for 2d the slice of the centre."""
    if len(patch) == 2:
        volume, centre = volume[:, centre[0]], centre[1:]
    slices, padding = [], [(0, 0)]
    for size, want, middle in zip(volume.shape[1:], patch, centre, strict=True):
        start = min(max(middle - want // 2, 0), max(size - want, 0))
        slices.append(slice(start, start + min(size, want)))
        short = max(want - size, 0)
        padding.append((short // 2, short - short // 2))
    return np.pad(volume[(slice(None), *slices)], padding)


def _features(data: Any, labels: Any) -> dict[str, float]:
    inside = labels[0] > 0
    signal = data[0][inside] if inside.any() else data[0].reshape(-1)
    gradients = np.gradient(data[0].astype(np.float64), axis=tuple(a for a, n in enumerate(data.shape[1:]) if n > 1))
    return {
        "volume": math.log(data[0].size),
        "labelled": math.log1p(float(inside.sum())),
        "mean": float(signal.mean()),
        "spread": float(signal.std()),
        "edges": float(np.mean(np.abs(gradients))),
    }
