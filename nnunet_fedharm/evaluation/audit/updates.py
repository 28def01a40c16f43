"""Updates of one site as their receiver gets them, each made from patches that the audit knows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from torch import Tensor, nn
from torch.nn import functional

from nnunet_fedharm.errors import DataError, PlanError
from nnunet_fedharm.evaluation.audit.model import patch_about_labels
from nnunet_fedharm.trainers.fedharm_trainer import nnUNetTrainerFedHarm
from nnunet_fedharm.trainers.private_sampling import SEGMENTER

Gradients = list[Tensor | None]


@dataclass(frozen=True, eq=False)
class KnownPatch:
    """The middle patch of a case."""

    case: str
    image: Tensor  # (1, C, *patch)
    labels: Tensor  # (1, 1, *patch)


def known_patches(
    trainer: nnUNetTrainerFedHarm, *, count: int, size: tuple[int, ...] | None, seed: int
) -> list[KnownPatch]:
    """The middle patches of `count` training cases, or of all if there are fewer.

    Args:
        trainer: whose data and network.
        count: of cases.
        size: of the patches; None: the plans'.
        seed: of the choice.

    Raises:
        DataError: fewer than two cases.
        PlanError: a size that the network cannot take.
    """
    names = sorted(trainer.do_split()[0])
    wanted = min(len(names), count)
    if wanted < 2:
        raise DataError("Gradient inversion compares patches of several cases; this fold trains fewer than two.")
    chosen = np.random.default_rng(seed).permutation(names)[:wanted]
    folder = Path(trainer.preprocessed_dataset_folder)
    planned = tuple(trainer.configuration_manager.patch_size)
    size = size or planned
    if len(size) != len(planned):
        raise PlanError(f"The plans have patches of {len(planned)} axes, --patch-size gives {len(size)}.")
    found = []
    for name in map(str, chosen):
        data, labels, *_ = infer_dataset_class(str(folder))(str(folder), [name]).load_case(name)
        image, target = patch_about_labels(np.asarray(data, np.float32), np.asarray(labels), size)
        found.append(
            KnownPatch(
                name,
                torch.from_numpy(image)[None].to(trainer.device),
                torch.from_numpy(target)[None].to(trainer.device),
            )
        )
    try:
        patch_loss(trainer, found[0].image, found[0])
    except (RuntimeError, ValueError) as error:
        raise PlanError(f"The network cannot take patches of {size}; its plans have {planned}: {error}") from error
    return found


def kinds_of_update(
    trainer: nnUNetTrainerFedHarm, local_steps: int
) -> dict[str, Callable[[Sequence[KnownPatch]], Gradients]]:
    """Name -> function from the patches, the attacked one first, to the update as the direction of a gradient."""
    found: dict[str, Callable[[Sequence[KnownPatch]], Gradients]] = {
        "one step": lambda own: _local_update(trainer, own[:1])
    }
    if local_steps > 1:
        name = f"{local_steps} local steps"
        found[name] = lambda own: _local_update(trainer, [own[i % len(own)] for i in range(local_steps)])
    if trainer.private is not None:
        found["one private step"] = lambda own: _private_update(trainer, own[0])
    return found


def _local_update(trainer: nnUNetTrainerFedHarm, steps: Sequence[KnownPatch]) -> Gradients:
    """What the weights moved by, as the direction of a gradient: the receiver subtracts the weight decay, which it knows."""
    weights = copy.deepcopy(trainer.network.state_dict())
    optimizer = copy.deepcopy(trainer.optimizer.state_dict())
    parameters = trained_parameters(trainer)
    before = [parameter.detach().clone() for parameter in parameters]
    for patch in steps:
        trainer.optimizer.zero_grad(set_to_none=True)
        patch_loss(trainer, patch.image, patch).backward()
        trainer.optimizer.step()
    group = trainer.optimizer.param_groups[0]
    factor = group["lr"] * (1 + group["momentum"] if group.get("nesterov") else 1)
    moved = [b - p.detach() for b, p in zip(before, parameters, strict=True)]
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.network.load_state_dict(weights)
    trainer.optimizer.load_state_dict(optimizer)
    return [m / factor - group["weight_decay"] * len(steps) * b for m, b in zip(moved, before, strict=True)]


def _private_update(trainer: nnUNetTrainerFedHarm, patch: KnownPatch) -> Gradients:
    """The noisy gradient of a step that drew this patient alone."""
    assert trainer.private is not None
    parameters = trained_parameters(trainer)
    gradients = trainer.private.gradients(SEGMENTER, parameters)
    gradients.start_patient()
    patch_loss(trainer, patch.image, patch).backward()
    gradients.end_patient()
    gradients.release()
    found = [None if parameter.grad is None else parameter.grad.detach().clone() for parameter in parameters]
    trainer.optimizer.zero_grad(set_to_none=True)
    return found


def patch_loss(trainer: nnUNetTrainerFedHarm, image: Tensor, patch: KnownPatch) -> Tensor:
    """The trainer's own loss of one patch, deep supervision included."""
    trainer.tell_sites({"keys": [patch.case]})
    output = trainer.network(image)
    trainer.harmonizer.set_batch_styles(None)
    if not isinstance(output, (list, tuple)):
        return trainer.loss(output, patch.labels)
    scaled = [functional.interpolate(patch.labels, size=level.shape[2:], mode="nearest-exact") for level in output]
    return trainer.loss(output, scaled)


def trained_parameters(trainer: nnUNetTrainerFedHarm) -> list[nn.Parameter]:
    """What the optimizer moves, each once."""
    held = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
    return list(dict.fromkeys(parameter for parameter in held if parameter.requires_grad))
