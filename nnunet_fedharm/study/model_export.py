"""A trained model as a zip that `nnUNetv2_install_pretrained_model_from_zip` takes, with its model card inside.

The zip holds what a prediction needs, below DatasetXXX_NAME/TRAINER__PLANS__CONFIGURATION: plans.json, dataset.json and each
fold's checkpoint, and MODEL_CARD.md and model_card.json, which nnU-Net does not look at. It leaves out what nnU-Net's own export
adds and a prediction does not need, because it tells about single patients or about the machine:

| left out | because |
|---|---|
| optimizer state, logs and progress of the training | momentum is the mean of the last gradients, beyond what weights tell |
| dataset_fingerprint.json | shape and spacing of every training case |
| validation summary, debug.json | names of cases, paths, the machine |
| the case list `dataset` in dataset.json | names and paths of cases |
| `start_from` in the plans | a path of the machine; which model that was stays in `starts` |
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nnunet_fedharm.errors import CheckpointError, DataError, SetupError
from nnunet_fedharm.planning.section import SECTION
from nnunet_fedharm.sites.files import read_json
from nnunet_fedharm.study.model_card import CardFacts, card_files

NEEDED = ("network_weights", "trainer_name", "init_args", "inference_allowed_mirroring_axes")
"""Entries of a checkpoint that nnU-Net's predictor reads."""
EMPTIED: dict[str, Any] = {
    "optimizer_state": None,
    "grad_scaler_state": None,
    "logging": {},
    "_best_ema": None,
    "current_epoch": 0,
}
"""Entries that stay, empty, so that nnU-Net finds the keys it knows."""
FIXED_TIME = (1980, 1, 1, 0, 0, 0)
"""Of all files in the zip, so that the same model gives the same bytes."""


@dataclass(frozen=True)
class Exported:
    """A written zip.

    Attributes:
        path: of it.
        names: of its files.
        size: bytes.
    """

    path: Path
    names: tuple[str, ...]
    size: int


def find_folds(model: Path, checkpoint: str, folds: Sequence[str] | None = None) -> tuple[str, ...]:
    """Folds that have the checkpoint, or those that are asked for.

    Raises:
        CheckpointError: there is none, or one that was asked for has no such checkpoint.
    """
    found = sorted(path.parent.name.removeprefix("fold_") for path in model.glob(f"fold_*/{checkpoint}"))
    if not found:
        raise CheckpointError(
            f"No fold of {model} has a {checkpoint}. Finish the training, or name another one with --checkpoint."
        )
    for fold in folds or ():
        if fold not in found:
            raise CheckpointError(f"{model} has no fold_{fold}/{checkpoint}. Folds that have it: {', '.join(found)}.")
    return tuple(folds) if folds else tuple(found)


def export_model(model: Path, target: Path, facts: CardFacts, *, overwrite: bool = False) -> Exported:
    """Write the zip.

    Args:
        model: results folder TRAINER__PLANS__CONFIGURATION below its dataset's.
        target: the zip.
        facts: for the card; its folds and checkpoint are those that are packed.
        overwrite: replace a former file.

    Raises:
        DataError: the target exists, or a file of the model is damaged.
        CheckpointError: a checkpoint cannot be read.
        SetupError: the target cannot be written.
    """
    if target.exists() and not overwrite:
        raise DataError(f"{target} exists. Choose another name, or add --overwrite.")
    base = f"{model.parent.name}/{model.name}"
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    names: list[str] = []
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in _texts(model, facts).items():
                _add(archive, f"{base}/{name}", content.encode("utf-8"), names)
            for fold in facts.folds:
                place = f"fold_{fold}/{facts.checkpoint}"
                _add(archive, f"{base}/{place}", _bare_checkpoint(model / place), names)
        temporary.replace(target)
    except OSError as error:
        raise SetupError(
            f"Cannot write {target}: {error.strerror}. Choose a writable folder with free space."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return Exported(target, tuple(names), target.stat().st_size)


def _texts(model: Path, facts: CardFacts) -> dict[str, str]:
    plans = _without_start(read_json(model / "plans.json", what="The plans"))
    dataset = _without_cases(read_json(model / "dataset.json", what="The dataset description"))
    return {
        **card_files(facts),
        "plans.json": json.dumps(plans, indent=2, sort_keys=False),
        "dataset.json": json.dumps(dataset, indent=2, sort_keys=False),
    }


def _bare_checkpoint(path: Path) -> bytes:
    """The checkpoint with what a prediction needs alone."""
    try:
        # nnU-Net's checkpoints hold numpy numbers and plain objects, so it loads its own files in this way too.
        content = torch.load(path, map_location="cpu", weights_only=False)
        missing = [name for name in NEEDED if name not in content]
    except (OSError, RuntimeError, EOFError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"Cannot read {path}: {error}. Restore it, or export another one with --checkpoint."
        ) from error
    if missing:
        raise CheckpointError(f"{path} is no checkpoint of nnU-Net: it has no {missing[0]}. Export another one.")
    arguments = {**content["init_args"]}
    if isinstance(arguments.get("dataset_json"), Mapping):
        arguments["dataset_json"] = _without_cases(arguments["dataset_json"])
    if isinstance(arguments.get("plans"), Mapping):
        arguments["plans"] = _without_start(arguments["plans"])
    kept = {name: content[name] for name in NEEDED} | {"init_args": arguments}
    kept |= {name: value for name, value in EMPTIED.items() if name in content}
    buffer = io.BytesIO()
    torch.save(kept, buffer)
    return buffer.getvalue()


def _without_cases(dataset: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in dataset.items() if name != "dataset"}


def _without_start(plans: Mapping[str, Any]) -> dict[str, Any]:
    bare = deepcopy(dict(plans))
    for configuration in bare["configurations"].values():
        if SECTION in configuration:
            configuration[SECTION].pop("start_from", None)
    return bare


def _add(archive: zipfile.ZipFile, name: str, content: bytes, names: list[str]) -> None:
    entry = zipfile.ZipInfo(name, FIXED_TIME)
    entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
    archive.writestr(entry, content)
    names.append(name)
