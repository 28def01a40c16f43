"""A node key is tied to a site: nobody speaks under another site's name."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from nnunet_fedharm.errors import CheckpointError, FederationError
from nnunet_fedharm.federation.registered import NODES_FILE, false_name, write_registered
from tests.federation.test_rounds import Bench, ScriptedSite


def test_a_node_with_another_sites_key_is_set_aside(tmp_path: Path) -> None:
    write_registered(tmp_path, {1: "A", 2: "B", 3: "B"})
    bench = Bench(tmp_path, [ScriptedSite("A", step=1), ScriptedSite("B", step=1), ScriptedSite("C", step=1)])
    assert bench.roster.nodes == {"A": 1, "B": 2}
    (event,) = bench.events("node_set_aside")
    assert event["reason"].startswith("A node with the key of B calls itself C.")


def test_a_resumed_run_does_not_wait_for_a_site_that_was_removed(tmp_path: Path) -> None:
    nodes = [ScriptedSite("A", step=1), ScriptedSite("B", step=1), ScriptedSite("C", step=1)]
    bench = Bench(tmp_path, nodes)
    bench.run(1)
    del bench.grid.clients[2]
    write_registered(tmp_path, {1: "A", 3: "C"})
    bench.roster.nodes.clear()  # as a server that is started again knows nobody
    start = time.monotonic()
    bench.roster.wait_for_all(seconds=30.0, check_data=False, deadline_s=30.0, strict=False)
    assert time.monotonic() - start < 10
    assert (bench.roster.missing, bench.roster.awaited) == (["B"], [])
    bench.run(2)
    assert bench.state.history[1]["sites"] == ["A", "C"]


def test_where_removed_sites_would_be_needed_nobody_waits_for_them(tmp_path: Path) -> None:
    bench = Bench(tmp_path, [ScriptedSite("A", step=1), ScriptedSite("B", step=1)], deadline_s=60.0)
    del bench.grid.clients[2]
    write_registered(tmp_path, {1: "A"})
    start = time.monotonic()
    with pytest.raises(
        FederationError, match=r"needs 2 of A, B; B cannot come, not being registered any more.*--quorum"
    ):
        bench.run(1)
    assert time.monotonic() - start < 30


def test_without_a_register_a_node_is_who_it_says(tmp_path: Path) -> None:
    assert false_name(tmp_path, 7, "A") == ""
    write_registered(tmp_path, {7: "A"})
    assert false_name(tmp_path, 7, "A") == ""
    assert "not registered any more" in false_name(tmp_path, 8, "A")
    (tmp_path / NODES_FILE).write_text("{}")
    with pytest.raises(CheckpointError):
        false_name(tmp_path, 7, "A")
