"""One site's work in a federated round; no Flower in here.

A site keeps its optimizer, gradient scaler and training log in its own folder, one file per round, and restores the newest
one that is older than the round it is asked for. So a round that is repeated after a crash starts from the same state and,
with seeds derived from (run, site, phase, round), draws the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import numpy as np

from nnunet_fedharm.errors import FederationError, PlanError
from nnunet_fedharm.harmonizers import LEARNED
from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.planning.section import read_section
from nnunet_fedharm.privacy.shared_steps import SharedSteps
from nnunet_fedharm.trainers.fedharm_trainer import nnUNetTrainerFedHarm
from nnunet_fedharm.trainers.gates import close_where_dice_falls, close_without_gain
from nnunet_fedharm.trainers.groups import copies, load_with_own, planned_tensors_of, shared_weights, with_own
from nnunet_fedharm.trainers.harmonizer_phase import trainable
from nnunet_fedharm.trainers.local_objectives import ControlVariate, Objective, extended
from nnunet_fedharm.trainers.pictures import spare_pictures
from nnunet_fedharm.trainers.results import make_trainer, write_results_folder
from nnunet_fedharm.trainers.round_states import RoundStates
from nnunet_fedharm.trainers.seeds import derive_seed, patch_seed, seed_everything, torch_generator
from nnunet_fedharm.trainers.segmenter_state import epoch_means, refuse_not_finite, restore_segmenter, segmenter_state
from nnunet_fedharm.trainers.weights import Weights, load_weights

Phase = Literal["harmonizer", "segmenter"]

PLAIN = Objective()
"""Nothing but the site's own loss."""


