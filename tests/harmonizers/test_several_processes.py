"""What DDP processes share, in two real processes over gloo."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nnunet_fedharm.harmonizers.training import is_distributed, share_from_first


def of_one_process(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    gates = torch.tensor([1.0, 0.0, 1.0]) * (rank + 1)
    share_from_first(gates)
    torch.save(gates, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_all_processes_have_the_gates_of_the_first(tmp_path: Path) -> None:
    assert not is_distributed()
    alone = torch.tensor([2.0])
    share_from_first(alone)
    assert alone.tolist() == [2.0]
    mp.start_processes(of_one_process, (str(tmp_path),), nprocs=2, start_method="spawn")
    assert [torch.load(tmp_path / f"{rank}.pt").tolist() for rank in (0, 1)] == [[1.0, 0.0, 1.0]] * 2
