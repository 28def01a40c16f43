"""A site's gate goes back to the identity where harmonization does not gain there."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nnunet_fedharm.trainers.fedharm_trainer import nnUNetTrainerFedHarm
from nnunet_fedharm.trainers.gates import appearance_gains, close_where_dice_falls, close_without_gain
from nnunet_fedharm.trainers.names import trainer_name_for
from nnunet_fedharm.trainers.results import make_trainer
from tests.trainers.conftest import Planned

A, B = 0, 1


class Bright(nn.Module):
    """Foreground is what is brighter than one standard deviation."""

    def forward(self, image: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(image), image - 1.0], dim=1)


def assembled(planned: Planned, kind: str) -> nnUNetTrainerFedHarm:
    trainer = make_trainer(trainer_name_for(kind), planned.plans[kind], "2d", 0, planned.dataset_json)
    trainer.enable_deep_supervision = False
    trainer.initialize()
    trainer.harmonizer.open_gate()
    return trainer


def shift_everything(trainer: nnUNetTrainerFedHarm, amount: float) -> None:
    """Make the curve add `amount` standard deviations to every image."""
    last = cast(nn.Linear, cast(nn.Sequential, trainer.harmonizer.tone)[-1])
    with torch.no_grad():
        last.bias[0] = amount


def test_a_map_to_the_reference_gains_and_a_shift_away_does_not(active: Planned) -> None:
    trainer = assembled(active, "nyul")
    sampler = trainer.all_patches(np.random.default_rng(0))
    gains = appearance_gains(trainer.harmonizer, sampler, trainer.device)
    assert set(gains) == {B}  # the reference has nothing to gain
    assert gains[B] > 0
    trainer = assembled(active, "curve")
    shift_everything(trainer, 3.0)
    assert close_without_gain(trainer.harmonizer, sampler, trainer.device)[B] < 0
    assert trainer.harmonizer.bank_gate.tolist() == [0.0, 0.0]


def test_quantiles_do_not_judge_an_inverted_site(active: Planned) -> None:
    trainer = assembled(active, "curve")
    shift_everything(trainer, 3.0)
    trainer.harmonizer.bank_polarity[B] = -1.0
    assert close_without_gain(trainer.harmonizer, trainer.all_patches(np.random.default_rng(0)), trainer.device) == {}
    assert trainer.harmonizer.bank_gate.tolist() == [0.0, 1.0]


def test_a_gate_is_judged_as_if_the_phase_were_over(active: Planned) -> None:
    trainer = assembled(active, "polarity")
    trainer.harmonizer.gate.zero_()  # as during the harmonizer phase
    sampler = trainer.all_patches(np.random.default_rng(0))
    assert close_without_gain(trainer.harmonizer, sampler, trainer.device)[B] > 0
    assert trainer.harmonizer.bank_gate.tolist() == [0.0, 1.0]
    assert trainer.harmonizer.gate == 0


def test_judging_the_gates_changes_nothing_but_the_gates(active: Planned) -> None:
    trainer = assembled(active, "curve")
    before = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    close_without_gain(trainer.harmonizer, trainer.all_patches(np.random.default_rng(0)), trainer.device)
    changed = [name for name, value in trainer.network.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["harmonizer.bank_gate"]  # an identity gains nothing
    assert trainer.harmonizer._batch_styles is None


@pytest.mark.parametrize("amount", [-3.0, 3.0])
def test_the_gate_of_a_labelled_site_follows_its_validation_dice(active: Planned, amount: float) -> None:
    trainer = assembled(active, "curve")
    trainer.on_train_start()
    trainer.network.segmenter = Bright()
    shift_everything(trainer, amount)
    trainer.harmonizer.bank_gate.fill_(1.0)  # of the reference too: the fold's one validation case may be its own
    found = close_where_dice_falls(trainer)
    assert found
    for site, (opened, shut) in found.items():
        assert opened != shut
        assert bool(trainer.harmonizer.bank_gate[trainer.bank.index(site)]) is (opened > shut)


def test_without_a_validation_split_the_dice_is_not_asked(active: Planned) -> None:
    trainer = assembled(active, "curve")
    trainer.fold = "all"
    assert close_where_dice_falls(trainer) == {}
