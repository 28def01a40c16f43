"""nnU-Net trainers with a harmonizer in front, and one site's work in a federated round."""

from nnunet_fedharm.trainers.fedharm_trainer import (
    nnUNetTrainerFedHarm,
    nnUNetTrainerFedHarmCurve,
    nnUNetTrainerFedHarmCycleGAN,
    nnUNetTrainerFedHarmDiffusion,
    nnUNetTrainerFedHarmNone,
    nnUNetTrainerFedHarmNyul,
    trainer_name_for,
)

__all__ = [
    "nnUNetTrainerFedHarm",
    "nnUNetTrainerFedHarmCurve",
    "nnUNetTrainerFedHarmCycleGAN",
    "nnUNetTrainerFedHarmDiffusion",
    "nnUNetTrainerFedHarmNone",
    "nnUNetTrainerFedHarmNyul",
    "trainer_name_for",
]
