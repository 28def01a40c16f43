"""Differential privacy of networks: the residual encoder, several processes, harmonizer and segmenter in one step."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncM,
)
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_fedharm.errors import PrivacyError
from nnunet_fedharm.nnunet_root import environment
from nnunet_fedharm.privacy.ledger import Ledger
from nnunet_fedharm.privacy.options import PrivacyOptions
from nnunet_fedharm.trainers.harmonized_segmenter import HarmonizedSegmenter
from nnunet_fedharm.trainers.local_training import LocalTraining
from nnunet_fedharm.trainers.patient_loader import PatientDraw
from nnunet_fedharm.trainers.results import initial_weights, make_trainer
from tests.trainers.conftest import NAME, SCHEDULE, Planned
from tests.trainers.test_trainer import TRAINERS

PRIVACY = PrivacyOptions(epsilon=5.0, delta=1e-3, patients_per_step=3.0)
RUN = "0123456789ab-012345"


class SmallResEnc(nnUNetPlannerResEncM):
    """The stock planner of residual encoders, for networks that train in a second."""

    def __init__(self, name: str) -> None:
        super().__init__(name, preprocessor_name="DefaultPreprocessor", plans_name="resenc")
        self.UNet_base_num_features = 4
        self.UNet_max_features_2d = self.UNet_max_features_3d = 8


@pytest.fixture
def fresh(active: Planned) -> Iterator[Planned]:
    """Nothing was released here yet."""

    def forget() -> None:
        for path in (active.root.path / "fedharm").glob("privacy-ledger*"):
            path.unlink()

    forget()
    yield active
    forget()


def private_plans(planned: Planned, kind: str) -> dict[str, Any]:
    plans = copy.deepcopy(planned.plans[kind])
    for configuration in ("2d", "3d_fullres"):
        plans["configurations"][configuration]["fedharm"]["privacy"] = PRIVACY.to_dict()
    return plans


def residual_plans(planned: Planned, kind: str) -> dict[str, Any]:
    """Private plans with the network that nnU-Net's planner of residual encoders plans for this data set."""
    plans = private_plans(planned, kind)
    with environment({"nnUNet_n_proc_DA": "1"}):  # the planner hands it to torch.set_num_threads
        residual = SmallResEnc(NAME).plan_experiment()
    for configuration in ("2d", "3d_fullres"):
        for key in ("architecture", "patch_size"):
            plans["configurations"][configuration][key] = residual["configurations"][configuration][key]
    return plans


@pytest.mark.slow
@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_a_residual_encoder_trains_privately_in_rounds_and_its_model_predicts(
    configuration: str, fresh: Planned, tmp_path: Path
) -> None:
    plans = residual_plans(fresh, "curve")
    training = LocalTraining(
        root=fresh.root,
        dataset_name=NAME,
        plans=plans,
        dataset_json=fresh.dataset_json,
        configuration=configuration,
        fold="all",
        site="A",
        trainer_name=TRAINERS["curve"],
        state_folder=tmp_path / RUN,
        seed=11,
        device="cpu",
    )
    start = initial_weights(plans, fresh.dataset_json, configuration, TRAINERS["curve"], 11)
    weights, epsilons = start, []
    for phase, epochs in (("harmonizer", SCHEDULE.harmonizer_epochs), ("segmenter", SCHEDULE.segmenter_epochs)):
        result = training.run(phase=phase, round_index=0, first_epoch=0, epochs=epochs, weights=weights)
        assert result.private
        weights = result.weights
        epsilons.append(result.metrics["epsilon"])
    trained = [name for name in start if name.startswith("segmenter.") and start[name].dtype == np.float32]
    assert any("encoder.stages.1.blocks.0.conv1" in name for name in trained), "residual blocks"
    still = [name for name in trained if np.array_equal(start[name], weights[name])]
    assert still == []
    assert all(np.isfinite(value).all() for value in weights.values())
    ledger = Ledger(fresh.root.path / "fedharm")
    assert {release.what for release in ledger.releases()} == {"harmonizer training", "segmenter training"}
    assert 0 < epsilons[0] < epsilons[1] <= PRIVACY.epsilon
    assert epsilons[1] == pytest.approx(ledger.spent(PRIVACY.delta).epsilon)

    folder = training.finish(weights, fresh.fingerprint, epoch=SCHEDULE.segmenter_epochs - 1)
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder.parent), ("all",), "checkpoint_final.pth")
    assert isinstance(predictor.network, HarmonizedSegmenter)
    assert isinstance(predictor.network.segmenter, ResidualEncoderUNet)
    logits = predictor.predict_logits_from_preprocessed_data(torch.randn(1, 12, 24, 24))
    assert bool(torch.isfinite(logits).all())


@pytest.fixture
def process_group() -> Iterator[None]:
    """What `nnUNetv2_train -num_gpus 2` sets up before it makes a trainer; one member suffices to be one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*CUDA is not available.*:UserWarning")
def test_several_processes_are_refused_before_anything_is_made(
    active: Planned, process_group: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    with pytest.raises(PrivacyError, match=r"in one process: several would mix .* without -num_gpus"):
        make_trainer(TRAINERS["none"], private_plans(active, "none"), "2d", "all", active.dataset_json)
    assert not (tmp_path / "results").exists()
    assert make_trainer(TRAINERS["none"], active.plans["none"], "2d", "all", active.dataset_json).is_ddp


def test_one_clip_covers_harmonizer_and_segmenter_where_a_step_trains_both(
    fresh: Planned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under finetune; two clips with composed accounting gained nothing (docs/experiments/private-clip)."""
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    plans = private_plans(fresh, "curve")
    plans["configurations"]["2d"]["fedharm"]["schedule"]["phases"] = "finetune"
    trainer = make_trainer(TRAINERS["curve"], plans, "2d", "all", fresh.dataset_json)
    trainer.initialize()
    trainer.harmonizer.open_gate()
    trainer.start_private()
    trainer.on_train_start()
    gradients, loader = trainer._gradients, trainer.dataloader_train
    harmonizer = {id(parameter) for parameter in trainer.harmonizer.mapping_parameters()}
    segmenter = {id(parameter) for parameter in trainer.network.segmenter.parameters()}
    assert {id(parameter) for parameter in gradients.parameters} == harmonizer | segmenter
    gradients.clip, gradients.noise_multiplier, gradients.expected_patients = 1e-5, 0.0, 1.0
    (patient,) = [cases for cases in loader.patients if cases == ("Bcase000",)]  # A is the reference: its gate is shut
    trainer.private.collect(PatientDraw(iter([loader._load(patient)]), 1), gradients)
    gradients.release()
    parts = {"harmonizer": harmonizer, "segmenter": segmenter}
    norms = {
        name: torch.stack([p.grad.norm() for p in gradients.parameters if id(p) in members]).norm()
        for name, members in parts.items()
    }
    assert 0 < norms["harmonizer"] < norms["segmenter"]
    assert float(torch.stack([*norms.values()]).norm()) == pytest.approx(1e-5, rel=1e-2)
