"""Training under differential privacy: what moves, what is entered into the ledger, and what never leaves."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.run.run_training import maybe_load_checkpoint

from nnunet_fedharm.errors import CheckpointError, PrivacyError
from nnunet_fedharm.privacy.accounting import epsilon_of
from nnunet_fedharm.privacy.ledger import Ledger
from nnunet_fedharm.privacy.patient_gradients import PatientGradients
from nnunet_fedharm.privacy.releases import GAUSSIAN, Release
from nnunet_fedharm.trainers import private_sampling, private_training
from nnunet_fedharm.trainers.fedharm_trainer import nnUNetTrainerFedHarm
from nnunet_fedharm.trainers.harmonizer_phase import trainable
from nnunet_fedharm.trainers.patient_loader import PatientLoader, by_patient
from nnunet_fedharm.trainers.phases import HarmonizerPhase
from nnunet_fedharm.trainers.results import make_trainer
from tests.trainers.conftest import Planned
from tests.trainers.test_trainer import TRAINERS

OPTIONS = {"epsilon": 5.0, "delta": 1e-3, "clip": 1.0, "patients_per_step": 3.0, "patches_per_patient": 2}


@pytest.fixture
def private(active: Planned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """A trainer under DP by kind of harmonizer, with an empty ledger."""
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    files = (active.root.path / "fedharm").glob("privacy-ledger*")
    for path in files:
        path.unlink()

    def make(kind: str, configuration: str = "2d", **options: Any) -> nnUNetTrainerFedHarm:
        plans = copy.deepcopy(active.plans[kind])
        section = plans["configurations"][configuration]["fedharm"]
        section["privacy"] = {**OPTIONS, **options}
        section["schedule"]["seed"] = 0
        return make_trainer(TRAINERS[kind], plans, configuration, "all", active.dataset_json)

    yield make
    for path in (active.root.path / "fedharm").glob("privacy-ledger*"):
        path.unlink()


def ledger(active: Planned) -> Ledger:
    return Ledger(active.root.path / "fedharm")


@pytest.mark.parametrize("kind", ["curve", "polarity", "diffusion", "cyclegan"])
def test_both_phases_are_trained_and_accounted_for(kind: str, private: Callable[..., Any], active: Planned) -> None:
    trainer = private(kind)
    trainer.initialize()
    before = {name: tensor.clone() for name, tensor in trainer.network.state_dict().items()}
    trainer.run_training()
    after = trainer.network.state_dict()
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert any(name.startswith("segmenter.") for name in moved)
    assert any(name.startswith("harmonizer.") and "bank" not in name for name in moved)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in after.values())
    releases = ledger(active).releases()
    steps: dict[str, int] = {}
    for release in releases:
        steps[release.what] = steps.get(release.what, 0) + release.steps
    votes = {} if kind == "curve" else {"votes on polarity": 1}
    assert steps == {"harmonizer training": 4, "segmenter training": 6, **votes}
    assert 0 < epsilon_of([release.noise for release in releases], 1e-3) <= 5.0
    card = json.loads((Path(trainer.output_folder) / "privacy.json").read_text())
    assert card["unit"] == "patient"
    assert card["epsilon"] <= 5.0


@pytest.mark.parametrize(("travelled", "noise"), [(False, 8.0), (True, 8.0 * 2**0.5)])
def test_the_votes_of_all_sites_in_one_place_cost_what_those_of_one_do(
    private: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, travelled: bool, noise: float
) -> None:
    voters = {1: [("B_1",), ("B_2", "B_3")], 2: [(f"C_{index}",) for index in range(40)]}
    monkeypatch.setattr(private_training, "voting_sites", lambda _: voters)
    monkeypatch.setattr(private_sampling, "_patient_of", lambda _: {"B_2": "anna", "C_1": "anna"} if travelled else {})
    trainer = private("polarity")
    trainer.initialize()
    trainer.start_private()
    (release,) = trainer.private._vote_releases
    assert release.noise_multiplier == 8.0, "the least of the sites', as every patient is in one"
    assert trainer.private.vote_noise(2).noise_multiplier == pytest.approx(noise)
    many = 100 / 4 / trainer.harmonizer.num_channels**0.5 / 8
    assert many > 1
    assert trainer.private.vote_noise(100).noise_multiplier == pytest.approx(noise * many)


def test_checkpoints_hold_neither_losses_nor_dice_nor_votes_of_single_patches(private: Callable[..., Any]) -> None:
    trainer = private("polarity", "3d_fullres")
    trainer.run_training()
    folder = Path(trainer.output_folder)
    for name in ("checkpoint_final.pth", "checkpoint_best.pth"):
        log = torch.load(folder / name, map_location="cpu", weights_only=False)["logging"]
        for key in ("train_losses", "val_losses", "mean_fg_dice"):
            assert set(log[key]) == {0.0}
        assert (log["epoch_start_timestamps"], log["epoch_end_timestamps"]) == ([0.0, 1.0, 2.0], [1.0, 2.0, 3.0])
    debug = (folder / "debug.json").read_text()
    assert trainer.site_of_case
    assert not [case for case in trainer.site_of_case if case in debug]
    final = (folder / "checkpoint_final.pth").read_bytes()
    assert final == (folder / "checkpoint_best.pth").read_bytes()
    assert trainer.harmonizer.bank_gate.tolist() == [0.0, 1.0]  # the reference's is shut by definition, none was judged


def test_a_run_that_the_budget_cannot_hold_is_refused_before_anything_is_trained(
    private: Callable[..., Any], active: Planned
) -> None:
    private("curve").run_training()
    spent = ledger(active).releases()
    again = private("curve")
    again.run_id = "another run"
    again.initialize()
    before = copy.deepcopy(again.network.state_dict())
    with pytest.raises(PrivacyError, match=r"budget is epsilon 5 .* is spent, this run alone needs"):
        again.run_training()
    assert ledger(active).releases() == spent
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.network.state_dict().items())


def stopped(trainer: Any) -> None:
    """Train two segmenter epochs; without privacy nnU-Net would save after 50."""
    trainer.save_every = 1 if trainer.section.privacy is None else 50

    def stop() -> None:
        type(trainer).on_epoch_end(trainer)
        if trainer.current_epoch == 2:
            raise KeyboardInterrupt

    trainer.on_epoch_end = stop
    with pytest.raises(KeyboardInterrupt):
        trainer.run_training()


def continued(trainer: Any) -> None:
    """As `nnUNetv2_train --c` does."""
    maybe_load_checkpoint(trainer, True, False)
    trainer.run_training()


def test_a_continued_run_goes_on_within_its_budget(private: Callable[..., Any], active: Planned) -> None:
    stopped(private("curve"))
    resumed = private("curve", epsilon=5.5)
    resumed.initialize()
    maybe_load_checkpoint(resumed, True, False)
    assert resumed.current_epoch == 2
    resumed.run_training()
    final = torch.load(Path(resumed.output_folder) / "checkpoint_final.pth", map_location="cpu", weights_only=False)
    planned = final["init_args"]["plans"]["configurations"]["2d"]["fedharm"]
    assert planned["privacy"]["epsilon"] == 5.5, "the plans that it went on with"
    releases = ledger(active).releases()
    assert sum(release.steps for release in releases if release.what == "segmenter training") == 6
    assert epsilon_of([release.noise for release in releases], 1e-3) <= 5.0


def stop_harmonizer(trainer: Any, epochs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train so many harmonizer epochs."""
    with monkeypatch.context() as patched:
        save = HarmonizerPhase.save

        def stop(phase: HarmonizerPhase, training: Any) -> None:
            save(phase, training)
            if int(trainer.harmonizer.trained_epochs) == epochs:
                raise KeyboardInterrupt

        patched.setattr(HarmonizerPhase, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            trainer.run_training()


def test_a_run_that_was_stopped_in_its_harmonizer_phase_goes_on(
    private: Callable[..., Any], active: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = active.plans["curve"]["configurations"]["2d"]["fedharm"]["schedule"]
    monkeypatch.setitem(schedule, "harmonizer_epochs", 8)
    stop_harmonizer(private("curve"), 6, monkeypatch)
    resumed = private("curve")
    resumed.initialize()
    continued(resumed)
    releases = ledger(active).releases()
    assert sum(release.steps for release in releases if release.what == "harmonizer training") == 16
    assert epsilon_of([release.noise for release in releases], 1e-3) <= 5.0


def test_more_epochs_than_were_said_to_be_ahead_do_not_pass_the_budget(
    private: Callable[..., Any], active: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = active.plans["curve"]["configurations"]["2d"]["fedharm"]["schedule"]
    monkeypatch.setitem(schedule, "harmonizer_epochs", 20)
    trainer = private("curve")
    trainer.initialize()
    trainer.start_private()
    ledger(active).record(Release(what="earlier", mechanism=GAUSSIAN, noise_multiplier=0.8))
    trainer.private.check_budget(harmonizer_epochs=1, segmenter_epochs=0)
    with pytest.raises(PrivacyError, match="budget is epsilon 5"):
        _ = [trainer.private.record("harmonizer training") for _ in range(20)]
    assert ledger(active).spent(1e-3).epsilon <= 5.0


@pytest.mark.parametrize("phase", ["harmonizer", "segmenter"])
def test_what_was_trained_without_privacy_is_not_continued_under_it(
    phase: str, private: Callable[..., Any], active: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = make_trainer(TRAINERS["curve"], active.plans["curve"], "2d", "all", active.dataset_json)
    plain.initialize()
    stop_harmonizer(plain, 1, monkeypatch) if phase == "harmonizer" else stopped(plain)
    resumed = private("curve")
    resumed.initialize()
    with pytest.raises(CheckpointError, match="was trained without differential privacy, and the plans ask for it now"):
        continued(resumed)
    assert not ledger(active).releases()


def test_a_training_without_privacy_leaves_no_promise_of_a_former_one(
    private: Callable[..., Any], active: Planned
) -> None:
    trainer = private("none")
    trainer.run_training()
    card = Path(trainer.output_folder) / "privacy.json"
    assert card.is_file()
    plain = make_trainer(TRAINERS["none"], active.plans["none"], "2d", "all", active.dataset_json)
    plain.initialize()
    plain.run_training()
    assert Path(plain.output_folder) == card.parent
    assert not card.exists()


def test_more_noise_for_a_smaller_epsilon(private: Callable[..., Any]) -> None:
    multipliers = []
    for epsilon in (1.0, 4.0, 16.0):
        trainer = private("none", epsilon=epsilon)
        trainer.initialize()
        trainer.start_private()
        multipliers.append(trainer.private.noise_multiplier)
    assert multipliers[0] > 2 * multipliers[1] > 4 * multipliers[2]


def test_without_a_privacy_part_nothing_changes(
    active: Planned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    trainer = make_trainer(TRAINERS["none"], active.plans["none"], "2d", "all", active.dataset_json)
    trainer.initialize()
    trainer.start_private()
    assert trainer.private is None
    assert trainer.num_val_iterations_per_epoch == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_every_step_draws_patients_and_hands_out_whole_ones(workers: int) -> None:
    patients = by_patient(["a1", "a2", "b1", "c1"], {"a1": "a", "a2": "a"})
    assert patients == [("a1", "a2"), ("b1",), ("c1",)]
    loader = PatientLoader(patients, 0.5, lambda cases: {"keys": list(cases)}, workers=workers)
    draws = [[tuple(batch["keys"]) for batch in next(loader)] for _ in range(400)]
    loader.close()
    assert all(len(set(draw)) == len(draw) for draw in draws)
    share = [np.mean([patient in draw for draw in draws]) for patient in patients]
    assert share == pytest.approx([0.5] * 3, abs=0.12)


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
@pytest.mark.parametrize("kind", ["curve", "polarity", "diffusion", "cyclegan"])
def test_a_patients_gradient_of_a_harmonizer_is_that_of_the_patient_alone(
    kind: str, configuration: str, private: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every tensor that the phase trains, critics among them; patients before it in the step leave no trace."""
    trainer = private(kind, configuration)
    trainer.initialize()
    trainer.start_private()
    phase = trainer.private.phases["harmonizer training"]
    trainer.private.phases["harmonizer training"] = replace(phase, steps_per_epoch=1, sample_rate=1.0)
    training = trainer.harmonizer.make_training(lr=1e-3, total_epochs=1)
    generator = torch.Generator().manual_seed(0)
    with trainable(trainer.harmonizer):
        untouched = copy.deepcopy(training)
        seen: list[tuple[Any, ...]] = []
        found: list[list[torch.Tensor | None]] = []
        step, end = training.step, PatientGradients.end_patient

        def watched(image: torch.Tensor, sites: torch.Tensor, source: torch.Generator, references: Any) -> Any:
            seen.append((image.clone(), sites.clone(), source.get_state(), references is not None))
            return step(image, sites, source, references)

        def kept(self: PatientGradients) -> float:
            found.append([None if p.grad is None else p.grad.clone() for p in self.parameters])
            return end(self)

        monkeypatch.setattr(training, "step", watched)
        monkeypatch.setattr(PatientGradients, "end_patient", kept)
        sampler = trainer.harmonizer_sampler(np.random.default_rng(0))
        trainer.private.harmonizer_epoch(training, sampler, generator=generator, last=False)
        assert len(found) == len(phase.patients) >= 2
        for (image, sites, state, referred), gradients in zip(seen, found, strict=True):
            alone = copy.deepcopy(untouched)
            alone.collecting = True
            generator.set_state(state)
            alone.step(image, sites, generator, image if referred else None)
            parameters = dict.fromkeys(
                p for o in alone.optimizers.values() for group in o.param_groups for p in group["params"]
            )
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if parameter.grad is None or gradient is None:
                    assert parameter.grad is gradient is None
                else:
                    torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)


def test_a_delta_that_protects_nobody_is_refused(private: Callable[..., Any]) -> None:
    trainer = private("none", delta=0.2)
    trainer.initialize()
    with pytest.raises(PrivacyError, match="no guarantee for 6 patients"):
        trainer.start_private()
