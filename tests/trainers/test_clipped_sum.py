"""A site's part of a step with shared noise: with one site and hardly any noise it is the private step itself."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from nnunet_fedharm.errors import PrivacyError
from nnunet_fedharm.federation.secure.home import NOISY
from nnunet_fedharm.federation.secure.patient_noise import PATIENTS, StepSum
from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.planning.central import ONE_SITE, CentralOptions, plan_central
from nnunet_fedharm.planning.planner import PlanOptions
from nnunet_fedharm.planning.section import Schedule
from nnunet_fedharm.privacy.fixed_point import Sum
from nnunet_fedharm.privacy.ledger import Ledger
from nnunet_fedharm.privacy.options import PrivacyOptions
from nnunet_fedharm.privacy.shared_steps import SharedSteps
from nnunet_fedharm.sites.files import read_json
from nnunet_fedharm.trainers import clipped_sum as clipped_sum_module
from nnunet_fedharm.trainers import fedharm_trainer, local_training
from nnunet_fedharm.trainers.clipped_sum import WEIGHT_DECAY, clipped_sum, learning_rate
from nnunet_fedharm.trainers.groups import trained_names
from nnunet_fedharm.trainers.local_training import LocalTraining
from nnunet_fedharm.trainers.results import initial_weights, make_trainer
from nnunet_fedharm.trainers.weights import Weights

NAME, TRAINER = "Dataset001_Blobs", "nnUNetTrainerFedHarmNone"
SHARED = SharedSteps(noise=1.0, sample_rate=1.0, rounds=3, delta=1e-3, least=3, colluding=1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, make_raw_dataset: Callable[..., Path]) -> NnunetRoot:
    """Three labelled cases of one site, planned for one private step an epoch, with all patients and next to no noise."""
    torch.set_num_threads(1)
    root = NnunetRoot(tmp_path_factory.mktemp("clipped")).create()
    make_raw_dataset(root.raw, name=NAME, n_labelled=3)
    schedule = Schedule(
        harmonizer_epochs=0, segmenter_epochs=3, iterations_per_epoch=1, val_iterations_per_epoch=1, momentum=1e-9,
        initial_lr=0.5,
    )  # fmt: skip
    privacy = PrivacyOptions(
        epsilon=1e7, delta=1e-3, clip=0.25, patients_per_step=3.0, style_noise=0.0, fingerprint_noise=0.0
    )
    options = CentralOptions(
        configurations=("2d",), kind="none", schedule=schedule, privacy=privacy, check=False,
        plan=PlanOptions(base_features=4, max_features=8, batch_size=2, plans_name="plans_step"),
    )  # fmt: skip
    plan_central(root, "1", options)
    return root


@pytest.fixture
def trainings(
    root: NnunetRoot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., LocalTraining]]:
    """Makes the site's training, with changed parts of the `fedharm` section; the ledger begins empty."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("nnUNet_compile", "f")
    for path in (root.path / "fedharm").glob("privacy-ledger*"):
        path.unlink()
    plans = read_json(root.preprocessed / NAME / "plans_step.json", what="The plans")
    description = read_json(root.preprocessed / NAME / "dataset.json", what="The description")

    def make(state: str, **changed: dict[str, float]) -> LocalTraining:
        own = copy.deepcopy(plans)
        for part, values in changed.items():
            own["configurations"]["2d"]["fedharm"][part] |= values
        return LocalTraining(
            root=root, dataset_name=NAME, plans=own, dataset_json=description, configuration="2d", fold="all", site=ONE_SITE,
            trainer_name=TRAINER, state_folder=tmp_path / state, seed=11, device="cpu",
        )  # fmt: skip

    with root.activate():
        yield make


def start(training: LocalTraining) -> Weights:
    return initial_weights(training.plans, training.dataset_json, "2d", TRAINER, 11)


def test_the_step_from_the_sum_is_the_private_step_of_the_trainer(
    trainings: Callable[..., LocalTraining], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (
        clipped_sum_module,
        fedharm_trainer,
        local_training,
    ):  # the same patches twice, which a site never draws
        monkeypatch.setattr(module, "patch_seed", lambda *_, **__: 7)
    training = trainings("a")
    weights = start(training)
    whole = training.run(phase="segmenter", round_index=1, first_epoch=1, epochs=1, weights=weights)
    found = clipped_sum(trainings("b"), weights, SHARED, round_index=1)
    assert found.patients == 3
    assert np.sqrt(sum(float(np.sum(value**2)) for value in found.sums.values())) <= 3
    names = trained_names(training.plans, training.dataset_json, "2d", TRAINER)
    assert set(found.sums) == names
    rate = learning_rate(training.section.schedule, 1)
    step = StepSum(SHARED, names, clip=0.25, rate=rate, decay=WEIGHT_DECAY, cases=3, width=5)
    values = {NOISY + name: value.astype(np.float64) for name, value in found.sums.items()}
    total = Sum({**values, PATIENTS: np.array(3.0)}, 1, 0, frozenset())
    after = step.mean(total, weights).weights

    def length(one: Weights, other: Weights) -> float:
        return math.sqrt(sum(float(np.sum((one[name] - other[name]).astype(np.float64) ** 2)) for name in names))

    # What is left is the little noise of the trainer's own step, of a multiplier of 5e-4.
    assert length(after, whole.weights) < 0.02 * length(whole.weights, weights)
    assert make_trainer(TRAINER, training.plans, "2d", "all", training.dataset_json).weight_decay == WEIGHT_DECAY


def test_what_is_not_one_step_or_beyond_the_budget_is_refused(
    trainings: Callable[..., LocalTraining], root: NnunetRoot
) -> None:
    training = trainings("a", schedule={"iterations_per_epoch": 2})
    weights = start(training)
    with pytest.raises(PrivacyError, match="rounds of one private step"):
        clipped_sum(training, weights, SHARED, round_index=0)
    with pytest.raises(PrivacyError, match=r"The budget is epsilon 0\.5"):
        clipped_sum(trainings("b", privacy={"epsilon": 0.5}), weights, SHARED, round_index=0)
    assert not [entry for entry in Ledger(root.path / "fedharm").releases() if entry.bounded]
