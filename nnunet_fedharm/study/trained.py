"""What a cell's training left, and its record in the cell's folder, with paths that a moved study folder keeps right."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nnunet_fedharm.sites.files import read_json, write_json

TRAINED_FILE = "trained.json"
SPENT = ("train_s", "energy_j", "counters")
"""Keys of the record beside those of `Trained`: what the training took."""


@dataclass(frozen=True)
class Trained:
    """What a training left.

    Attributes:
        models: test site -> results folder TRAINER__PLANS__CONFIGURATION that serves it; a held-out site's is the one that a
            new hospital would be given, before `new_site` adapts it.
        styles: test site -> style for the prediction, "stored" or a site's; see `trainers.predictor`.
        bytes_up, bytes_down: of weights.
        epsilon: spent by each patient of the site that spent most; None without differential privacy.
        without_noise: releases about patients that have no epsilon.
        shared_s: seconds of planning and preprocessing that were spared, as an earlier step had done them; None: not recorded.
    """

    models: Mapping[str, str]
    styles: Mapping[str, str]
    bytes_up: int = 0
    bytes_down: int = 0
    epsilon: float | None = None
    without_noise: tuple[str, ...] = ()
    shared_s: float | None = None


def write_trained(folder: Path, trained: Trained, spent: Mapping[str, Any]) -> None:
    """Record a training in its cell's folder; models are named from there."""
    models = {site: os.path.relpath(model, folder) for site, model in trained.models.items()}
    write_json({**spent, **asdict(trained), "models": models}, folder / TRAINED_FILE)


def read_trained(folder: Path) -> tuple[Trained, dict[str, Any]]:
    """The training of a cell's folder, and the seconds and joules that it took.

    Raises:
        DataError: the record is missing or damaged.
    """
    content = read_json(folder / TRAINED_FILE, what="The record of a trained cell")
    spent = {name: content.pop(name) for name in SPENT}
    # Records of earlier releases hold absolute paths, which stay what they are.
    models = {site: os.path.normpath(folder / model) for site, model in content["models"].items()}
    return Trained(**{**content, "models": models, "without_noise": tuple(content["without_noise"])}), spent
