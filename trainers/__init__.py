"""nnU-Net trainers with a harmonizer in front, and one site's work in a federated round."""

from nnunet_fedharm.trainers.fedharm_trainer import nnUNetTrainerFedHarm
from nnunet_fedharm.trainers.kinds import (
    nnUNetTrainerFedHarmAugment,
    nnUNetTrainerFedHarmCurve,
    nnUNetTrainerFedHarmCycleGAN,
    nnUNetTrainerFedHarmDiffusion,
    nnUNetTrainerFedHarmNone,
    nnUNetTrainerFedHarmNyul,
    nnUNetTrainerFedHarmPolarity,
)
from nnunet_fedharm.trainers.names import trainer_name_for

__all__ = [
    "nnUNetTrainerFedHarm",
    "nnUNetTrainerFedHarmAugment",
    "nnUNetTrainerFedHarmCurve",
    "nnUNetTrainerFedHarmCycleGAN",
    "nnUNetTrainerFedHarmDiffusion",
    "nnUNetTrainerFedHarmNone",
    "nnUNetTrainerFedHarmNyul",
    "nnUNetTrainerFedHarmPolarity",
    "trainer_name_for",
]
