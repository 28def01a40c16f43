"""Hooks of a trainer under differential privacy; without a `privacy` part in the plans each is the base class's own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from nnunet_fedharm.errors import PrivacyError
from nnunet_fedharm.harmonizers.training import is_distributed
from nnunet_fedharm.nnunet_root import environment
from nnunet_fedharm.planning.private_fingerprint import fingerprint_file
from nnunet_fedharm.planning.section import FedHarmSection
from nnunet_fedharm.privacy.options import PRIVACY_FILE, RESERVE
from nnunet_fedharm.privacy.patient_gradients import PatientGradients
from nnunet_fedharm.privacy.shared_steps import SharedSteps
from nnunet_fedharm.sites.files import read_json, write_json
from nnunet_fedharm.trainers.patient_loader import PatientDraw, PatientLoader, from_stock_loader
from nnunet_fedharm.trainers.plain_patches import PlainPatches
from nnunet_fedharm.trainers.private_sampling import SEGMENTER
from nnunet_fedharm.trainers.private_training import PrivateTraining

if TYPE_CHECKING:
    from nnunet_fedharm.trainers.fedharm_trainer import nnUNetTrainerFedHarm

WITHHELD = 0.0
"""Stands for every loss and Dice in nnU-Net's log, which each checkpoint carries."""


def refuse_processes(section: FedHarmSection) -> None:
    """Refuse a private training in several processes, before anything is made for it.

    Raises:
        PrivacyError: it is one. Their gradients are averaged within each backward pass, before a patient's is clipped.
    """
    if section.privacy is not None and is_distributed():
        raise PrivacyError(
            "Differential privacy trains in one process: several would mix their patients' gradients before these are clipped. "
            "Start it without -num_gpus."
        )


class PrivateHooks(PlainPatches):
    """Between nnU-Net's trainer and ours. `private` is None without differential privacy."""

    private: PrivateTraining | None = None
    save_every: int
    """Epochs between two checkpoints, nnU-Net's."""
    run_id: str | None = None
    """Name of the run in the ledger; None makes one of plans, configuration and fold."""
    _gradients: PatientGradients | None = None

    def start_private(self, shared: SharedSteps | None = None) -> None:
        """Set up differential privacy if the plans ask for it; needs the network and the site of each case.

        Args:
            shared: the noise that all sites add together; see `clipped_sum`.
        """
        trainer = cast("nnUNetTrainerFedHarm", self)
        if trainer.section.privacy is not None and self.private is None:
            self.private = PrivateTraining.beside(trainer, trainer.section.privacy, shared=shared)

    def get_dataloaders(self) -> Any:
        """Base loaders; under DP the training one draws patients instead of patches, with the base's patches and augmentation."""
        if self.private is None:
            return super().get_dataloaders()
        workers = get_allowed_n_proc_DA()
        # No worker processes for nnU-Net's loaders: threads of our own load for DP.
        with environment({"nnUNet_n_proc_DA": "0"}):
            train, validation = super().get_dataloaders()
        phase = self.private.phases[SEGMENTER]
        load = from_stock_loader(train.data_loader, self.private.options.patches_per_patient)
        return PatientLoader(phase.patients, phase.sample_rate, load, workers=workers), validation

    def on_train_start(self) -> None:
        """As the base class; under DP without validation, whose every number would be a release."""
        super().on_train_start()
        if not self.disable_checkpointing and self.local_rank == 0:
            # Of an earlier training in this folder: it promises nothing about the checkpoints to come.
            (Path(self.output_folder) / PRIVACY_FILE).unlink(missing_ok=True)
        if self.private is not None:
            self._withhold_fingerprint()
            self._withhold_times()
            # nnU-Net saves every 50 epochs: what a crash repeats is charged again, and the noise is made for that share more.
            self.save_every = max(1, min(self.save_every, int(RESERVE * self.num_epochs)))
            # nnU-Net's optimizer holds all parameters: noise must not move those that are frozen.
            held = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            parameters = [parameter for parameter in held if parameter.requires_grad]
            self._gradients = self.private.gradients(SEGMENTER, parameters)
            self.num_val_iterations_per_epoch = 0
            self.print_to_log_file(
                f"Differential privacy: noise multiplier {self.private.noise_multiplier:.3g} for epsilon "
                f"{self.private.options.epsilon:g} at delta {self.private.options.delta:g} by patient. No validation is run; "
                f"losses and Dice in the checkpoints read {WITHHELD:g}, and an epoch a second."
            )

    def _withhold_times(self) -> None:
        """Epochs in nnU-Net's log, which each checkpoint carries, all take a second: the true times tell how many were drawn."""
        log = self.logger.log

        def without_times(key: str, value: Any, step: int) -> None:
            ends = key == "epoch_end_timestamps"
            log(key, float(step + ends) if key.endswith("_timestamps") else value, step)

        self.logger.log = without_times

    def _withhold_fingerprint(self) -> None:
        """Where plans were made from a noisy fingerprint, the results folder gets that one instead of nnU-Net's own."""
        assert self.private is not None
        noise = self.private.options.fingerprint_multiplier
        source = fingerprint_file(Path(self.preprocessed_dataset_folder_base), noise)
        if noise and source.is_file() and self.local_rank == 0:
            fingerprint = read_json(source, what="The private fingerprint")["fingerprint"]
            write_json(fingerprint, Path(self.output_folder_base) / "dataset_fingerprint.json")

    def train_step(self, batch: Any) -> dict[str, Any]:
        """Base step, or one step over the patients drawn; their losses are printed at this place and go nowhere else."""
        if not isinstance(batch, PatientDraw):
            step: dict[str, Any] = super().train_step(batch)
            return step
        assert self.private is not None
        assert self._gradients is not None
        return {"loss": self.private.segmenter_step(batch, self._gradients)}

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """Base logging; under DP the epoch enters the ledger and the log gets no loss."""
        if self.private is None:
            super().on_train_epoch_end(train_outputs)
            return
        losses = [loss for output in train_outputs for loss in output["loss"]]
        mean = f"{np.mean(losses):.4f}" if losses else "none, nobody was drawn"
        self.print_to_log_file(f"Training loss, for this place only: {mean}")
        self.private.record(SEGMENTER)
        self.logger.log("train_losses", WITHHELD, self.current_epoch)

    def on_validation_epoch_end(self, val_outputs: list[dict[str, Any]]) -> None:
        """Base logging; nothing was validated under DP."""
        if self.private is None:
            super().on_validation_epoch_end(val_outputs)
            return
        heads = self.label_manager.num_segmentation_heads - (0 if self.label_manager.has_regions else 1)
        self.logger.log("mean_fg_dice", WITHHELD, self.current_epoch)
        self.logger.log("dice_per_class_or_region", [WITHHELD] * heads, self.current_epoch)
        self.logger.log("val_losses", WITHHELD, self.current_epoch)

    def on_train_end(self) -> None:
        """As the base class; under DP no epoch is the best one, so the last one is."""
        super().on_train_end()
        if self.private is None:
            return
        self.dataloader_train.close() if self.dataloader_train is not None else None
        if not self.disable_checkpointing:
            folder = Path(self.output_folder)
            shutil.copyfile(folder / "checkpoint_final.pth", folder / "checkpoint_best.pth")
            self.private.write_card(folder)
