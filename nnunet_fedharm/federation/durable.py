"""Files that survive a crash at any moment: temporary file, fsync, rename, and a hash to tell damage from health."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from nnunet_fedharm.errors import CheckpointError
from nnunet_fedharm.federation.codec import Weights


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file's content at once: after a crash it holds the former content or the new one, never a mixture.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; the former file stays whole.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):  # where even this fails, the first error is the one to tell
            temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"Cannot write {path}: {error.strerror}. The former file is untouched; free space or mend the folder's rights, "
            "then run the same command again."
        ) from error


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON object with the SHA-256 of its content."""
    body = json.dumps(data, allow_nan=False)  # key order stays: the order of labels means something to nnU-Net
    digest = hashlib.sha256(body.encode()).hexdigest()
    write_bytes(path, f'{{"sha256": "{digest}", "content": {body}}}'.encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read what `write_json` wrote.

    Raises:
        CheckpointError: the file is missing, damaged or changed.
    """
    try:
        whole = json.loads(path.read_bytes())
        content = whole["content"]
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        healthy = digest == whole["sha256"]
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged. Move it away to start the run anew.") from error
    if not healthy or not isinstance(content, dict):
        raise CheckpointError(f"{path} does not match its own SHA-256. Move it away to start the run anew.")
    return content


def write_weights(path: Path, weights: Weights) -> str:
    """Write tensors as safetensors; returns the SHA-256 of the file."""
    data = save_tensors({name: weights[name] for name in sorted(weights)})
    write_bytes(path, data)
    return hashlib.sha256(data).hexdigest()


def read_weights(path: Path, digest: str) -> Weights:
    """Read tensors and check the file's SHA-256.

    Raises:
        CheckpointError: the file is missing or is not the one that the digest belongs to.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror}.") from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise CheckpointError(
            f"{path} does not match the SHA-256 in the server's state. Move its folder away to start anew."
        )
    try:
        return dict(load_tensors(data))
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file.") from error


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable (POSIX only; other systems have no folder handles)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def file_lock(path: Path, *, wait_s: float | None = None) -> Iterator[bool]:
    """Hold a lock that ends with its process, however that ends.

    Args:
        path: the lock file, made where missing.
        wait_s: seconds to wait; None waits as long as it takes.

    Yields:
        Whether the lock is held; True on systems without such locks (not POSIX).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if os.name != "posix":
        yield True
        return
    import fcntl  # not on every system

    end = None if wait_s is None else time.monotonic() + wait_s
    with path.open("a") as stream:
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | (0 if end is None else fcntl.LOCK_NB))
                held = True
            except BlockingIOError:
                held = False
            if held or (end is not None and time.monotonic() > end):
                break
            time.sleep(0.2)
        yield held
