"""The server, a node or both die at random messages: the run ends with the weights of one that was never stopped."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nnunet_fedharm.federation.server_app import run_server
from tests.federation.local_grid import LocalGrid
from tests.federation.power_cuts import (
    Chance,
    differences,
    fingerprint_of_results,
    rounds_lost,
    run_through_failures,
)
from tests.federation.test_in_process import real_sites, tiny

pytestmark = [pytest.mark.slow, pytest.mark.long]

OPTIONS: dict[str, Any] = {
    "harmonizer": "curve",
    "harmonizer_rounds": 1,
    "phases": "finetune",
    "strategy": "fedadam",  # its memory has to survive too
    "quorum": 3,  # all sites, so that the same ones reply in each round
    "max_retries": 5,
}


def test_random_deaths_lose_no_round_and_change_no_bit(
    tmp_path: Path, make_consortium: Callable[..., Path], make_raw_dataset: Callable[..., Path]
) -> None:
    template = make_consortium(tmp_path / "whole", {"A": (2, 0), "B": (2, 0)})
    roots = {seed: Path(shutil.copytree(template, tmp_path / str(seed))) for seed in (1, 2)}
    whole = tiny(template, **OPTIONS | {"quorum": 2})
    run_server(LocalGrid(real_sites(whole, 2)), whole)
    expected = fingerprint_of_results(whole)
    assert set(expected) == {"server's state", "server", "sites/A", "sites/B"}
    for seed, root in roots.items():
        config = replace(whole, root=str(root), deadline_s=0.5, prepare_deadline_s=0.5)
        story = run_through_failures(config, 2, Chance(seed, rate=0.3, most=6))
        assert len(story.kills) == 6
        assert differences(expected, fingerprint_of_results(config)) == [], story
        assert rounds_lost(config) == 0
