"""Replies of a round on disk, read back tensor by tensor, so that the server's memory does not grow with the number of sites.

Each reply becomes one safetensors file when it arrives. Sums go through the files in the order of the sites' names, not in the
order of arrival: so the result does not depend on who was faster, and a repeated round ends with the very same numbers. What
needs all sites at once (median, trimmed mean, Krum's distances) reads the same piece of every file.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import save_file

from nnunet_fedharm.errors import CheckpointError
from nnunet_fedharm.federation.aggregation import SiteUpdate
from nnunet_fedharm.federation.updates import CONTROL, with_prefix

SPOOL = "spool"
"""In the run's folder at the server."""
_DTYPES = {"F32": "float32", "I64": "int64", "U8": "uint8", "BOOL": "bool"}


@dataclass(frozen=True)
class _Entry:
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int


class SpooledTensors(Mapping[str, npt.NDArray[Any]]):
    """Tensors of one file by name; nothing is held, every look reads.

    Args:
        path: a safetensors file.
        prefix: names begin with it in the file.
        without: names that begin with it are left out.
    """

    def __init__(self, path: Path, *, prefix: str = "", without: str | None = None) -> None:
        self._path = path
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            head: dict[str, Any] = json.loads(stream.read(length))
        self._entries = {
            name[len(prefix) :]: _Entry(
                np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]
            )
            for name, entry in sorted(head.items())
            if name.startswith(prefix) and name != "__metadata__" and not (without and name.startswith(without))
        }

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        entry = self._entries[name]
        return self.piece(name, 0, math.prod(entry.shape)).reshape(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Shape without reading the tensor."""
        return self._entries[name].shape

    def piece(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        """Numbers `start` to `stop` of the flattened tensor."""
        entry = self._entries[name]
        where = entry.offset + start * entry.dtype.itemsize
        return np.fromfile(self._path, dtype=entry.dtype, count=stop - start, offset=where)


class Spool:
    """A folder with one file per site.

    Args:
        folder: exists.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def keep(self, site: str, update: SiteUpdate) -> SiteUpdate:
        """Write a reply's tensors; the same reply, which reads them when they are looked at.

        Raises:
            CheckpointError: the disk is full.
        """
        path = self.folder / f"{site}.safetensors"
        whole = {**update.weights, **with_prefix(update.control)}
        try:
            save_file({name: np.ascontiguousarray(value).reshape(value.shape) for name, value in whole.items()}, path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"Cannot keep the reply of {site} in {path}. Free space there, then run the same command again."
            ) from error
        return replace(
            update, weights=SpooledTensors(path, without=CONTROL), control=SpooledTensors(path, prefix=CONTROL)
        )


@contextmanager
def spooled(folder: Path) -> Iterator[Spool]:
    """A spool that is empty at the start of the block and gone after it.

    Args:
        folder: beside the server's checkpoints, with room for one round's replies.
    """
    shutil.rmtree(folder, ignore_errors=True)  # a killed server leaves its last round's
    folder.mkdir(parents=True)
    try:
        yield Spool(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
