"""How simulated sites share processors and GPUs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nnunet_fedharm.federation.config import FederateConfig
from nnunet_fedharm.federation.launch import run_arguments


def resources(**options: object) -> dict[str, float]:
    config = FederateConfig(sites="A,B,C,D,E", **options)  # type: ignore[arg-type]
    return {key: float(value) for key, value in re.findall(r"(\S+)=(\S+)", run_arguments(config, Path("run.toml"))[-1])}


def test_on_a_cpu_as_many_sites_train_at_once_as_asked_for() -> None:
    found = resources(parallel_sites=3)
    assert found["num-supernodes"] == 5
    assert found["init-args-num-cpus"] / found["client-resources-num-cpus"] == 3
    assert "init-args-num-gpus" not in found


@pytest.mark.parametrize(
    ("gpus", "sites", "share"), [(1, 1, 1.0), (1, 4, 0.25), (4, 4, 1.0), (4, 8, 0.5), (4, 5, 0.5), (8, 2, 1.0)]
)
def test_sites_get_equal_shares_of_whole_gpus(gpus: int, sites: int, share: float) -> None:
    found = resources(device="cuda", parallel_sites=sites, gpus=gpus)
    assert found["client-resources-num-gpus"] == share
    assert found["init-args-num-gpus"] == gpus
    assert int(1 / share) * gpus >= sites, "all of them find a place at once"
