"""A node key is tied to a site: nobody speaks under another site's name."""

from __future__ import annotations

from pathlib import Path

import pytest

from nnunet_fedharm.errors import CheckpointError
from nnunet_fedharm.federation.registered import NODES_FILE, false_name, write_registered
from tests.federation.test_rounds import Bench, ScriptedSite


def test_a_node_with_another_sites_key_is_set_aside(tmp_path: Path) -> None:
    write_registered(tmp_path, {1: "A", 2: "B", 3: "B"})
    bench = Bench(tmp_path, [ScriptedSite("A", step=1), ScriptedSite("B", step=1), ScriptedSite("C", step=1)])
    assert bench.roster.nodes == {"A": 1, "B": 2}
    (event,) = bench.events("node_set_aside")
    assert event["reason"].startswith("A node with the key of B calls itself C.")


def test_without_a_register_a_node_is_who_it_says(tmp_path: Path) -> None:
    assert false_name(tmp_path, 7, "A") == ""
    write_registered(tmp_path, {7: "A"})
    assert false_name(tmp_path, 7, "A") == ""
    assert "not registered any more" in false_name(tmp_path, 8, "A")
    (tmp_path / NODES_FILE).write_text("{}")
    with pytest.raises(CheckpointError):
        false_name(tmp_path, 7, "A")
