"""A site's durable state between rounds: one file per kind and round, read back without running any code from it."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch

from nnunet_fedharm.errors import CheckpointError
from nnunet_fedharm.trainers.checkpoints import save_atomically

KEPT_STATES = 2
"""The state a round started from and the one it wrote: enough to repeat it."""


class RoundStates:
    """Files `<kind>_round_<number>.pt` in one folder.

    Args:
        folder: of the run at this site; made when first written to.
        site: for messages.
        device: where tensors are read to.
    """

    def __init__(self, folder: Path, site: str, device: str) -> None:
        self.folder = folder
        self.site = site
        self.device = device

    def older_than(self, kind: str, round_index: int | None) -> dict[str, Any] | None:
        """Newest state older than `round_index` (None: the newest of all), or None where there is none.

        Raises:
            CheckpointError: it cannot be read.
        """
        found = [path for index, path in self._files(kind) if round_index is None or index < round_index]
        return self._read(found[-1]) if found else None

    def exactly(self, kind: str, round_index: int) -> dict[str, Any]:
        """The state that this round wrote.

        Raises:
            CheckpointError: it is not there, or cannot be read.
        """
        path = self._file(kind, round_index)
        if not path.is_file():
            raise CheckpointError(
                f"Site {self.site} does not hold its {kind} state of round {round_index + 1} any more, and the server counts on "
                f"it. Put {path} back, or start the run anew with --restart."
            )
        return self._read(path)

    def keep(self, kind: str, round_index: int, state: dict[str, Any], *, also: set[int] | None = None) -> None:
        """Write a round's state and delete what can not be needed any more.

        Args:
            also: rounds whose states stay, of the older ones; None: the newest of them.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        save_atomically(str(self._file(kind, round_index)), lambda path: torch.save(state, path))
        older = [index for index, _ in self._files(kind) if index <= round_index]
        stay = set(older[-KEPT_STATES:]) if also is None else {round_index, *also}
        for index in older:
            if index not in stay:
                self._file(kind, index).unlink()

    def _file(self, kind: str, round_index: int) -> Path:
        return self.folder / f"{kind}_round_{round_index:05d}.pt"

    def _files(self, kind: str) -> list[tuple[int, Path]]:
        found = []
        for path in self.folder.glob(f"{kind}_round_*.pt"):
            match = re.fullmatch(rf"{kind}_round_(\d+)", path.stem)
            if match:
                found.append((int(match.group(1)), path))
        return sorted(found)

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            state: dict[str, Any] = torch.load(path, map_location=self.device, weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"Site {self.site} cannot read its training state {path} ({type(error).__name__}). "
                "Delete that file to continue with a fresh optimizer."
            ) from error
        return state
