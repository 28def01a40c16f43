"""The trained model that a training starts from: its file on this machine, and what plans and cards say of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_fedharm.errors import CheckpointError, PlanError
from nnunet_fedharm.planning.planner import PlanOptions
from nnunet_fedharm.planning.preprocess import CONFIGURATION_KEYS
from nnunet_fedharm.planning.section import SECTION, FedHarmSection, StartModel

CHECKPOINT = "checkpoint_final.pth"
_OF_THE_DATA = ("data_identifier", "median_image_size_in_voxels", "batch_dice", SECTION)
"""Keys of a configuration that describe the data; the others say what network it trains, on what patches of what spacing."""


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
    trained = _trained(file)
    if trained is None:
        return (StartModel(file.name),)
    plans, name, trainer = trained
    planned = plans.get_configuration(name).configuration.get(SECTION)
    section = None if planned is None else FedHarmSection.from_dict(planned)
    model = f"{plans.dataset_name}/{trainer}__{plans.plans_name}__{name}"
    if section is None:
        return (StartModel(model),)
    private = section.privacy
    own = StartModel(model) if private is None else StartModel(model, private.epsilon, private.delta)
    return (own, *section.starts)


def with_networks_of(
    start: str | Path, plans: Mapping[str, Any], configurations: Sequence[str], options: PlanOptions
) -> dict[str, Any]:
    """Plans with the start's network, patch, spacing and normalization; compare nnU-Net's `move_plans_between_datasets`.

    A start fits no other network, and the fingerprint of other data, of few patients with noise above all, may lead to one.

    Args:
        start: as for `find_checkpoint`; with "", or one that holds bare weights, the plans stay as they are.
        plans: of the data.
        configurations: that are to be trained; the start is a model of one of them.
        options: that the plans were made with. Where they size the network, they are followed and the start has to fit.

    Raises:
        CheckpointError: no readable checkpoint.
        PlanError: a start of another configuration, or for another number of channels.
    """
    if not start or options.sizes_network:
        return dict(plans)
    file = find_checkpoint(start)
    trained = _trained(file)
    if trained is None:
        return dict(plans)
    known, name, _ = trained
    if name not in configurations:
        raise PlanError(f"{file} is a model of the configuration {name}, not of {' or '.join(configurations)}.")
    made, own = deepcopy(dict(plans)), plans["configurations"].get(name)
    if own is None:
        return made  # whoever trains it says what is missing
    theirs = {
        key: value for key, value in known.get_configuration(name).configuration.items() if key not in _OF_THE_DATA
    }
    there, here = (len(each["normalization_schemes"]) for each in (theirs, own))
    if there != here:
        raise PlanError(
            f"{file} is a model of images with {there} channels, here they have {here}. Give another start."
        )
    taken = {**own, **deepcopy(theirs)}
    if options.batch_size is not None:
        taken["batch_size"] = options.batch_size
    axes = {key: known.plans[key] for key in ("transpose_forward", "transpose_backward")}
    turned = any(list(plans[key]) != list(axes[key]) for key in axes)
    if turned or any(own.get(key) != taken.get(key) for key in CONFIGURATION_KEYS):
        # Other cases than those that plans without a start have: stock nnU-Net's among them.
        taken["data_identifier"] = f"{made['plans_name']}_{name}"
    others = {} if turned else made["configurations"]  # which were planned for other axes
    return {**made, **axes, "configurations": {**others, name: taken}}


def _trained(file: Path) -> tuple[PlansManager, str, str] | None:
    """Plans, configuration and trainer of a checkpoint; None of bare weights, of which nothing more is known."""
    content = read_checkpoint(file)
    if "init_args" not in content:
        return None
    arguments = content["init_args"]
    return PlansManager(arguments["plans"]), str(arguments["configuration"]), str(content["trainer_name"])
