"""One trainer class per harmonizer kind: nnU-Net finds trainers by name, and names results folders after them."""

from __future__ import annotations

from nnunet_fedharm.trainers.fedharm_trainer import nnUNetTrainerFedHarm


class nnUNetTrainerFedHarmNone(nnUNetTrainerFedHarm):  # noqa: N801
    """The identity harmonizer: the control of every comparison."""

    kind = "none"


class nnUNetTrainerFedHarmAugment(nnUNetTrainerFedHarm):  # noqa: N801
    """No harmonizer: strong augmentation of appearance."""

    kind = "augment"


class nnUNetTrainerFedHarmNyul(nnUNetTrainerFedHarm):  # noqa: N801
    """Federated Nyul landmarks."""

    kind = "nyul"


class nnUNetTrainerFedHarmCurve(nnUNetTrainerFedHarm):  # noqa: N801
    """Learned tone curve and gain."""

    kind = "curve"


class nnUNetTrainerFedHarmPolarity(nnUNetTrainerFedHarm):  # noqa: N801
    """A judge of inverted contrast, and Nyul's quantile map."""

    kind = "polarity"


class nnUNetTrainerFedHarmCycleGAN(nnUNetTrainerFedHarm):  # noqa: N801
    """Many-to-one CycleGAN."""

    kind = "cyclegan"


class nnUNetTrainerFedHarmDiffusion(nnUNetTrainerFedHarm):  # noqa: N801
    """Flow-matching bridge from the image to the reference's appearance."""

    kind = "diffusion"
