"""Hook of a trainer that cuts patches and changes nothing else: the control of nnU-Net's augmentation."""

from __future__ import annotations

from typing import Any

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class PlainPatches(nnUNetTrainer):
    """As nnU-Net's `nnUNetTrainerNoDA` where `augmented` is False, else the base class's own.

    A variant class of nnU-Net would double every one of our trainers; the plans say it instead.
    """

    augmented: bool = True

    def get_dataloaders(self) -> Any:
        """Base loaders; without augmentation the validation transforms serve training too."""
        if not self.augmented:
            # An attribute, because the base class's method is static and cannot see the plans.
            self.get_training_transforms = self._validation_transforms
        return super().get_dataloaders()

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> Any:
        """Base values; without augmentation no larger patch to rotate in, and no mirroring, at prediction neither."""
        rotation, dummy, initial, mirror = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        if self.augmented:
            return rotation, dummy, initial, mirror
        self.inference_allowed_mirroring_axes = None
        return rotation, dummy, self.configuration_manager.patch_size, None

    def _validation_transforms(
        self,
        patch_size: Any,
        rotation_for_DA: Any,
        deep_supervision_scales: Any,
        mirror_axes: Any,
        do_dummy_2d_data_aug: bool,
        use_mask_for_norm: Any = None,
        is_cascaded: bool = False,
        foreground_labels: Any = None,
        regions: Any = None,
        ignore_label: Any = None,
    ) -> Any:
        return self.get_validation_transforms(
            deep_supervision_scales, is_cascaded, foreground_labels, regions, ignore_label
        )
