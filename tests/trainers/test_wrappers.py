"""torch.compile and DistributedDataParallel around the harmonized segmenter.

nnU-Net uses neither on a CPU, so they are put around the network here; the trace and the gradients are real.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nnunet_fedharm.trainers import nnUNetTrainerFedHarm
from nnunet_fedharm.trainers.weights import bare_module, export_weights
from tests.trainers.conftest import Planned
from tests.trainers.test_trainer import our_trainer


@pytest.mark.parametrize("kind", ["none", "nyul", "curve"])
def test_a_compiled_network_gives_the_same_losses_and_follows_the_batchs_sites(active: Planned, kind: str) -> None:
    trainer = our_trainer(active, kind, "2d")
    trainer.initialize()
    trainer.harmonizer.open_gate()
    plain = trainer.network
    # aot_eager traces forward and backward as inductor does, without generating code.
    compiled = torch.compile(plain, backend="aot_eager")
    image = torch.randn(2, 1, *trainer.configuration_manager.patch_size)
    for sites in ([0, 1], [1, 1]):
        outputs = []
        for network in (plain, compiled):
            trainer.harmonizer.set_batch_styles(torch.tensor(sites))
            output = network(image)[0]
            plain.zero_grad()
            output.square().mean().backward()
            outputs.append((output.detach(), plain.segmenter.decoder.seg_layers[-1].weight.grad.clone()))
        torch.testing.assert_close(outputs[0], outputs[1], atol=1e-4, rtol=1e-4)
    trainer.network = compiled
    assert trainer.harmonizer is plain.harmonizer


def test_ddp_around_a_compiled_network_is_seen_through_and_trains(active: Planned, tmp_path: Path) -> None:
    trainer = our_trainer(active, "curve", "2d")
    trainer.initialize()  # before the process group: a DDP run of nnU-Net's trainer wants a GPU
    plain = trainer.network
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        _check_ddp(trainer, plain)
    finally:
        dist.destroy_process_group()


def _check_ddp(trainer: nnUNetTrainerFedHarm, plain: nn.Module) -> None:
    wrapped = DistributedDataParallel(torch.compile(plain, backend="aot_eager"))
    trainer.network = wrapped
    assert bare_module(wrapped) is plain
    assert trainer.harmonizer is plain.harmonizer
    assert list(export_weights(wrapped)) == list(export_weights(plain))
    trainer.harmonizer.set_batch_styles(torch.tensor([0, 1]))
    image = torch.randn(2, 1, *trainer.configuration_manager.patch_size)
    sum(output.square().mean() for output in wrapped(image)).backward()
    assert all(parameter.grad is None for parameter in trainer.harmonizer.parameters())
    assert all(parameter.grad is not None for parameter in plain.segmenter.parameters())
