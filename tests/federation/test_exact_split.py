"""CycleGAN cut in two: one step per exchange of a federation is one step on the union of its sites' batches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nnunet_fedharm.federation.config import FederateConfig
from nnunet_fedharm.federation.server_app import run_server
from nnunet_fedharm.federation.state import ServerState, find_run, load_state
from nnunet_fedharm.harmonizers import Harmonizer
from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.trainers.fedharm_trainer import nnUNetTrainerFedHarm
from nnunet_fedharm.trainers.harmonizer_phase import trainable
from nnunet_fedharm.trainers.results import make_trainer
from nnunet_fedharm.trainers.seeds import derive_seed
from tests.federation.local_grid import LocalGrid
from tests.federation.test_in_process import final_weights, full, real_sites, tiny

pytestmark = pytest.mark.slow

EXCHANGES = 3
RATE = 0.05
SPLIT: dict[str, Any] = {
    "train_everywhere": True,
    "paired_weight": 0.0,
    "adversarial_weight": 1.0,
    "cycle_weight": 10.0,
    "share_backward": True,
    "one_sided": True,
    "pseudo_references": False,
    "pseudo_sources": False,
    "polarity": False,
    "width": 4,
    "dilations": [1, 2],
    "discriminator_width": 4,
}
TRAINER = "nnUNetTrainerFedHarmCycleGAN"


def split_config(root: Path, optimizer: str) -> FederateConfig:
    return tiny(
        root,
        harmonizer="cyclegan",
        harmonizer_options=json.dumps({**SPLIT, "optimizer": optimizer}),
        reference="A",
        harmonizer_rounds=EXCHANGES,
        segmenter_rounds=0,
        harmonizer_lr=RATE,
    )


def server_state(config: FederateConfig) -> ServerState:
    folder = find_run(Path(config.root) / "server" / "fedharm", full(config).fingerprint())
    assert folder is not None
    return load_state(folder)[0]


def assembled(config: FederateConfig, state: ServerState, home: str) -> nnUNetTrainerFedHarm:
    with NnunetRoot(Path(config.root) / home).activate():
        trainer = make_trainer(TRAINER, state.plans, "2d", "all", state.dataset_json)
        trainer.assemble()
    return trainer


def batches(config: FederateConfig, state: ServerState, site: str) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """What a site drew in each exchange: own patches, their sites, and patches of the reference where it has any."""
    drawn = []
    with NnunetRoot(Path(config.root) / "sites" / site).activate():
        trainer = assembled(config, state, f"sites/{site}")
        for exchange in range(EXCHANGES):
            seed = derive_seed(config.seed, site, "harmonizer", str(exchange), "patches")
            sampler = trainer.harmonizer_sampler(np.random.default_rng(seed))
            references = sampler.only(trainer.harmonizer.reference_sites())
            image, sites = sampler.next()
            drawn.append((image, sites, None if references is None else references.next()[0]))
    return drawn


def centralized(config: FederateConfig, state: ServerState) -> Harmonizer:
    """The same exchanges as steps on the union of both sites' batches, at half the rate: a mean of two gradients, not a sum."""
    trainer = assembled(config, state, "server")
    training = trainer.harmonizer.make_training(lr=RATE / 2, total_epochs=EXCHANGES)
    with trainable(trainer.harmonizer):
        both = zip(batches(config, state, "A"), batches(config, state, "B"), strict=True)
        for exchange, ((_, _, references), (image, sites, nothing)) in enumerate(both):
            assert nothing is None
            training.set_epoch(exchange)
            training.step(image, sites, torch.Generator(), references)
    return trainer.harmonizer


def largest_difference(config: FederateConfig) -> tuple[float, float]:
    """Between federated and centralized weights, and between these and the start."""
    run_server(LocalGrid(real_sites(config, 2)), config)
    federated = final_weights(config)
    state = server_state(config)
    central = centralized(config, state)
    start = dict(assembled(config, state, "server").harmonizer.named_parameters())
    apart = moved = 0.0
    for name, value in central.named_parameters():
        there = torch.from_numpy(federated[f"harmonizer.{name}"])
        apart = max(apart, float((value - there).abs().max()))
        moved = max(moved, float((value - start[name]).abs().max()))
    return apart, moved


@pytest.fixture
def two_sites(tmp_path: Path, make_consortium: Callable[..., Path]) -> Path:
    return make_consortium(tmp_path, {"A": (2, 0), "B": (2, 0)})


def test_exchanges_with_sgd_are_centralized_steps(two_sites: Path) -> None:
    apart, moved = largest_difference(split_config(two_sites, "sgd"))
    print(apart, moved)
    assert apart < 1e-5
    assert moved > 1e-2


def test_exchanges_with_adam_are_not(two_sites: Path) -> None:
    apart, _ = largest_difference(split_config(two_sites, "adam"))
    assert apart > 1e-3
