"""Checkpoints that are whole or absent."""

from __future__ import annotations

import os
from collections.abc import Callable

from nnunet_fedharm.errors import CheckpointError


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
