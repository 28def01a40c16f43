"""A site's gate goes back to the identity where harmonization does not gain there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn

from nnunet_fedharm.harmonizers import Harmonizer, build_harmonizer
from nnunet_fedharm.harmonizers.base import patch_quantiles
from nnunet_fedharm.harmonizers.style import Style, average_styles, volume_quantiles
from nnunet_fedharm.trainers.fedharm_trainer import nnUNetTrainerFedHarm
from nnunet_fedharm.trainers.gates import _distance, appearance_gains, close_where_dice_falls, close_without_gain, gates
from nnunet_fedharm.trainers.names import trainer_name_for
from nnunet_fedharm.trainers.patches import ImageCase, PatchSampler, random_patch
from nnunet_fedharm.trainers.results import make_trainer
from nnunet_fedharm.trainers.whole_volumes import harmonize_in_patches
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


class Phantoms(PatchSampler):
    """Volumes in memory, of sites that show the same tissues through another gamma each."""

    def __init__(self, sites: dict[int, list[Tensor]], patch_size: tuple[int, ...]) -> None:
        cases = [ImageCase(Path(), f"{site}/{index}", site) for site in sites for index in range(len(sites[site]))]
        super().__init__(cases, patch_size, 2, np.random.default_rng(0))
        self.sites = sites

    def only(self, sites: Sequence[int]) -> Phantoms:
        return Phantoms({site: self.sites[site] for site in sites}, self.patch_size)

    def volumes(self, count: int) -> Iterator[Tensor]:
        yield from [volume for own in self.sites.values() for volume in own][:count]

    def _draw(self, case: ImageCase) -> np.ndarray:
        site, index = map(int, case.name.split("/"))
        return random_patch(self.sites[site][index].numpy(), self.patch_size, self.rng)


def phantom(gamma: float, seed: int) -> Tensor:
    """(1, 24, 64, 64): tissues that fill whole regions, in the middle of nothing; z-scored."""
    generator = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(generator.normal(size=(24, 64, 64)), 8)
    ranks = smooth.ravel().argsort().argsort().reshape(smooth.shape) / smooth.size
    value = (0.02 + ranks) ** gamma
    value = (value - value.mean()) / value.std()
    value[:, :12] = value[:, -12:] = 0
    return torch.from_numpy(value[None].astype(np.float32))


@pytest.mark.parametrize("patch_size", [(24, 24), (16, 24, 24)])
def test_an_exact_map_gains_at_every_site_however_small_the_patches(patch_size: tuple[int, ...]) -> None:
    sites = {site: [phantom(gamma, 10 * site + k) for k in range(4)] for site, gamma in enumerate((1.0, 0.8, 1.3))}
    styles = [average_styles([Style(*volume_quantiles(v.numpy()), n_cases=1) for v in own]) for own in sites.values()]
    harmonizer = build_harmonizer(
        "nyul", {}, num_channels=1, spatial_dims=len(patch_size), styles=styles, reference=styles[0]
    )
    harmonizer.bank_gate.copy_(torch.tensor([0.0, 1.0, 1.0]))
    sampler = Phantoms(sites, patch_size)
    gains = appearance_gains(harmonizer, sampler, torch.device("cpu"))
    assert set(gains) == {1, 2}
    assert min(gains.values()) > 0
    for site in gains:  # what the mean of many patches says of the very same map
        seen = []
        for _ in range(60):
            image = sampler.only([site]).next()[0]
            with gates(harmonizer, 1.0):
                harmonizer.set_batch_styles(torch.full((len(image),), site))
                seen.append(patch_quantiles(harmonizer(image), image != 0))
        harmonizer.set_batch_styles(None)
        far = float((torch.cat(seen).mean(dim=0) - harmonizer.reference_quantiles).abs().mean())
        assert far > 3 * _distance(harmonizer, [after_of(harmonizer, sites[site], patch_size, site)])


def after_of(harmonizer: Harmonizer, volumes: list[Tensor], patch_size: tuple[int, ...], site: int) -> Tensor:
    with gates(harmonizer, 1.0):
        found = [harmonize_in_patches(harmonizer, volume, patch_size, site=site)[None] for volume in volumes]
    return torch.cat([patch_quantiles(image, image != 0) for image in found])


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