@dataclass(frozen=True)
class LocalResult:
    """What a site sends back.

    Attributes:
        weights: updated weights, canonical names; without the tensors that the site keeps for itself.
        n_steps: optimizer steps taken.
        n_cases: training cases drawn from.
        metrics: means over the local epochs: train_loss, val_loss, dice (foreground pseudo Dice), seconds.
        control: change of the site's control variate; empty without SCAFFOLD.
        private: under differential privacy: entered in the ledger already, and metrics say what was spent instead.
    """

    weights: Weights
    n_steps: int
    n_cases: int
    metrics: dict[str, float]
    control: Weights = field(default_factory=dict)
    private: bool = False


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
        local_groups: groups of tensors that this site keeps for itself, of `groups.GROUPS`.

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
        local_groups: Sequence[str] = (),
    ) -> None:
        self.root = root
        self.dataset_name = dataset_name
        self.plans = plans
        self.dataset_json = dataset_json
        self.configuration = configuration
        self.fold = fold
        self.site = site
        self.trainer_name = trainer_name
        self.states = RoundStates(state_folder, site, device)
        self.seed = seed
        self.device = device
        self.local_groups = tuple(local_groups)
        self.section = read_section(plans["configurations"][configuration], configuration_name=configuration)
        if self.section.schedule.phases == "alternate":
            raise PlanError(
                "schedule.phases is 'alternate', which trains on one machine only: rounds train the harmonizer first, then the "
                "segmenter. Choose 'frozen' or 'finetune'."
            )

    def run(
        self,
        *,
        phase: Phase,
        round_index: int,
        first_epoch: int,
        epochs: int,
        weights: Weights,
        objective: Objective = PLAIN,
        shared: SharedSteps | None = None,
    ) -> LocalResult:
        """Train `epochs` local epochs from the given weights.

        Args:
            phase: "harmonizer" needs images only, "segmenter" needs labels.
            round_index: counts within the phase, from 0.
            first_epoch: epoch of the shared learning-rate clock at which this round starts.
            epochs: local epochs.
            weights: the global weights; of the tensors that this site keeps for itself the start of the run.
            objective: what the federation adds to the site's loss.
            shared: of a harmonizer round whose segmenter's noise all sites will share: noise and sample rate are settled by it.

        Raises:
            FederationError: unknown phase, or SCAFFOLD in the harmonizer phase.
            FedHarmError: data, plans or weights do not fit; the message names the site's problem.
        """
        start = perf_counter()
        with self.root.activate():
            seed = patch_seed(self.seed, private=self.section.privacy is not None)
            seed_everything(seed, self.site, phase, str(round_index))
            trainer = make_trainer(
                self.trainer_name, self.plans, self.configuration, self.fold, self.dataset_json, self.device
            )
            trainer.run_id = self.states.folder.name
            if phase == "harmonizer":
                clock = (round_index, first_epoch, epochs)
                result = self._harmonizer_round(trainer, seed, clock, weights, objective, shared)
            elif phase == "segmenter":
                result = self._segmenter_round(trainer, round_index, first_epoch, epochs, weights, objective)
            else:
                raise FederationError(f"Unknown phase {phase!r}; a round is of the harmonizer or of the segmenter.")
        result.metrics["seconds"] = perf_counter() - start
        return result

    def finish(self, weights: Weights, fingerprint: Mapping[str, Any], *, epoch: int) -> Path:
        """Write the standard results folder at the site, with the site's own style stored as source and its own tensors.

        Returns:
            The fold's folder, ready for `nnUNetv2_predict`.

        Raises:
            FederationError: tensors that this site has to have of its own were never trained here.
        """
        with self.root.activate():
            names = planned_tensors_of(
                self.plans, self.dataset_json, self.configuration, self.trainer_name, self.local_groups
            )
        states = [self.states.older_than(phase, None) for phase in ("harmonizer", "segmenter")] if names else []
        weights = with_own(weights, names, states, site=self.site)
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
        """This site's gate under the final weights: by its images, then by validation Dice if it has labels; None: the bank's,
        also under differential privacy, as the model may be handed on."""
        known = self.section.kind in LEARNED and self.site in self.section.styles
        if not known or self.section.privacy is not None:
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
        self,
        trainer: nnUNetTrainerFedHarm,
        seed: int,
        clock: tuple[int, int, int],
        weights: Weights,
        objective: Objective,
        shared: SharedSteps | None,
    ) -> LocalResult:
        round_index, first_epoch, epochs = clock
        if objective.control is not None:
            raise FederationError("SCAFFOLD corrects segmenter rounds only; the harmonizer's optimizers are adaptive.")
        trainer.assemble()
        state = self.states.older_than("harmonizer", round_index)
        local = load_with_own(trainer.network, weights, self.local_groups, state)
        if not self._takes_part(trainer):
            # No step, no weight in the mean: the others' result reaches this site with the next round.
            return LocalResult(weights=shared_weights(trainer.network, local), n_steps=0, n_cases=0, metrics={})
        schedule = self.section.schedule
        training = trainer.harmonizer.make_training(lr=schedule.harmonizer_lr, total_epochs=schedule.harmonizer_epochs)
        if state is not None:
            training.load_state_dict(state["training"])
        stream = (self.site, "harmonizer", str(round_index))
        sampler = trainer.harmonizer_sampler(np.random.default_rng(derive_seed(seed, *stream, "patches")))
        generator = torch_generator(seed, *stream, "styles")
        self._start_private(trainer, harmonizer=first_epoch, segmenter=0, shared=shared)
        losses = []
        added = extended(training.optimizers.values(), trainer.network, local, proximal_mu=objective.proximal_mu)
        with trainable(trainer.harmonizer), added:
            for epoch in range(first_epoch, first_epoch + epochs):
                training.set_epoch(epoch)
                losses.append(trainer.harmonizer_phase.epoch(training, sampler, generator, epoch))
        if first_epoch + epochs >= schedule.harmonizer_epochs:
            trainer.close_gates_without_gain(sampler)
        own = {name: value for name, value in copies(trainer.network, local).items() if name.startswith("harmonizer.")}
        self.states.keep("harmonizer", round_index, {"training": training.state_dict(), "own": own})
        return LocalResult(
            weights=shared_weights(trainer.network, local),
            n_steps=epochs * schedule.iterations_per_epoch,
            n_cases=len(sampler.cases),
            metrics=spent(trainer, {"train_loss": float(np.mean([epoch["loss"] for epoch in losses]))}),
            private=trainer.private is not None,
        )

    def _takes_part(self, trainer: nnUNetTrainerFedHarm) -> bool:
        """Whether the harmonizer learns from this site's images; a site without a style is refused where its cases are read."""
        return self.site not in trainer.bank or trainer.harmonizer.trains_on(trainer.bank.index(self.site))

    def _segmenter_round(
        self,
        trainer: nnUNetTrainerFedHarm,
        round_index: int,
        first_epoch: int,
        epochs: int,
        weights: Weights,
        objective: Objective,
    ) -> LocalResult:
        trainer.initialize()
        state = self.states.older_than("segmenter", round_index)
        former = self.states.older_than("harmonizer", None) if self.local_groups else None
        local = load_with_own(trainer.network, weights, self.local_groups, former, state)
        drift = ControlVariate(self.states, objective, trainer.network) if objective.control is not None else None
        trainer.harmonizer.open_gate()
        # The round's result is the weights sent back; a local checkpoint would look like a finished model and be none.
        trainer.disable_checkpointing = True
        spare_pictures(trainer)
        restore_segmenter(trainer, state, first_epoch)
        trainer.current_epoch = first_epoch
        self._start_private(trainer, harmonizer=self.section.schedule.harmonizer_epochs, segmenter=first_epoch)
        trainer.on_train_start()
        added = extended(
            [trainer.optimizer],
            trainer.network,
            local,
            proximal_mu=objective.proximal_mu,
            correction=None if drift is None else drift.correction,
        )
        with added as terms:
            trainer.run_epochs(first_epoch, epochs)
        change = {} if drift is None or terms is None else drift.update(terms, round_index)
        kept = segmenter_state(trainer) | {"own": copies(trainer.network, local)}
        metrics = epoch_means(trainer, epochs)
        trainer.on_train_end()  # stops the data loaders' workers
        refuse_not_finite(
            self.site, trainer.network.state_dict(), kept["optimizer"]
        )  # kept, it would spoil all later rounds
        self.states.keep("segmenter", round_index, kept)
        return LocalResult(
            weights=shared_weights(trainer.network, local),
            n_steps=epochs * trainer.num_iterations_per_epoch,
            n_cases=len(trainer.do_split()[0]),
            metrics=spent(trainer, metrics),
            control=change,
            private=trainer.private is not None,
        )

    def _start_private(
        self, trainer: nnUNetTrainerFedHarm, *, harmonizer: int, segmenter: int, shared: SharedSteps | None = None
    ) -> None:
        """Differential privacy, if the plans ask for it, for what is left after these epochs."""
        trainer.start_private(shared)
        if trainer.private is not None:
            schedule = self.section.schedule
            trainer.private.check_budget(
                harmonizer_epochs=schedule.harmonizer_epochs - harmonizer,
                segmenter_epochs=schedule.segmenter_epochs - segmenter,
            )


def spent(trainer: nnUNetTrainerFedHarm, metrics: dict[str, float]) -> dict[str, float]:
    """The metrics; under differential privacy, where each would be a release, what the site's patients have paid so far."""
    return metrics if trainer.private is None else {"epsilon": trainer.private.spent()}
