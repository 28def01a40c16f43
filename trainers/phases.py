"""How harmonizer and segmenter epochs follow each other on one machine, by the plans' `schedule.phases`.

The harmonizer's training does not depend on the segmenter's, so what a segmenter epoch needs is a number of harmonizer epochs
that are done before it. `HarmonizerPhase.catch_up` trains what is missing: everything before the first epoch where phases do
not alternate, a share before each block where they do. Continued or not, an epoch draws the same patches.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from torch import nn

from nnunet_fedharm.errors import CheckpointError
from nnunet_fedharm.harmonizers import doubt
from nnunet_fedharm.harmonizers.training import HarmonizerTraining
from nnunet_fedharm.trainers.checkpoints import BEGAN_WITHOUT, save_atomically
from nnunet_fedharm.trainers.harmonizer_phase import harmonizer_epoch, trainable
from nnunet_fedharm.trainers.patches import PatchSampler
from nnunet_fedharm.trainers.private_sampling import HARMONIZER
from nnunet_fedharm.trainers.seeds import derive_seed, patch_seed, torch_generator

if TYPE_CHECKING:
    from nnunet_fedharm.trainers.fedharm_trainer import nnUNetTrainerFedHarm

HARMONIZER_CHECKPOINT = "checkpoint_harmonizer.pth"


class HarmonizerPhase:
    """The harmonizer epochs of one trainer; optimizers live on between blocks and, in their own checkpoint, after `--c`."""

    def __init__(self, trainer: nnUNetTrainerFedHarm) -> None:
        self.trainer = trainer
        self.schedule = trainer.section.schedule
        self._training: HarmonizerTraining | None = None

    def catch_up(self, segmenter_epoch: int) -> None:
        """Train the harmonizer epochs that are due before `segmenter_epoch`.

        Raises:
            CheckpointError: the harmonizer's checkpoint does not belong to the segmenter's.
        """
        trainer, due = self.trainer, self.schedule.harmonizer_epochs_before(segmenter_epoch)
        if not trainer.harmonizer.learned or int(trainer.harmonizer.trained_epochs) >= due:
            return
        if segmenter_epoch > 0:
            # Else `--c` could meet a harmonizer that is more than one block ahead of the segmenter.
            self._save_segmenter()
        training = self._started(due)
        sampler = trainer.harmonizer_sampler(np.random.default_rng())  # each epoch brings its own generator
        with trainable(trainer.harmonizer):
            for epoch in range(int(trainer.harmonizer.trained_epochs), due):
                self._epoch(training, sampler, epoch)
                if epoch == self.schedule.harmonizer_epochs - 1:
                    trainer.close_gates_without_gain(sampler)
                self.save(training)
        if due == self.schedule.harmonizer_epochs:
            self._training = None  # its memory is the segmenter's now

    def trained(self) -> int:
        """Epochs that are done: the network's, or after `--c` those of the phase's own checkpoint, which is read later."""
        trained = int(self.trainer.harmonizer.trained_epochs)
        if not (self.trainer.continued and os.path.isfile(self._file)):
            return trained
        kept = torch.load(self._file, map_location="cpu", mmap=True, weights_only=True)
        return max(trained, int(kept["harmonizer"]["trained_epochs"]))

    def _epoch(self, training: HarmonizerTraining, sampler: PatchSampler, epoch: int) -> None:
        trainer = self.trainer
        seed = patch_seed(self.schedule.seed, private=trainer.private is not None)
        training.set_epoch(epoch)
        # DDP ranks draw different patches; an epoch draws the same whether or not the phase was interrupted before.
        stream = (f"fold_{trainer.fold}", f"rank_{trainer.local_rank}", f"epoch_{epoch}")
        sampler.rng = np.random.default_rng(derive_seed(seed, *stream, "patches"))
        losses = self.epoch(training, sampler, torch_generator(seed, *stream, "harmonizer"), epoch)
        parts = ", ".join(f"{name} {value:.4f}" for name, value in losses.items())
        trainer.print_to_log_file(f"Harmonizer epoch {epoch}: {parts}")
        if epoch == self.schedule.harmonizer_epochs - 1:
            votes = dict(zip(trainer.bank, trainer.harmonizer.bank_polarity.amin(dim=-1).tolist(), strict=True))
            if against := doubt(trainer.section.kind, losses, votes):
                trainer.print_to_log_file(f"WARNING: {against}")

    def epoch(
        self, training: HarmonizerTraining, sampler: PatchSampler, generator: torch.Generator, number: int
    ) -> dict[str, float]:
        """One epoch, of one machine or of a round; under differential privacy patient by patient and entered in the ledger."""
        trainer, steps = self.trainer, self.schedule.iterations_per_epoch
        if trainer.private is None:
            return harmonizer_epoch(training, sampler, steps=steps, device=trainer.device, generator=generator)
        last = number == self.schedule.harmonizer_epochs - 1
        losses = trainer.private.harmonizer_epoch(training, sampler, generator=generator, last=last)
        trainer.private.record(HARMONIZER)
        return losses

    def save(self, training: HarmonizerTraining) -> None:
        """Harmonizer, its optimizers and its site-local modules."""
        trainer = self.trainer
        if trainer.local_rank != 0 or trainer.disable_checkpointing:
            return
        private = trainer.private is not None
        state = {"harmonizer": trainer.harmonizer.state_dict(), "training": training.state_dict(), "private": private}
        save_atomically(self._file, lambda path: torch.save(state, path))

    @property
    def _file(self) -> str:
        return os.path.join(self.trainer.output_folder, HARMONIZER_CHECKPOINT)

    def _started(self, due: int) -> HarmonizerTraining:
        if self._training is None:
            training = self.trainer.harmonizer.make_training(
                lr=self.schedule.harmonizer_lr, total_epochs=self.schedule.harmonizer_epochs
            )
            if self.trainer.continued:
                self._resume(training, due)
            self._training = training
        return self._training

    def _resume(self, training: HarmonizerTraining, due: int) -> None:
        harmonizer = self.trainer.harmonizer
        trained = int(harmonizer.trained_epochs)
        if not os.path.isfile(self._file):
            if trained:
                raise CheckpointError(
                    f"The harmonizer has {trained} of {self.schedule.harmonizer_epochs} epochs, but {self._file} with its "
                    "optimizer is not there. Put it back, or train anew without --c."
                )
            return
        state = torch.load(self._file, map_location=self.trainer.device, weights_only=True)
        if self.trainer.private is not None and not state.get("private", False):
            raise CheckpointError(BEGAN_WITHOUT.format(self._file))
        kept = int(state["harmonizer"]["trained_epochs"])
        if not trained <= kept <= due:
            raise CheckpointError(
                f"{self._file} holds {kept} harmonizer epochs, but the segmenter's checkpoint belongs to {trained} to {due}. "
                "They are not of the same training: keep both as they were written, or train anew without --c."
            )
        harmonizer.load_state_dict(state["harmonizer"])
        training.load_state_dict(state["training"])
        self.trainer.print_to_log_file(f"Harmonizer phase resumes at epoch {kept}.")

    def _save_segmenter(self) -> None:
        trainer = self.trainer
        trainer.current_epoch -= 1  # nnU-Net's checkpoints count the epoch that they are written in as done
        trainer.save_checkpoint(os.path.join(trainer.output_folder, "checkpoint_latest.pth"))
        trainer.current_epoch += 1


class GroupedPolyLRScheduler(PolyLRScheduler):
    """nnU-Net's polynomial decay for groups of parameters, each times the group's own `lr_factor`."""

    def step(self, current_step: int | None = None) -> None:
        """Replaces the one rate of all groups."""
        super().step(current_step)
        for group in self.optimizer.param_groups:
            group["lr"] *= group["lr_factor"]
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def give_own_group(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], lr_factor: float) -> None:
    """Move parameters out of the optimizer's only group into one whose rate is `lr_factor` times the other's.

    Without weight decay: where no labelled site's gate is open no gradient comes, and they stay exactly as they are.
    """
    (first,) = optimizer.param_groups
    moved = {id(parameter) for parameter in parameters}
    first["params"] = [parameter for parameter in first["params"] if id(parameter) not in moved]
    first["lr_factor"] = 1.0
    own: dict[str, Any] = {key: value for key, value in first.items() if key not in ("params", "weight_decay")}
    optimizer.add_param_group({**own, "params": parameters, "weight_decay": 0.0, "lr_factor": lr_factor})
