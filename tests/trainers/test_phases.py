"""Phases of a training: their order, what each may move, and that a continued run is the run that was not interrupted."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.run.run_training import maybe_load_checkpoint
from torch import Tensor
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from nnunet_fedharm.errors import CheckpointError, PlanError
from nnunet_fedharm.trainers.fedharm_trainer import nnUNetTrainerFedHarm
from nnunet_fedharm.trainers.local_training import LocalTraining
from nnunet_fedharm.trainers.results import make_trainer
from tests.trainers.conftest import NAME, Planned
from tests.trainers.test_trainer import TRAINERS

FOLD = 0
Stop = Callable[[nnUNetTrainerFedHarm], None]


@pytest.fixture
def results(tmp_path: Path, active: Planned, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Send what follows to a results folder of its own."""
    return lambda name: monkeypatch.setenv("nnUNet_results", str(tmp_path / name))


def trainer_with(planned: Planned, kind: str, **schedule: Any) -> nnUNetTrainerFedHarm:
    plans = copy.deepcopy(planned.plans[kind])
    plans["configurations"]["2d"]["fedharm"]["schedule"] |= schedule
    return make_trainer(TRAINERS[kind], plans, "2d", FOLD, planned.dataset_json)


def state(trainer: nnUNetTrainerFedHarm) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.network.state_dict().items()}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    return [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]


def after_harmonizer_epoch(epoch: int) -> Stop:
    """Ctrl-C once that harmonizer epoch is on disk."""

    def arrange(trainer: nnUNetTrainerFedHarm) -> None:
        save = trainer.harmonizer_phase.save

        def stop(training: Any) -> None:
            save(training)
            if int(trainer.harmonizer.trained_epochs) == epoch + 1:
                raise KeyboardInterrupt

        trainer.harmonizer_phase.save = stop  # type: ignore[method-assign]

    return arrange


def after_segmenter_epoch(epoch: int) -> Stop:
    """Ctrl-C once that segmenter epoch is over."""

    def arrange(trainer: nnUNetTrainerFedHarm) -> None:
        end = trainer.on_epoch_end

        def stop() -> None:
            end()
            if trainer.current_epoch == epoch + 1:
                raise KeyboardInterrupt

        trainer.on_epoch_end = stop  # type: ignore[method-assign]

    return arrange


ALTERNATE = {"phases": "alternate", "alternate_every": 2, "harmonizer_epochs": 3, "segmenter_epochs": 4, "seed": 5}
FINETUNE = {"phases": "finetune", "seed": 5}
FROZEN = {"phases": "frozen", "seed": 5}


@pytest.mark.parametrize(
    ("kind", "schedule", "stop"),
    [
        ("curve", ALTERNATE, after_harmonizer_epoch(0)),
        ("cyclegan", ALTERNATE, after_harmonizer_epoch(2)),
        ("cyclegan", ALTERNATE, after_segmenter_epoch(2)),
        ("curve", FINETUNE, after_segmenter_epoch(1)),
        ("diffusion", FROZEN, after_segmenter_epoch(1)),
    ],
)
def test_a_training_interrupted_in_any_phase_ends_with_the_weights_of_one_that_was_not(
    active: Planned, results: Callable[[str], None], kind: str, schedule: dict[str, Any], stop: Stop
) -> None:
    results("whole")
    whole = trainer_with(active, kind, **schedule)
    whole.run_training()
    results("interrupted")
    interrupted = trainer_with(active, kind, **schedule)
    interrupted.save_every = 2
    stop(interrupted)
    with pytest.raises(KeyboardInterrupt):
        interrupted.run_training()
    resumed = trainer_with(active, kind, **schedule)
    maybe_load_checkpoint(resumed, continue_training=True, validation_only=False)
    resumed.run_training()
    assert differing(state(whole), state(resumed)) == []
    assert int(resumed.harmonizer.trained_epochs) == whole.section.schedule.harmonizer_epochs


