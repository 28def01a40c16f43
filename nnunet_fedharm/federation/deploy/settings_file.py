"""The settings of a server or a site that people edit: a few keys in a TOML file."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nnunet_fedharm.errors import SetupError


def read_settings(
    path: Path, kinds: Mapping[str, Callable[[Any], Any]], *, mend: str, defaults: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The values of some keys.

    Args:
        kinds: key -> what makes its value of what stands in the file, such as `int`.
        mend: the command that writes the file.
        defaults: values of keys that may be missing.

    Raises:
        SetupError: the file is missing or damaged, or lacks a key.
    """
    try:
        values = {**(defaults or {}), **tomllib.loads(path.read_text(encoding="utf-8"))}
        return {key: kind(values[key]) for key, kind in kinds.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SetupError(f"{path} is missing or damaged. {mend}") from error
