"""Measured features by content: the same voxels, labels and options are measured once, whatever the files are called.

A file per case, named by the SHA-256 of everything its numbers depend on, written as soon as the case is done. A killed run goes
on where it stopped, and runs beside each other share what they have. No case or site is named in it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnunet_fedharm.sites.files import write_text

Part = tuple[str, str, str]
"""Channel, region, scale."""


@dataclass(frozen=True)
class CaseFeatures:
    """What was measured on one case.

    Attributes:
        parts: (channel, region, scale) -> feature -> value; a feature that is not finite is left out.
        problems: one sentence for each region that could not be measured.
    """

    parts: dict[Part, dict[str, float]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def content_key(files: Sequence[Path], settings: Mapping[str, Any]) -> str:
    """SHA-256 over the bytes of the files in this order and the settings.

    Raises:
        OSError: a file cannot be read.
    """
    total = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in files:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def load(folder: Path, key: str) -> CaseFeatures | None:
    """What is stored under a key; None where nothing is, or nothing that can be read."""
    try:
        data = json.loads((folder / f"{key}.json").read_text(encoding="utf-8"))
        parts = {(channel, region, scale): dict(values) for channel, region, scale, values in data["parts"]}
        return CaseFeatures(parts, [str(problem) for problem in data["problems"]])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def store(folder: Path, key: str, features: CaseFeatures) -> None:
    """Write atomically.

    Raises:
        SetupError: the folder cannot be written.
    """
    parts = [[*part, values] for part, values in features.parts.items()]
    write_text(json.dumps({"parts": parts, "problems": features.problems}), folder / f"{key}.json")


def finite(values: Mapping[str, float]) -> dict[str, float]:
    """The features that exist."""
    return {name: value for name, value in values.items() if math.isfinite(value)}
