"""Harmonizer kind -> trainer class name."""

from __future__ import annotations

from nnunet_fedharm.errors import PlanError

TRAINER_SUFFIX: dict[str, str] = {
    "none": "None",
    "augment": "Augment",
    "nyul": "Nyul",
    "curve": "Curve",
    "polarity": "Polarity",
    "cyclegan": "CycleGAN",
    "diffusion": "Diffusion",
}
"""Harmonizer kind -> end of the trainer's class name."""


def trainer_name_for(kind: str) -> str:
    """Name of the trainer class of a harmonizer kind.

    Raises:
        PlanError: no trainer trains this kind.
    """
    if kind not in TRAINER_SUFFIX:
        raise PlanError(f"No trainer trains the harmonizer {kind!r}. This release knows {', '.join(TRAINER_SUFFIX)}.")
    return f"nnUNetTrainerFedHarm{TRAINER_SUFFIX[kind]}"
