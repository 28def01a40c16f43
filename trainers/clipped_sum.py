"""A site's part of one step whose noise all sites add together: the sum of its drawn patients' clipped gradients.

See `privacy.shared_steps` for what is done with it, and why a round is one step then.
"""

from __future__ import annotations

from dataclasses import dataclass

from nnunet_fedharm.errors import PrivacyError
from nnunet_fedharm.planning.section import Schedule
from nnunet_fedharm.privacy.shared_steps import SharedSteps
from nnunet_fedharm.trainers.local_training import LocalTraining
from nnunet_fedharm.trainers.private_sampling import SEGMENTER
from nnunet_fedharm.trainers.results import make_trainer
from nnunet_fedharm.trainers.seeds import patch_seed, seed_everything
from nnunet_fedharm.trainers.weights import Weights, load_weights, unique_tensors

WEIGHT_DECAY = 3e-5
"""Of nnU-Net's optimizer; `test_clipped_sum` holds this against it."""


@dataclass(frozen=True)
class ClippedSum:
    """What stays at the site until its share of the noise is on it.

    Attributes:
        sums: tensor -> sum over the drawn patients of their clipped gradients, over the clip.
        patients: of the site, drawn or not; a public number.
    """

    sums: Weights
    patients: int


def clipped_sum(training: LocalTraining, weights: Weights, shared: SharedSteps, *, round_index: int) -> ClippedSum:
    """Draw patients and add up their clipped gradients at the given weights.

    Args:
        training: of the site.
        weights: the global ones.
        shared: sample rate and noise of the run.
        round_index: from 0.

    Raises:
        PrivacyError: plans without differential privacy, more than one step a round, or a budget that does not hold the run.
        FedHarmError: data, plans or weights do not fit.
    """
    schedule = training.section.schedule
    if training.section.privacy is None or schedule.iterations_per_epoch != 1 or schedule.phases != "frozen":
        raise PrivacyError(
            "Noise is shared in rounds of one private step of the segmenter alone; the plans say otherwise."
        )
    with training.root.activate():
        # For the patches; who is drawn is decided by the system's generator.
        seed_everything(patch_seed(None, private=True), training.site, "segmenter", str(round_index))
        trainer = make_trainer(
            training.trainer_name,
            training.plans,
            training.configuration,
            training.fold,
            training.dataset_json,
            training.device,
        )
        trainer.run_id = training.states.folder.name
        trainer.initialize()
        load_weights(trainer.network, weights)
        trainer.harmonizer.open_gate()
        trainer.disable_checkpointing = True
        trainer.current_epoch = round_index
        trainer.start_private(shared)
        private = trainer.private
        assert private is not None
        # At least this step: the number of the round is the server's word.
        private.check_budget(harmonizer_epochs=0, segmenter_epochs=max(1, schedule.segmenter_epochs - round_index))
        trainer.on_train_start()
        trainer.on_train_epoch_start()
        try:
            gradients = trainer._gradients
            assert gradients is not None
            private.collect(next(trainer.dataloader_train), gradients)
            names = {id(tensor): name for name, tensor in unique_tensors(trainer.network).items()}
            values = zip(gradients.parameters, gradients.take_sums(), strict=True)
            sums = {names[id(parameter)]: value.cpu().numpy() for parameter, value in values}
        finally:
            trainer.dataloader_train.close()
    return ClippedSum(dict(sorted(sums.items())), len(private.phases[SEGMENTER].patients))


def learning_rate(schedule: Schedule, round_index: int) -> float:
    """nnU-Net's polynomial decay over the rounds."""
    rate: float = schedule.initial_lr * (1 - round_index / schedule.segmenter_epochs) ** 0.9
    return rate
