"""Checkpoints that are whole or absent, and of the training that goes on from them."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_fedharm.errors import CheckpointError
from nnunet_fedharm.planning.section import read_section


def save_atomically(filename: str, write: Callable[[str], None]) -> None:
    """Let `write` fill a temporary file beside `filename`, flush it to disk, then move it into place.

    Raises:
        CheckpointError: writing failed (disk full, no permission); a former file of that name is untouched.
    """
    # Same folder: os.replace is atomic only within one file system.
    temporary = f"{filename}.writing"
    try:
        write(temporary)
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, filename)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        if os.path.exists(temporary):
            os.remove(temporary)
        kept = "The former checkpoint is untouched." if os.path.exists(filename) else "No checkpoint exists yet."
        raise CheckpointError(
            f"Cannot write {filename}: {error}. {kept} Free disk space and continue with --c."
        ) from error


def has_checkpoint(folder: str) -> bool:
    """Whether nnU-Net's `--c` finds one in a fold's folder; stopped before its first, a training begins at its start again."""
    return any(os.path.isfile(os.path.join(folder, f"checkpoint_{name}.pth")) for name in ("final", "latest", "best"))


def refuse_other_training(filename: str, trainer_name: str, *, private: bool) -> None:
    """Refuse a checkpoint that a training cannot go on from.

    Args:
        trainer_name: of the training.
        private: whether it is under differential privacy: what it goes on from has to be, or its epsilon covers the rest alone.

    Raises:
        CheckpointError: another trainer wrote it, or without differential privacy.
    """
    # mmap: only names and plans are read here, the trainer reads the weights.
    checkpoint = torch.load(filename, map_location="cpu", mmap=True, weights_only=False)
    if checkpoint["trainer_name"] != trainer_name:
        raise CheckpointError(
            f"{filename} was written by {checkpoint['trainer_name']}, not by {trainer_name}. Train or predict with "
            f"-tr {checkpoint['trainer_name']}."
        )
    arguments = checkpoint["init_args"]
    began = PlansManager(arguments["plans"]).get_configuration(arguments["configuration"]).configuration
    if private and read_section(began).privacy is None:
        raise CheckpointError(BEGAN_WITHOUT.format(filename))


BEGAN_WITHOUT = (
    "{} was trained without differential privacy, and the plans ask for it now: no epsilon would cover what it has learned. "
    "Train anew without --c, or plan the private training under another --plans-name."
)
