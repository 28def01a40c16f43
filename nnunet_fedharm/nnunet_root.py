"""One nnU-Net root: the three folders that nnU-Net reads from the environment.

nnU-Net 2.8 looks `nnUNet_raw`, `nnUNet_preprocessed` and `nnUNet_results` up at each use (`nnunetv2/paths.py`), so one
process can serve several sites one after the other, each inside `NnunetRoot(...).activate()`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nnunet_fedharm.errors import DataError, SetupError

_VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


@dataclass(frozen=True)
class NnunetRoot:
    """A folder holding `nnUNet_raw/`, `nnUNet_preprocessed/` and `nnUNet_results/`.

    Attributes:
        path: the folder itself; the three sub-folders are created by `create`.
    """

    path: Path

    @property
    def raw(self) -> Path:
        return self.path / "nnUNet_raw"

    @property
    def preprocessed(self) -> Path:
        return self.path / "nnUNet_preprocessed"

    @property
    def results(self) -> Path:
        return self.path / "nnUNet_results"

    def create(self) -> NnunetRoot:
        """Make the three folders where missing.

        Raises:
            SetupError: the folder cannot be written.
        """
        for folder in (self.raw, self.preprocessed, self.results):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise SetupError(
                    f"Cannot create {folder}: {error.strerror}. Choose a folder that this user may write."
                ) from error
            if not os.access(folder, os.W_OK):
                raise SetupError(f"Cannot write in {folder}. Choose a folder that this user may write.")
        return self

    @contextmanager
    def activate(self) -> Iterator[NnunetRoot]:
        """Point nnU-Net's environment variables at this root, for this process and its children, until the block ends."""
        folders = (self.raw, self.preprocessed, self.results)
        with environment(dict(zip(_VARIABLES, map(str, folders), strict=True))):
            yield self


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables, for this process and its children, until the block ends."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def find_dataset(folder: Path, dataset: str, *, advice: str = "Check -d and nnUNet_raw.") -> str:
    """Folder name of a dataset given by number ("910") or name, below nnUNet_raw or nnUNet_preprocessed.

    Args:
        folder: where datasets lie.
        advice: what to do where it is not there.

    Raises:
        DataError: there is none, or several.
    """
    names = sorted(path.name for path in folder.glob("Dataset*") if path.is_dir())
    number = f"Dataset{int(dataset):03d}_" if dataset.isdigit() else None
    found = [name for name in names if (name == dataset if number is None else name.startswith(number))]
    if len(found) == 1:
        return found[0]
    known = ", ".join(names) or "nothing"
    there = f"several datasets of that number ({', '.join(found)})" if found else f"only: {known}"
    raise DataError(f"Dataset {dataset} was not found in {folder}, which holds {there}. {advice}")


def environment_paths() -> tuple[Path, Path, Path]:
    """(raw, preprocessed, results) from the environment, as the stock nnU-Net commands use them.

    Raises:
        SetupError: a variable is not set.
    """
    missing = [name for name in _VARIABLES if not os.environ.get(name)]
    if missing:
        raise SetupError(
            f"The environment variable {missing[0]} is not set. Export nnUNet_raw, nnUNet_preprocessed and nnUNet_results."
        )
    raw, preprocessed, results = (Path(os.environ[name]) for name in _VARIABLES)
    return raw, preprocessed, results