def test_blocks_of_harmonizer_and_segmenter_alternate_until_both_budgets_are_spent(
    active: Planned, results: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    results("alternate")
    trainer = trainer_with(active, "curve", **ALTERNATE)
    trainer.run_training()
    log = capsys.readouterr().out
    order = [(word, int(number)) for word, number in re.findall(r"(Harmonizer epoch|Epoch) (\d+)", log)]
    blocks = [("Harmonizer epoch", 0), ("Harmonizer epoch", 1), ("Epoch", 0), ("Epoch", 1)]
    assert order == [*blocks, ("Harmonizer epoch", 2), ("Epoch", 2), ("Epoch", 3)]
    assert log.index("nearer to the reference") > log.index("Harmonizer epoch 2")  # judged once, when it is trained


def test_a_harmonizer_checkpoint_of_another_training_is_refused(
    active: Planned, results: Callable[[str], None]
) -> None:
    results("mixed")
    ahead = trainer_with(active, "curve", **ALTERNATE)
    ahead.run_training()
    behind = trainer_with(active, "curve", **ALTERNATE)
    behind.initialize()
    with pytest.raises(CheckpointError, match=r"holds 3 harmonizer epochs, .* belongs to 0 to 2.*without --c"):
        behind.run_harmonizer_phase()
    behind.harmonizer.trained_epochs.fill_(1)
    (Path(behind.output_folder) / "checkpoint_harmonizer.pth").unlink()
    with pytest.raises(CheckpointError, match=r"has 1 of 3 epochs, but .* is not there"):
        behind.run_harmonizer_phase()


def test_finetuning_moves_the_mapping_alone_at_its_own_rate(
    active: Planned, results: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    results("finetune")
    trainer = trainer_with(active, "cyclegan", phases="finetune", finetune_lr_factor=0.25)
    keep_labels_at("B", trainer, monkeypatch)
    trainer.initialize()
    trainer.run_harmonizer_phase()
    # The label-free judge of so short a phase may shut it; what is asked here is what the loss moves.
    trainer.harmonizer.bank_gate[1] = 1.0
    before = state(trainer)
    trainer.on_train_start()
    rates = []
    for trainer.current_epoch in (0, 2):
        trainer.on_train_epoch_start()
        rates.append([group["lr"] for group in trainer.optimizer.param_groups])
        trainer.train_step(next(trainer.dataloader_train))
    assert [own / segmenter for segmenter, own in rates] == pytest.approx([0.25, 0.25])
    assert rates[1][1] < rates[0][1]
    moved = {name.split(".")[1] for name in differing(before, state(trainer)) if name.startswith("harmonizer.")}
    assert moved == {"generator"}


def test_finetuning_with_labels_at_the_reference_only_leaves_the_harmonizer_alone(
    active: Planned, results: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    results("reference")
    trainer = trainer_with(active, "curve", **FINETUNE)
    keep_labels_at("A", trainer, monkeypatch)
    trainer.initialize()
    trainer.run_harmonizer_phase()
    before = state(trainer)
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    for _ in range(2):
        trainer.train_step(next(trainer.dataloader_train))
    assert {name.split(".")[0] for name in differing(before, state(trainer))} == {"segmenter"}


def keep_labels_at(site: str, trainer: nnUNetTrainerFedHarm, monkeypatch: pytest.MonkeyPatch) -> None:
    """The split of a dataset whose other site's images lie in imagesUnlabelled."""
    names = [f"{site}case{index:03d}" for index in range(3)]
    monkeypatch.setattr(trainer, "do_split", lambda: (names[:2], names[2:]))


def test_with_a_seed_and_labels_at_the_reference_two_kinds_train_the_same_segmenter_bit_for_bit(
    active: Planned, results: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    segmenters: dict[tuple[str, int | None], dict[str, Tensor]] = {}
    for kind, seed in (("none", 3), ("diffusion", 3), ("none", 4)):
        results(f"{kind}_{seed}")
        trainer = trainer_with(active, kind, seed=seed, harmonizer_epochs=1 if kind == "diffusion" else 0)
        keep_labels_at("A", trainer, monkeypatch)
        trainer.run_training()
        assert trainer.current_epoch == 3
        segmenters[kind, seed] = trainer.network.segmenter.state_dict()
    assert differing(segmenters["none", 3], segmenters["diffusion", 3]) == []
    assert differing(segmenters["none", 3], segmenters["none", 4])


def test_rounds_do_not_alternate(active: Planned, tmp_path: Path) -> None:
    plans = copy.deepcopy(active.plans["curve"])
    plans["configurations"]["2d"]["fedharm"]["schedule"]["phases"] = "alternate"
    with pytest.raises(PlanError, match=r"trains on one machine only.*Choose 'frozen' or 'finetune'"):
        LocalTraining(
            root=active.root,
            dataset_name=NAME,
            plans=plans,
            dataset_json=active.dataset_json,
            configuration="2d",
            fold="all",
            site="A",
            trainer_name=TRAINERS["curve"],
            state_folder=tmp_path,
            seed=1,
            device="cpu",
        )


@pytest.mark.parametrize("kind", ["curve", "cyclegan", "diffusion"])
def test_ddp_meets_a_gradient_of_every_weight_that_finetuning_moves(
    active: Planned, results: Callable[[str], None], tmp_path: Path, kind: str
) -> None:
    results("ddp")
    trainer = trainer_with(active, kind, phases="finetune", harmonizer_epochs=1)
    trainer.initialize()  # before the process group: a DDP run of nnU-Net's trainer wants a GPU
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        trainer.network = DistributedDataParallel(trainer.network)
        trainer.run_harmonizer_phase()  # its backward passes do not go through the wrapper
        image = torch.randn(2, 1, *trainer.configuration_manager.patch_size)
        for sites in ([0, 0], [0, 1], [0, 0]):  # the gate of site 0, the reference, is shut
            trainer.harmonizer.set_batch_styles(torch.tensor(sites))
            sum(output.square().mean() for output in trainer.network(image)).backward()
        assert all(parameter.grad is not None for parameter in trainer.harmonizer.mapping_parameters())
    finally:
        dist.destroy_process_group()
