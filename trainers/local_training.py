"""One site's work in a federated round; no Flower in here.

A site keeps its optimizer, gradient scaler and training log in its own folder, one file per round, and restores the newest
one that is older than the round it is asked for. So a round that is repeated after a crash starts from the same state and,
with seeds derived from (run, site, phase, round), draws the same numbers.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import numpy as np
import torch

from nnunet_fedharm.errors import CheckpointError, FederationError, PlanError
from nnunet_fedharm.harmonizers import LEARNED
from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.planning.section import read_section
from nnunet_fedharm.trainers.checkpoints import save_atomically
from nnunet_fedharm.trainers.fedharm_trainer import nnUNetTrainerFedHarm
from nnunet_fedharm.trainers.gates import close_where_dice_falls, close_without_gain
from nnunet_fedharm.trainers.harmonizer_phase import harmonizer_epoch, trainable
from nnunet_fedharm.trainers.results import make_trainer, write_results_folder
from nnunet_fedharm.trainers.seeds import derive_seed, seed_everything, torch_generator
from nnunet_fedharm.trainers.weights import Weights, export_weights, load_weights

Phase = Literal["harmonizer", "segmenter"]

KEPT_STATES = 2
"""The state a round started from and the one it wrote: enough to repeat it."""


@dataclass(frozen=True)
class LocalResult:
    """What a site sends back.

    Attributes:
        weights: updated weights, canonical names.
        n_steps: optimizer steps taken.
        n_cases: training cases drawn from.
        metrics: means over the local epochs: train_loss, val_loss, dice (foreground pseudo Dice), seconds.
    """

    weights: Weights
    n_steps: int
    n_cases: int
    metrics: dict[str, float]


class LocalTraining:
    """Trains one site between two messages.

    Args:
        root: the site's nnU-Net root; nothing outside it and `state_folder` is read or written.
        dataset_name: `DatasetXXX_Name`, preprocessed in that root.
        plans: the federation's plans with the `fedharm` section and its style bank.
        dataset_json: the federation's.
        configuration: 2d or 3d_fullres.
        fold: 0 to 4, or "all".
        site: this site's name.
        trainer_name: one of our trainers.
        state_folder: where the durable state of this run lies.
        seed: the run's seed.
        device: "cpu" or "cuda".

    Raises:
        PlanError: no `fedharm` section, or phases that alternate.
    """

    def __init__(
        self,
        *,
        root: NnunetRoot,
        dataset_name: str,
        plans: Mapping[str, Any],
        dataset_json: Mapping[str, Any],
        configuration: str,
        fold: int | str,
        site: str,
        trainer_name: str,
        state_folder: Path,
        seed: int,
        device: str,
    ) -> None:
        self.root = root
        self.dataset_name = dataset_name
        self.plans = plans
        self.dataset_json = dataset_json
        self.configuration = configuration
        self.fold = fold
        self.site = site
        self.trainer_name = trainer_name
        self.state_folder = state_folder
        self.seed = seed
        self.device = device
        self.section = read_section(plans["configurations"][configuration], configuration_name=configuration)
        if self.section.schedule.phases == "alternate":
            raise PlanError(
                "schedule.phases is 'alternate', which trains on one machine only: rounds train the harmonizer first, then the "
                "segmenter. Choose 'frozen' or 'finetune'."
            )

    def run(self, *, phase: Phase, round_index: int, first_epoch: int, epochs: int, weights: Weights) -> LocalResult:
        """Train `epochs` local epochs from the given weights.

        Args:
            phase: "harmonizer" needs images only, "segmenter" needs labels.
            round_index: counts within the phase, from 0.
            first_epoch: epoch of the shared learning-rate clock at which this round starts.
            epochs: local epochs.
            weights: the global weights.

        Raises:
            FederationError: unknown phase.
            FedHarmError: data, plans or weights do not fit; the message names the site's problem.
        """
        start = perf_counter()
        with self.root.activate():
            seed_everything(self.seed, self.site, phase, str(round_index))
            trainer = make_trainer(
                self.trainer_name, self.plans, self.configuration, self.fold, self.dataset_json, self.device
            )
            if phase == "harmonizer":
                result = self._harmonizer_round(trainer, round_index, first_epoch, epochs, weights)
            elif phase == "segmenter":
                result = self._segmenter_round(trainer, round_index, first_epoch, epochs, weights)
            else:
                raise FederationError(f"Unknown phase {phase!r}; a round is of the harmonizer or of the segmenter.")
        result.metrics["seconds"] = perf_counter() - start
        return result

    def finish(self, weights: Weights, fingerprint: Mapping[str, Any], *, epoch: int) -> Path:
        """Write the standard results folder at the site, with the site's own style stored as source.

        Returns:
            The fold's folder, ready for `nnUNetv2_predict`.
        """
        return write_results_folder(
            self.root,
            self.dataset_name,
            self.plans,
            self.dataset_json,
            fingerprint,
            self.configuration,
            self.fold,
            self.trainer_name,
            weights,
            epoch=epoch,
            which=("final", "best", "latest"),
            site=self.site,
            gate=self._judged_gate(weights),
        )

    def _judged_gate(self, weights: Weights) -> float | None:
        """This site's gate under the final weights: by its images, then by validation Dice if it has labels; None: the bank's."""
        if self.section.kind not in LEARNED or self.site not in self.section.styles:
            return None
        with self.root.activate():
            seed_everything(self.seed, self.site, "gate")
            trainer = make_trainer(
                self.trainer_name, self.plans, self.configuration, self.fold, self.dataset_json, self.device
            )
            # A site without labels has nothing to validate on, and with fold "all" neither has any other.
            labelled = self.fold != "all" and Path(trainer.preprocessed_dataset_folder).is_dir()
            trainer.initialize() if labelled else trainer.assemble()
            load_weights(trainer.network, weights)
            trainer.disable_checkpointing = True
            index, harmonizer = trainer.bank.index(self.site), trainer.harmonizer
            sampler = trainer.all_patches(np.random.default_rng(derive_seed(self.seed, self.site, "gate", "patches")))
            close_without_gain(harmonizer, sampler, trainer.device)
            if labelled:
                trainer.on_train_start()
                close_where_dice_falls(trainer)
                trainer.on_train_end()
            return float(harmonizer.bank_gate[index])

    def _harmonizer_round(
        self, trainer: nnUNetTrainerFedHarm, round_index: int, first_epoch: int, epochs: int, weights: Weights
    ) -> LocalResult:
        trainer.assemble()
        load_weights(trainer.network, weights)
        if not self._takes_part(trainer):
            # No step, no weight in the mean: the others' result reaches this site with the next round.
            return LocalResult(weights=export_weights(trainer.network), n_steps=0, n_cases=0, metrics={})
        schedule = self.section.schedule
        training = trainer.harmonizer.make_training(lr=schedule.harmonizer_lr, total_epochs=schedule.harmonizer_epochs)
        state = self._restore("harmonizer", round_index)
        if state is not None:
            training.load_state_dict(state["training"])
        stream = (self.site, "harmonizer", str(round_index))
        sampler = trainer.harmonizer_sampler(np.random.default_rng(derive_seed(self.seed, *stream, "patches")))
        generator = torch_generator(self.seed, *stream, "styles")
        losses = []
        with trainable(trainer.harmonizer):
            for epoch in range(first_epoch, first_epoch + epochs):
                training.set_epoch(epoch)
                losses.append(
                    harmonizer_epoch(
                        training,
                        sampler,
                        steps=schedule.iterations_per_epoch,
                        device=trainer.device,
                        generator=generator,
                    )
                )
        if first_epoch + epochs >= schedule.harmonizer_epochs:
            trainer.close_gates_without_gain(sampler)
        self._keep("harmonizer", round_index, {"training": training.state_dict()})
        return LocalResult(
            weights=export_weights(trainer.network),
            n_steps=epochs * schedule.iterations_per_epoch,
            n_cases=len(sampler.cases),
            metrics={"train_loss": float(np.mean([epoch["loss"] for epoch in losses]))},
        )

    def _takes_part(self, trainer: nnUNetTrainerFedHarm) -> bool:
        """Whether the harmonizer learns from this site's images; a site without a style is refused where its cases are read."""
        return self.site not in trainer.bank or trainer.harmonizer.trains_on(trainer.bank.index(self.site))

    def _segmenter_round(
        self, trainer: nnUNetTrainerFedHarm, round_index: int, first_epoch: int, epochs: int, weights: Weights
    ) -> LocalResult:
        trainer.initialize()
        load_weights(trainer.network, weights)
        trainer.harmonizer.open_gate()
        # The round's result is the weights sent back; a local checkpoint would look like a finished model and be none.
        trainer.disable_checkpointing = True
        self._restore_segmenter(trainer, round_index, first_epoch)
        trainer.current_epoch = first_epoch
        trainer.on_train_start()
        trainer.run_epochs(first_epoch, epochs)
        self._keep("segmenter", round_index, _segmenter_state(trainer))
        metrics = _epoch_means(trainer, epochs)
        trainer.on_train_end()  # stops the data loaders' workers
        return LocalResult(
            weights=export_weights(trainer.network),
            n_steps=epochs * trainer.num_iterations_per_epoch,
            n_cases=len(trainer.do_split()[0]),
            metrics=metrics,
        )

    def _restore_segmenter(self, trainer: nnUNetTrainerFedHarm, round_index: int, first_epoch: int) -> None:
        state = self._restore("segmenter", round_index)
        if state is not None:
            trainer.optimizer.load_state_dict(state["optimizer"])
            trainer.logger.load_checkpoint(state["logging"])
            trainer._best_ema = state["best_ema"]
            if trainer.grad_scaler is not None and state["grad_scaler"] is not None:
                trainer.grad_scaler.load_state_dict(state["grad_scaler"])
        _pad_log(trainer, first_epoch)

    def _state_file(self, phase: Phase, round_index: int) -> Path:
        return self.state_folder / f"{phase}_round_{round_index:05d}.pt"

    def _states(self, phase: Phase) -> list[tuple[int, Path]]:
        found = []
        for path in self.state_folder.glob(f"{phase}_round_*.pt"):
            match = re.fullmatch(rf"{phase}_round_(\d+)", path.stem)
            if match:
                found.append((int(match.group(1)), path))
        return sorted(found)

    def _restore(self, phase: Phase, round_index: int) -> dict[str, Any] | None:
        """Newest state older than `round_index`, or None for a site that has none yet."""
        older = [path for index, path in self._states(phase) if index < round_index]
        if not older:
            return None
        try:
            state: dict[str, Any] = torch.load(older[-1], map_location=self.device, weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"Site {self.site} cannot read its training state {older[-1]} ({type(error).__name__}). "
                "Delete that file to continue with a fresh optimizer."
            ) from error
        return state

    def _keep(self, phase: Phase, round_index: int, state: dict[str, Any]) -> None:
        self.state_folder.mkdir(parents=True, exist_ok=True)
        save_atomically(str(self._state_file(phase, round_index)), lambda path: torch.save(state, path))
        for _, path in [item for item in self._states(phase) if item[0] <= round_index][:-KEPT_STATES]:
            path.unlink()


