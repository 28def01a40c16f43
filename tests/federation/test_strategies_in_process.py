"""Strategies in whole runs of the real server and client code: resumed is as never stopped, and what is local stays local."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message

from nnunet_fedharm.errors import FederationError
from nnunet_fedharm.federation.codec import decode
from nnunet_fedharm.federation.events import read_events
from nnunet_fedharm.federation.server_app import run_server
from nnunet_fedharm.federation.server_root import LOCAL_GROUPS_FILE
from nnunet_fedharm.federation.state import find_run, load_state
from nnunet_fedharm.trainers.groups import planned_tensors_of
from tests.federation.local_grid import Client, LocalGrid
from tests.federation.test_in_process import PowerCut, cut_at, final_weights, full, real_sites, tiny

pytestmark = pytest.mark.slow

RUNS: dict[str, dict[str, Any]] = {
    "fedadam": {"strategy": "fedadam", "server_ema": 0.5},
    "scaffold": {"strategy": "scaffold"},
    "local norms and FedProx": {"local_groups": "norm", "proximal_mu": 0.1, "strategy": "fedavgm"},
}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, make_consortium: Callable[..., Path]) -> Path:
    return make_consortium(tmp_path_factory.mktemp("template"), {"A": (2, 0), "B": (3, 0)})


class Wire:
    """Clients whose messages are looked at in both directions."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def tap(self, client: Client) -> Client:
        def tapped(message: Message) -> Message | None:
            self._look(message)
            answer = client(message)
            if answer is not None and answer.has_content():
                self._look(answer)
            return answer

        return tapped

    def _look(self, message: Message) -> None:
        for record in message.content.array_records.values():
            self.names |= set(decode(record, source="somebody"))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name != "scaffold" else ()) for name in sorted(RUNS)]
)
def test_a_resumed_run_equals_one_that_was_never_stopped(name: str, tmp_path: Path, template: Path) -> None:
    wire = Wire()
    models = {}
    for kind in ("whole", "broken"):
        shutil.copytree(template, tmp_path / kind)
        config = tiny(tmp_path / kind, segmenter_rounds=2, weighting="cases", **RUNS[name])
        sites = {node: wire.tap(client) for node, client in real_sites(config, 2).items()}
        if kind == "broken":
            # A has trained the round already when the server dies: what it wrote must not count.
            with pytest.raises(PowerCut):
                run_server(LocalGrid({**sites, 101: cut_at(sites[101], ("segmenter", 1))}), config)
        results = run_server(LocalGrid(sites), config)
        folder = find_run(tmp_path / kind / "server" / "fedharm", full(config).fingerprint())
        assert folder is not None
        models[kind] = final_weights(config) | load_state(folder)[0].memory.tensors
    assert sorted(models["broken"]) == sorted(models["whole"])
    for tensor, value in models["whole"].items():
        np.testing.assert_array_equal(models["broken"][tensor], value, err_msg=tensor)
    state = load_state(folder)[0]
    if name == "fedadam":
        written = torch.load(results / "checkpoint_final.pth", weights_only=False)["network_weights"]
        average = state.memory.part("average")
        assert all(np.array_equal(written[tensor].numpy(), value) for tensor, value in average.items())
    elif name == "scaffold":
        assert state.memory.numbers == {"amounts": {"A": 2.0, "B": 3.0}, "counted": {"A": 1, "B": 1}}
        assert any(tensor.startswith("control:") for tensor in wire.names)
    else:
        check_local_norms(tmp_path / "broken", state, wire, results)


def check_local_norms(root: Path, state: Any, wire: Wire, results: Path) -> None:
    """The norms were in no message, every site has its own, and the server says that it has none."""
    arguments = (state.plans, state.dataset_json, "2d", "nnUNetTrainerFedHarmNone")
    norms = planned_tensors_of(*arguments, ["norm"])
    assert norms
    assert not norms & wire.names
    assert any(name.endswith("all_modules.0.weight") for name in wire.names), "the others were"
    models = {
        site: torch.load(next((root / "sites" / site).rglob("checkpoint_final.pth")), weights_only=False)[
            "network_weights"
        ]
        for site in "AB"
    }
    assert any(not torch.equal(models["A"][name], models["B"][name]) for name in norms)
    assert all(
        torch.equal(models["A"][name], models["B"][name])
        for name in wire.names
        if name.startswith("segmenter.") and name in models["A"]
    )
    statement = json.loads((results / LOCAL_GROUPS_FILE).read_text())
    assert statement["tensors"] == sorted(norms)
    assert "never sent or averaged" in statement["held"]
    events = read_events(root / "server" / "fedharm" / "events.jsonl")[0]
    assert [event["groups"] for event in events if event["event"] == "local_groups"] == [["norm"]]


def test_a_strategy_that_does_not_fit_the_labelled_sites_is_refused_before_planning(
    tmp_path: Path, make_consortium: Callable[..., Path]
) -> None:
    root = make_consortium(tmp_path, {"A": (2, 0), "B": (2, 0), "C": (0, 2)})
    config = tiny(root, strategy="median")
    with pytest.raises(FederationError, match=r"median needs at least 3 sites, the segmenter phase .* has 2"):
        run_server(LocalGrid(real_sites(config, 3)), config)
    assert not list(root.glob("sites/*/nnUNet_preprocessed/*"))
