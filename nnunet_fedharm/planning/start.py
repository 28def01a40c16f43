"""The trained model that a training starts from: its file on this machine, and what plans and cards say of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_fedharm.errors import CheckpointError
from nnunet_fedharm.planning.section import SECTION, FedHarmSection, StartModel

CHECKPOINT = "checkpoint_final.pth"


def find_checkpoint(model: str | Path) -> Path:
    """The checkpoint file of a results folder, of one of its folds, or the file itself.

    Raises:
        CheckpointError: there is none, or several folds to choose from.
    """
    path = Path(model)
    if path.is_file():
        return path.resolve()
    found = [path / CHECKPOINT] if (path / CHECKPOINT).is_file() else sorted(path.glob(f"fold_*/{CHECKPOINT}"))
    if len(found) != 1:
        there = f"folds {', '.join(file.parent.name for file in found)}" if found else f"no {CHECKPOINT}"
        raise CheckpointError(f"{path} holds {there}. Give --start-from one fold's folder, or a checkpoint file.")
    return found[0].resolve()


def read_checkpoint(file: Path) -> dict[str, Any]:
    """A checkpoint of nnU-Net, without running code that one from elsewhere might hold.

    Raises:
        CheckpointError: it is none, or is damaged.
    """
    # What nnU-Net writes into its log; nothing else is unpickled.
    numbers: list[Any] = [np.dtype, np.ndarray, np.float64().__reduce__()[0], np.zeros(1).__reduce__()[0]]
    numbers += [type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")]
    try:
        with torch.serialization.safe_globals(numbers):
            content = torch.load(file, map_location="cpu", weights_only=True)
        return {**content, "network_weights": dict(content["network_weights"])}
    except Exception as error:  # a damaged or foreign pickle raises nearly anything
        raise CheckpointError(
            f"{file} cannot be read as an nnU-Net checkpoint ({type(error).__name__}: {str(error).splitlines()[0][:120]})."
        ) from error


def models_behind(start: str | Path) -> tuple[StartModel, ...]:
    """A start as cards name it, then the one that it started from itself, and so on.

    Args:
        start: as for `find_checkpoint`; "" names none.

    Raises:
        CheckpointError: no readable checkpoint.
        PlanError: its fedharm section is of a later release.
    """
    if not start:
        return ()
    file = find_checkpoint(start)
    content = read_checkpoint(file)
    if "init_args" not in content:  # bare weights, of which nothing more is known
        return (StartModel(file.name),)
    plans, name = PlansManager(content["init_args"]["plans"]), content["init_args"]["configuration"]
    trained = plans.get_configuration(name).configuration.get(SECTION)
    section = None if trained is None else FedHarmSection.from_dict(trained)
    model = f"{plans.dataset_name}/{content['trainer_name']}__{plans.plans_name}__{name}"
    if section is None:
        return (StartModel(model),)
    private = section.privacy
    own = StartModel(model) if private is None else StartModel(model, private.epsilon, private.delta)
    return (own, *section.starts)