def _segmenter_state(trainer: nnUNetTrainerFedHarm) -> dict[str, Any]:
    log = trainer.logger.get_checkpoint()
    return {
        "optimizer": trainer.optimizer.state_dict(),
        "grad_scaler": trainer.grad_scaler.state_dict() if trainer.grad_scaler is not None else None,
        # Plain floats: the file is read back with weights_only=True, which refuses numpy scalars.
        "logging": {key: _plain(values) for key, values in log.items()},
        "best_ema": None if trainer._best_ema is None else float(trainer._best_ema),
    }


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else float(value)


def _pad_log(trainer: nnUNetTrainerFedHarm, first_epoch: int) -> None:
    """Rounds that this site missed leave a gap in its log; nnU-Net's logger insists on one value per epoch."""
    log = trainer.logger.local_logger.my_fantastic_logging
    for key, values in log.items():
        del values[first_epoch:]
        filler: Any = values[-1] if values else ([float("nan")] if key == "dice_per_class_or_region" else 0.0)
        values.extend([filler] * (first_epoch - len(values)))


def _epoch_means(trainer: nnUNetTrainerFedHarm, epochs: int) -> dict[str, float]:
    names = {"train_loss": "train_losses", "val_loss": "val_losses", "dice": "mean_fg_dice"}
    return {name: float(np.mean(trainer.logger.get_value(key, step=None)[-epochs:])) for name, key in names.items()}
