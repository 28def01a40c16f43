"""A raw dataset as the user names it: a folder, a number, or a name."""

from __future__ import annotations

from pathlib import Path

from nnunet_fedharm.errors import SetupError
from nnunet_fedharm.nnunet_root import environment_paths, find_dataset


def find_raw_dataset(dataset: str) -> Path:
    """A folder as given, or the dataset of that number or name in nnUNet_raw.

    Raises:
        DataError: there is no such dataset.
        SetupError: no such folder, and nnUNet_raw is not set.
    """
    if Path(dataset).is_dir():
        return Path(dataset)
    try:
        raw, _, _ = environment_paths()
    except SetupError as error:
        raise SetupError(f"{dataset} is no folder, and it cannot be looked up by number or name: {error}") from error
    return raw / find_dataset(raw, Path(dataset).name)
