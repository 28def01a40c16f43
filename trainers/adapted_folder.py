"""A results folder that serves one site: a copy of another one with that site stored as the source; no weight differs."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from nnunet_fedharm.errors import CheckpointError, DataError

EVIDENCE = "adaptation.json"
"""What the site's source was measured from; also the mark of a folder that may be overwritten."""

COPIED = ("plans.json", "dataset.json", "dataset_fingerprint.json")


def check_target(model: Path, target: Path, *, overwrite: bool) -> None:
    """Refuse a folder that would be lost.

    Raises:
        DataError: the target exists and may not be overwritten, is no adapted model, or holds or lies in the model.
    """
    own, new = model.resolve(), target.resolve()
    if own == new or own in new.parents or new in own.parents:
        raise DataError(f"{target} and the model {model} lie in one another. Choose another folder with -o.")
    if not target.exists():
        return
    if not overwrite:
        raise DataError(f"{target} exists. Choose another folder with -o, or give --overwrite.")
    if not (target / EVIDENCE).is_file():
        raise DataError(
            f"{target} holds no {EVIDENCE}, so `nnunet-fedharm adapt` did not write it, and it is not overwritten. "
            "Choose another folder with -o."
        )


def write_adapted_folder(
    model: Path,
    target: Path,
    sources: Mapping[str, Mapping[str, Tensor]],
    *,
    checkpoint: str,
    texts: Mapping[str, str],
    overwrite: bool = False,
) -> None:
    """Copy the model with a source stored in each fold; the target is there whole or not at all.

    Args:
        model: results folder TRAINER__PLANS__CONFIGURATION; stays as it is.
        target: folder to write.
        sources: name of the fold's folder -> `source_buffers` of its harmonizer.
        checkpoint: file name in the folds' folders.
        texts: file name -> content of further files; one of them `adaptation.json`.
        overwrite: replace a folder that this function wrote before.

    Raises:
        DataError: see `check_target`.
        CheckpointError: writing failed; a former target is untouched.
    """
    check_target(model, target, overwrite=overwrite)
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target: renaming is atomic only within one file system.
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.writing-", dir=target.parent))
        temporary.chmod(0o755)
        for name in COPIED:
            if (model / name).is_file():
                shutil.copyfile(model / name, temporary / name)
        for fold, buffers in sources.items():
            (temporary / fold).mkdir()
            state = torch.load(model / fold / checkpoint, map_location="cpu", weights_only=False)
            state["network_weights"].update({f"harmonizer.{name}": value for name, value in buffers.items()})
            torch.save(state, temporary / fold / checkpoint)
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        _move(temporary, target)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise CheckpointError(
            f"Cannot write {target}: {error}. Nothing was left there. Free disk space, or choose another folder with -o."
        ) from error
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)


def _move(temporary: Path, target: Path) -> None:
    """Put the new folder in the target's place; if that fails, the former one is put back."""
    if not target.exists():
        temporary.rename(target)
        return
    former = Path(tempfile.mkdtemp(prefix=f".{target.name}.former-", dir=target.parent)) / target.name
    target.rename(former)
    try:
        temporary.rename(target)
    except OSError:
        former.rename(target)
        raise
    finally:
        shutil.rmtree(former.parent, ignore_errors=True)
