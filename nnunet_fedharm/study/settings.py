"""What a cell's numbers depend on beside its arm and seed; a study compares nothing that was made with different settings."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from nnunet_fedharm.errors import DataError
from nnunet_fedharm.sites.files import read_json
from nnunet_fedharm.study.cell_files import ENVIRONMENT_FILE, cell_folder
from nnunet_fedharm.study.matrix import Arm, Cell, augmented
from nnunet_fedharm.study.study_file import STUDY_FILE, StudyFile

_OF_THE_MACHINE = ("num_processes", "gpu_memory_gb")
"""Keys of [training] that a cell may be run with in another way; the network's size is held by the data."""


def settings_of(study: StudyFile, arm: Arm) -> dict[str, Any]:
    """Key -> value, as JSON gives it back."""
    sizes = asdict(study.training_at(arm.epsilon))
    training = {name: value for name, value in sizes.items() if name not in _OF_THE_MACHINE}
    privacy = {} if arm.epsilon is None else {f"[privacy] {name}": value for name, value in study.privacy.items()}
    if arm.augmentation and not augmented(study, arm):
        privacy["[privacy] augmentation"] = False
    found = {"reference": study.subject.reference, "fold": study.subject.fold, **training, **privacy}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def check_settings(study: StudyFile, cell: Cell) -> None:
    """Refuse a cell that was begun with other settings than study.toml has now.

    Raises:
        DataError: it was; the sentence has the key and both values. Cells of releases that recorded none are taken as they are.
    """
    file = cell_folder(study, cell) / ENVIRONMENT_FILE
    before = read_json(file, what="The environment of a cell").get("settings") if file.is_file() else None
    if before is None:
        return
    now = settings_of(study, cell.arm)
    for name in [*before, *(name for name in now if name not in before)]:
        if before.get(name) != now.get(name):
            raise DataError(
                f"The cell {cell.name} was begun with {name} = {before.get(name)}, {STUDY_FILE} has {now.get(name)} now. Put it "
                "back, or start a new study folder: results of both cannot be compared."
            )
