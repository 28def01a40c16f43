"""Replies on disk: the same numbers as in memory, whatever the strategy, and memory that does not grow with the sites."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nnunet_fedharm.errors import CheckpointError
from nnunet_fedharm.federation import robust
from nnunet_fedharm.federation.aggregation import SiteUpdate
from nnunet_fedharm.federation.codec import Weights
from nnunet_fedharm.federation.ownership import Ownership
from nnunet_fedharm.federation.robust import pieces, update_norms
from nnunet_fedharm.federation.spool import Spool, spooled
from nnunet_fedharm.federation.state import Memory
from nnunet_fedharm.federation.strategy import STRATEGIES, NextModel, Strategy, next_model

OWNERSHIP = Ownership(
    bank=("s0", "s1", "s2", "s3", "s4"),
    rows=frozenset({"rows"}),
    reference_only=frozenset({"judge"}),
    reference_sites=frozenset({"s1"}),
)


def model(seed: int) -> Weights:
    rng = np.random.default_rng(seed)
    return {
        "w": rng.normal(size=(7, 3, 5)).astype(np.float32),
        "scalar": np.array(rng.normal(), np.float32),
        "judge": rng.normal(size=4).astype(np.float32),
        "rows": rng.normal(size=(5, 2)).astype(np.float32),
        "count": rng.integers(0, 9, size=3),
        "flag": np.array([seed % 2 == 0]),
        "empty": np.zeros((0, 2), np.float32),
        "bytes": rng.integers(0, 255, size=6, dtype=np.uint8),
    }


def replies(seed: int, names: tuple[str, ...] = OWNERSHIP.bank) -> dict[str, SiteUpdate]:
    rng = np.random.default_rng(seed)
    return {
        site: SiteUpdate(
            OWNERSHIP.contribution(site, model(seed + index)),
            n_steps=3 + index,
            n_cases=4,
            metrics={"dice": 0.5},
            control={"w": rng.normal(size=(7, 3, 5)).astype(np.float32)},
        )
        for index, site in enumerate(names)
    }


def two_rounds(name: str, spools: tuple[Spool, ...] = ()) -> NextModel:
    """Two rounds of a strategy from replies in memory, or from disk in the opposite order of arrival."""
    strategy = Strategy(name=name, lr=0.5, average=0.9)
    former, memory = model(99), Memory()
    for number in range(2):
        updates: Mapping[str, SiteUpdate] = replies(10 * number)
        if spools:
            updates = {site: spools[number].keep(site, updates[site]) for site in reversed(updates)}
        made = next_model(
            strategy,
            former,
            updates,
            OWNERSHIP,
            memory,
            phase="segmenter",
            number=number,
            weighting="steps",
            batch_size=2,
        )
        former, memory = made.weights, made.memory
    return made


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_makes_the_same_model_from_disk(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = two_rounds(name)
    monkeypatch.setattr(robust, "PIECE", 55)  # cuts w into pieces
    with spooled(tmp_path / "a") as one, spooled(tmp_path / "b") as two:
        found = two_rounds(name, (one, two))
    assert found.share == expected.share
    assert found.left_out == expected.left_out
    for part, wanted in (
        (found.weights, expected.weights),
        (found.memory.tensors, expected.memory.tensors),
    ):
        assert sorted(part) == sorted(wanted)
        for key, value in wanted.items():
            np.testing.assert_array_equal(part[key], value, err_msg=key)
            assert part[key].dtype == value.dtype
    assert not (tmp_path / "a").exists()


def test_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    update = replies(3)["s1"]
    with spooled(tmp_path / "spool") as spool:
        kept = spool.keep("s1", update)
        for found, wanted in ((kept.weights, update.weights), (kept.control, update.control)):
            assert list(found) == sorted(wanted)
            for name, value in wanted.items():
                np.testing.assert_array_equal(found[name], value)
                assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert "w" in kept.weights
        assert "control:w" not in kept.weights
        assert update_norms({"s1": kept.weights}, model(0), ["w"]) == update_norms(
            {"s1": update.weights}, model(0), ["w"]
        )


@pytest.mark.parametrize(("size", "sites"), [(0, 3), (1, 100), (105, 5), (10**7, 100), (4_194_305, 1)])
def test_pieces_cover_a_tensor_once_and_are_never_a_single_number_of_many(size: int, sites: int) -> None:
    found = pieces(size, sites)
    assert [found[0][0], found[-1][1]] == [0, size]
    assert all(one[1] == two[0] for one, two in pairwise(found))
    assert max(stop - start for start, stop in found) <= math.ceil(robust.PIECE / sites)
    assert size < 2 or min(stop - start for start, stop in found) > 1


def test_a_killed_servers_replies_are_not_mixed_with_new_ones(tmp_path: Path) -> None:
    (tmp_path / "spool").mkdir()
    (tmp_path / "spool" / "old.safetensors").write_bytes(b"half")
    with spooled(tmp_path / "spool"):
        assert list((tmp_path / "spool").iterdir()) == []


def test_a_full_disk_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="Cannot keep the reply of s1"):
        Spool(tmp_path / "gone").keep("s1", replies(0)["s1"])


def peak(name: str, folder: Path, n_sites: int) -> int:
    """Bytes that a round of n sites needs at most beyond one model."""
    size = 2**17
    former = {f"w{index}": np.zeros(size, np.float32) for index in range(3)}
    strategy = Strategy(name=name, byzantine=1)
    with spooled(folder) as spool:
        updates = {}
        for index in range(n_sites):
            values = {key: np.full(size, index, np.float32) for key in former}
            updates[f"s{index:03d}"] = spool.keep(f"s{index:03d}", SiteUpdate(values, 1, 1, {}))
        tracemalloc.start()
        options: Any = {"phase": "segmenter", "number": 0, "weighting": "steps", "batch_size": 1}
        next_model(strategy, former, updates, Ownership(), Memory(), **options)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return most


@pytest.mark.parametrize("name", ["fedavg", "fedadam", "median", "multi-krum"])
def test_memory_does_not_grow_with_the_number_of_sites(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(robust, "PIECE", 2**14)
    few, many = (peak(name, tmp_path / "spool", count) for count in (5, 20))
    assert many < 1.1 * few + 2**18
