"""The settings of a server or a site that people edit: a few keys in a TOML file."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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


def change_setting(path: Path, key: str, value: str | int) -> None:
    """Give a key another value; comments and all other lines stay as people wrote them.

    Raises:
        SetupError: the file has the key in a way that cannot be changed line by line.
    """
    text = path.read_text(encoding="utf-8")
    # Only above the first table: a key of the same name may stand in [node_config].
    table = re.search(r"^\s*\[", text, flags=re.M)
    end = table.start() if table else len(text)
    line = re.compile(rf"""^(\s*{key}\s*=\s*)("[^"\n]*"|'[^'\n]*'|\w+)""", flags=re.M)
    changed = line.sub(lambda found: found[1] + json.dumps(value), text[:end], count=1) + text[end:]
    try:
        fits = tomllib.loads(changed) == {**tomllib.loads(text), key: value}
    except ValueError:
        fits = False
    if not fits:
        raise SetupError(f"Cannot change {key} in {path}. Write {key} = {json.dumps(value)} there yourself.")
    path.write_text(changed, encoding="utf-8")


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Around what makes or changes files of a folder.

    Raises:
        SetupError: one of them cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise SetupError(
            f"Cannot write {error.filename or folder}: {error.strerror or error}. Choose a folder that this user may write."
        ) from error
