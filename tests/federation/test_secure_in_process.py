"""Whole runs with secure aggregation: the weights of a run without it within the bound, and the real Flower once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from nnunet_fedharm.errors import FederationError
from nnunet_fedharm.federation.codec import decode
from nnunet_fedharm.federation.events import read_events
from nnunet_fedharm.federation.launch import federate
from nnunet_fedharm.federation.server_app import run_server
from nnunet_fedharm.privacy.ledger import Ledger
from tests.federation.local_grid import Client, LocalGrid
from tests.federation.test_in_process import final_weights, real_sites, tiny

pytestmark = pytest.mark.slow

SECURE: dict[str, Any] = {
    "secure_aggregation": "all",
    "harmonizer": "curve",
    "harmonizer_rounds": 1,
    "phases": "finetune",
}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, make_consortium: Callable[..., Path]) -> Path:
    return make_consortium(tmp_path_factory.mktemp("template"), {"A": (2, 0), "B": (3, 0), "C": (2, 0), "D": (2, 1)})


@pytest.fixture
def consortium(tmp_path: Path, template: Path) -> Path:
    shutil.copytree(template, tmp_path / "consortium")
    return tmp_path / "consortium"


def watched(clients: dict[int, Client], seen: list[Message]) -> dict[int, Client]:
    """The clients, and everything that they answer."""

    def watch(client: Client) -> Client:
        def watching(message: Message) -> Message | None:
            answer = client(message)
            if answer is not None:
                seen.append(answer)
            return answer

        return watching

    return {node: watch(client) for node, client in clients.items()}


def test_a_secure_run_ends_with_the_weights_of_a_plain_run_and_sends_no_update(
    consortium: Path, tmp_path: Path
) -> None:
    shutil.copytree(consortium, tmp_path / "other")
    plain = tiny(consortium, **SECURE | {"secure_aggregation": "off"})
    run_server(LocalGrid(real_sites(plain, 4)), plain)
    secure = tiny(tmp_path / "other", **SECURE)
    seen: list[Message] = []
    run_server(LocalGrid(watched(real_sites(secure, 4), seen)), secure)
    wanted, found = final_weights(plain), final_weights(secure)
    assert sorted(found) == sorted(wanted)
    # Three rounds of rounding at 4 / 2^39 * 4 sites, and what the steps after it make of that in float32.
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, atol=2e-5, err_msg=name)
    floats = {
        name
        for message in seen
        for record in message.content.array_records.values()
        for name, value in decode(record, source="x").items()
        if value.dtype == np.float32
    }
    assert floats <= {"harmonizer.bank_polarity", "harmonizer.bank_gate"}, "weights leave a site as masked bytes only"
    notes = {release.note for release in Ledger(tmp_path / "other" / "sites" / "A" / "fedharm").releases()}
    assert "inside a secure sum of at most 4 sites" in notes


def test_a_secure_run_goes_on_without_a_site_that_falls_silent_in_the_sum(consortium: Path) -> None:
    config = replace(tiny(consortium, secure_aggregation="segmenter", segmenter_rounds=2), deadline_s=20.0)
    sites = real_sites(config, 4)

    def silent(message: Message) -> Message | None:
        return None if message.metadata.message_type == "query.secure_mask" else sites[103](message)

    run_server(LocalGrid({**sites, 103: silent}), replace(config, deadline_s=6.0))
    rounds = [
        event
        for event in read_events(consortium / "server" / "fedharm" / "events.jsonl")[0]
        if event["event"] == "round_end"
    ]
    assert [event["sites"][:-1] for event in rounds] == [["A", "B", "C"]] * 2
    assert all(np.isfinite(value).all() for value in final_weights(config).values())


def test_two_sites_with_labels_are_refused_before_planning(
    tmp_path: Path, make_consortium: Callable[..., Path]
) -> None:
    root = make_consortium(tmp_path, {"A": (2, 0), "B": (2, 0), "C": (0, 2)})
    config = tiny(root, secure_aggregation="segmenter")
    grid = LocalGrid(real_sites(config, 3))
    with pytest.raises(FederationError, match=r"sites with labels\) has 2"):
        run_server(grid, config)
    assert {kind for kind, _ in grid.sent} == {"query.preflight"}


@pytest.mark.long
def test_a_real_simulation_opens_sums_only(consortium: Path) -> None:
    config = tiny(consortium, secure_aggregation="segmenter", segmenter_rounds=1, parallel_sites=2)
    lines: list[str] = []
    results = federate(config, show=lines.append)
    assert (results / "checkpoint_final.pth").is_file()
    events = read_events(consortium / "server" / "fedharm" / "events.jsonl")[0]
    (summed,) = [event for event in events if event["event"] == "secure_sum"]
    assert summed["sites"] == ["A", "B", "C", "D"]
    assert summed["clipped"] == 0
