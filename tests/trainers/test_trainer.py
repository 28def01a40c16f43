"""Our trainer against the stock one, and its refusals."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import maybe_load_checkpoint
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoDA import nnUNetTrainerNoDA

from nnunet_fedharm.errors import CheckpointError, PlanError
from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.planning.central import CentralOptions, plan_central
from nnunet_fedharm.planning.planner import PlanOptions
from nnunet_fedharm.trainers import (
    nnUNetTrainerFedHarm,
    nnUNetTrainerFedHarmNone,
)
from nnunet_fedharm.trainers.results import make_trainer, trainer_class
from nnunet_fedharm.trainers.seeds import seed_everything
from tests.trainers.conftest import SCHEDULE, Planned

TRAINERS = {
    "none": "nnUNetTrainerFedHarmNone",
    "augment": "nnUNetTrainerFedHarmAugment",
    "nyul": "nnUNetTrainerFedHarmNyul",
    "curve": "nnUNetTrainerFedHarmCurve",
    "polarity": "nnUNetTrainerFedHarmPolarity",
    "cyclegan": "nnUNetTrainerFedHarmCycleGAN",
    "diffusion": "nnUNetTrainerFedHarmDiffusion",
}


def stock_trainer(planned: Planned, configuration: str, fold: Any = "all") -> nnUNetTrainer:
    plans = {**planned.plans["none"], "continue_training": False}
    trainer = nnUNetTrainer(plans, configuration, fold, planned.dataset_json, torch.device("cpu"))
    trainer.num_iterations_per_epoch = SCHEDULE.iterations_per_epoch
    trainer.num_val_iterations_per_epoch = SCHEDULE.val_iterations_per_epoch
    trainer.num_epochs = SCHEDULE.segmenter_epochs
    return trainer


def our_trainer(planned: Planned, kind: str, configuration: str, fold: Any = "all") -> nnUNetTrainerFedHarm:
    return make_trainer(TRAINERS[kind], planned.plans[kind], configuration, fold, planned.dataset_json)


def first_losses(trainer: nnUNetTrainer, steps: int = 4) -> list[float]:
    seed_everything(7, "parity")
    trainer.initialize()
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    return [float(trainer.train_step(next(trainer.dataloader_train))["loss"]) for _ in range(steps)]


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
@pytest.mark.parametrize("kind", ["none", "curve"])
def test_losses_equal_the_stock_trainers_while_the_harmonizer_is_the_identity(
    active: Planned, configuration: str, kind: str
) -> None:
    ours = first_losses(our_trainer(active, kind, configuration))
    assert ours == first_losses(stock_trainer(active, configuration))
    assert len(set(ours)) == len(ours)


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_without_augmentation_losses_equal_those_of_nnunets_own_variant(active: Planned, configuration: str) -> None:
    plans = deepcopy(active.plans["none"])
    plans["configurations"][configuration]["fedharm"]["schedule"]["augmentation"] = False
    ours = make_trainer(TRAINERS["none"], plans, configuration, "all", active.dataset_json)
    stock = {**active.plans["none"], "continue_training": False}
    theirs = nnUNetTrainerNoDA(stock, configuration, "all", active.dataset_json, torch.device("cpu"))
    assert first_losses(ours) == first_losses(theirs)
    assert ours.inference_allowed_mirroring_axes is None
    for name in ("get_training_transforms", "configure_rotation_dummyDA_mirroring_and_inital_patch_size"):
        assert set(inspect.signature(getattr(ours, name)).parameters) == set(
            inspect.signature(getattr(theirs, name)).parameters
        )


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
@pytest.mark.parametrize("kind", sorted(TRAINERS))
def test_logits_at_step_0_equal_the_plain_networks_bit_for_bit(active: Planned, configuration: str, kind: str) -> None:
    networks = []
    for trainer in (stock_trainer(active, configuration), our_trainer(active, kind, configuration)):
        torch.manual_seed(3)
        trainer.initialize()
        networks.append(trainer.network.eval())  # strong augmentation is for training mode
    networks[1].harmonizer.set_batch_styles(torch.tensor([1, 1]))  # a site whose gate is open
    image = torch.randn(2, 1, *trainer.configuration_manager.patch_size)
    image[:, :, :3] = 0
    with torch.no_grad():
        plain, harmonized = (network(image) for network in networks)
    assert all(torch.equal(one, other) for one, other in zip(plain, harmonized, strict=True))


@pytest.mark.parametrize(
    ("kind", "configuration"),
    [
        ("curve", "2d"),
        pytest.param("curve", "3d_fullres", marks=pytest.mark.long),
        pytest.param("diffusion", "3d_fullres", marks=pytest.mark.long),
    ],
)
def test_a_whole_training_can_be_stopped_resumed_validated_and_predicted_by_stock_nnunet(
    active: Planned, kind: str, configuration: str, tmp_path: Path
) -> None:
    stopped = our_trainer(active, kind, configuration, fold=0)
    stopped.num_epochs, stopped.save_every = 2, 1
    stopped.run_training()
    assert int(stopped.harmonizer.trained_epochs) == SCHEDULE.harmonizer_epochs
    assert all(float(parameter.abs().sum()) > 0 for parameter in stopped.harmonizer.mapping_parameters())

    resumed = our_trainer(active, kind, configuration, fold=0)
    maybe_load_checkpoint(resumed, continue_training=True, validation_only=False)
    assert resumed.current_epoch == 2
    before = {name: tensor.clone() for name, tensor in resumed.harmonizer.state_dict().items()}
    resumed.run_training()
    assert all(torch.equal(before[name], tensor) for name, tensor in resumed.harmonizer.state_dict().items())
    folder = Path(resumed.output_folder)
    assert (folder / "checkpoint_final.pth").is_file()
    assert not (folder / "checkpoint_latest.pth").exists()
    resumed.perform_actual_validation()
    assert (folder / "validation" / "summary.json").is_file()

    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(resumed.output_folder_base, (0,))
    assert type(predictor.network).__name__ == "HarmonizedSegmenter"
    image = active.root.raw / "Dataset001_Blobs" / "imagesTr" / "Bcase000_0000.nii.gz"
    predictor.predict_from_files_sequential([[str(image)]], [str(tmp_path / "Bcase000")], save_probabilities=False)
    assert (tmp_path / "Bcase000.nii.gz").is_file()


@pytest.mark.parametrize("kind", ["curve", "cyclegan", "diffusion"])
def test_the_harmonizer_phase_resumes_where_it_was_interrupted(
    active: Planned, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted = our_trainer(active, kind, "2d", fold=1)
    interrupted.initialize()
    saved = interrupted.harmonizer_phase.save

    def stop_after_saving(training: Any) -> None:
        saved(training)
        raise KeyboardInterrupt

    interrupted.harmonizer_phase.save = stop_after_saving  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        interrupted.run_harmonizer_phase()
    assert "Harmonizer epoch 0:" in capsys.readouterr().out
    resumed = our_trainer(active, kind, "2d", fold=1)
    resumed.initialize()
    resumed.run_harmonizer_phase()
    assert int(resumed.harmonizer.trained_epochs) == SCHEDULE.harmonizer_epochs
    log = capsys.readouterr().out
    assert "Harmonizer phase resumes at epoch 1" in log
    assert "Harmonizer epoch 1:" in log
    assert "Harmonizer epoch 0:" not in log
    uninterrupted = our_trainer(active, kind, "2d", fold=1)
    uninterrupted.continued = False
    uninterrupted.initialize()
    uninterrupted.run_harmonizer_phase()
    expected = uninterrupted.harmonizer.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.harmonizer.state_dict().items())


def test_the_segmenter_phase_leaves_the_harmonizer_alone_unless_told_otherwise(active: Planned) -> None:
    frozen = our_trainer(active, "curve", "2d")
    frozen.initialize()
    assert not any(parameter.requires_grad for parameter in frozen.harmonizer.parameters())
    plans = active.plans["curve"]
    plans["configurations"]["2d"]["fedharm"]["schedule"]["phases"] = "finetune"
    try:
        moved = our_trainer(active, "curve", "2d")
    finally:
        plans["configurations"]["2d"]["fedharm"]["schedule"]["phases"] = "frozen"
    first_losses(moved, steps=2)
    assert float(moved.harmonizer.tone[-1].weight.detach().abs().sum()) > 0


def test_each_sample_is_harmonized_with_its_own_sites_style(active: Planned) -> None:
    trainer = our_trainer(active, "nyul", "2d")
    trainer.initialize()
    seen: list[list[int]] = []
    told = trainer.harmonizer.set_batch_styles
    trainer.harmonizer.set_batch_styles = lambda sites: (
        seen.append([] if sites is None else sites.tolist()),
        told(sites),
    )[1]  # type: ignore[method-assign, assignment, func-returns-value]
    trainer.tell_sites({"keys": ["Acase000", "Bcase001"]})
    assert seen == [[0, 1]]
    with pytest.raises(PlanError, match="Case Zcase000 has no site"):
        trainer.tell_sites({"keys": ["Zcase000"]})


def test_plans_without_a_section_are_refused_before_anything_is_written(active: Planned) -> None:
    plans = {**active.plans["none"], "plans_name": "untouched"}
    plans["configurations"] = {
        name: {key: value for key, value in configuration.items() if key != "fedharm"}
        for name, configuration in plans["configurations"].items()
    }
    with pytest.raises(PlanError, match=r"no fedharm section for 2d.*nnunet-fedharm plan"):
        make_trainer("nnUNetTrainerFedHarmNone", plans, "2d", 0, active.dataset_json)
    assert not list(active.root.results.rglob("*untouched*"))


def test_a_trainer_of_another_harmonizer_is_refused_with_the_right_name(active: Planned) -> None:
    with pytest.raises(PlanError, match=r"trains the harmonizer 'nyul'.*-tr nnUNetTrainerFedHarmCurve"):
        make_trainer("nnUNetTrainerFedHarmNyul", active.plans["curve"], "2d", 0, active.dataset_json)


def test_a_cascade_is_refused_in_one_sentence(active: Planned) -> None:
    with pytest.raises(PlanError, match=r"trains 2d and 3d_fullres; '3d_lowres'"):
        make_trainer("nnUNetTrainerFedHarmNone", active.plans["none"], "3d_lowres", 0, active.dataset_json)


def test_plans_without_a_style_bank_are_refused(active: Planned) -> None:
    plans = active.plans["nyul"]
    styles = plans["configurations"]["2d"]["fedharm"]["styles"]
    plans["configurations"]["2d"]["fedharm"]["styles"] = {}
    try:
        with pytest.raises(PlanError, match="no style bank"):
            make_trainer("nnUNetTrainerFedHarmNyul", plans, "2d", 0, active.dataset_json)
    finally:
        plans["configurations"]["2d"]["fedharm"]["styles"] = styles


def test_a_checkpoint_of_another_trainer_is_refused_by_name(active: Planned) -> None:
    writer = our_trainer(active, "none", "2d")
    writer.initialize()
    path = str(Path(writer.output_folder) / "checkpoint_final.pth")
    writer.save_checkpoint(path)
    reader = our_trainer(active, "curve", "2d")
    with pytest.raises(CheckpointError, match=r"written by nnUNetTrainerFedHarmNone, not by nnUNetTrainerFedHarmCurve"):
        reader.load_checkpoint(path)


def test_a_full_disk_leaves_the_former_checkpoint_whole(active: Planned) -> None:
    trainer = our_trainer(active, "none", "2d")
    trainer.initialize()
    path = Path(trainer.output_folder) / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(path))
    before = path.read_bytes()
    # /dev/full answers every write with "no space left on device": the real error from the real system.
    Path(f"{path}.writing").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=r"Cannot write .*former checkpoint is untouched.*--c"):
        trainer.save_checkpoint(str(path))
    assert path.read_bytes() == before
    assert not Path(f"{path}.writing").is_symlink()
    trainer.save_checkpoint(str(path))


@pytest.mark.parametrize(
    "name",
    [
        "__init__",
        "build_network_architecture",
        "initialize",
        "configure_optimizers",
        "run_training",
        "train_step",
        "validation_step",
        "save_checkpoint",
        "load_checkpoint",
    ],
)
def test_every_overridden_hook_still_has_nnunets_signature(name: str) -> None:
    ours = inspect.signature(getattr(nnUNetTrainerFedHarm, name))
    theirs = inspect.signature(getattr(nnUNetTrainer, name))
    assert list(ours.parameters) == list(theirs.parameters)


def test_the_loop_over_epochs_is_still_nnunets_own() -> None:
    """`run_epochs` repeats the body of `run_training`; a change over there has to be looked at."""
    body = inspect.getsource(nnUNetTrainer.run_training)
    calls = ["on_epoch_start", "on_train_epoch_start", "train_step", "on_train_epoch_end"]
    calls += ["on_validation_epoch_start", "validation_step", "on_validation_epoch_end", "on_epoch_end"]
    ours = inspect.getsource(nnUNetTrainerFedHarm.run_epochs)
    for text in (body, ours):
        positions = [text.index(f"self.{call}(") for call in calls]
        assert positions == sorted(positions)
    assert body.count("self.on_") == ours.count("self.on_") + 2  # on_train_start and on_train_end


def test_regions_and_an_ignore_label_train_as_in_the_stock_trainer(
    active: Planned, tmp_path: Path, make_raw_dataset: Callable[..., Path]
) -> None:
    root = NnunetRoot(tmp_path).create()
    folder = make_raw_dataset(root.raw, name="Dataset002_Regions", n_labelled=3)
    for path in (folder / "labelsTr").glob("*.nii.gz"):
        label = nibabel.load(path)
        values = np.asarray(label.dataobj).copy()
        values[:4] = 3  # never annotated
        values[10:] *= 2
        nibabel.save(nibabel.Nifti1Image(values, label.affine), path)
    description = json.loads((folder / "dataset.json").read_text())
    description["labels"] = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}
    description["regions_class_order"] = [1, 2]
    (folder / "dataset.json").write_text(json.dumps(description))
    options = CentralOptions(
        configurations=("2d",),
        kind="none",
        schedule=SCHEDULE,
        plan=PlanOptions(base_features=4, max_features=8, batch_size=2, plans_name="regions"),
    )
    plans = plan_central(root, "2", options)
    with root.activate():
        losses = [
            first_losses(kind({**plans, "continue_training": False}, "2d", "all", description, torch.device("cpu")), 2)
            for kind in (nnUNetTrainerFedHarmNone, nnUNetTrainer)
        ]
    assert losses[0] == losses[1]
    assert np.isfinite(losses[0]).all()


def test_trainers_of_each_kind_exist() -> None:
    assert {kind: trainer_class(name).kind for kind, name in TRAINERS.items()} == {kind: kind for kind in TRAINERS}
