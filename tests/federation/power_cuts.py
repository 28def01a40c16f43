"""Federations that lose the server, a node or both at random messages, in one process, until they end all the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Message

from nnunet_fedharm.errors import FederationError
from nnunet_fedharm.federation.config import FederateConfig
from nnunet_fedharm.federation.events import EVENTS_FILE, read_events
from nnunet_fedharm.federation.server_app import run_server
from tests.federation.local_grid import Client, LocalGrid
from tests.federation.test_in_process import PowerCut, final_weights, real_sites

FATES = ("server", "node before its work", "node after its work", "server and node")
_MOST_STARTS = 80


class Chance:
    """Decides at each message who dies; at most `most` times, so that every run ends.

    Attributes:
        hits: fates so far, in order.
        moments: when they struck, UTC.
    """

    def __init__(self, seed: int, *, rate: float, most: int) -> None:
        self._generator, self._rate, self._most = np.random.default_rng(seed), rate, most
        self.hits: list[str] = []
        self.moments: list[datetime] = []

    def draw(self, fates: tuple[str, ...]) -> str:
        """A fate, or an empty text for none."""
        if len(self.hits) >= self._most or self._generator.random() >= self._rate:
            return ""
        self.hits.append(str(self._generator.choice(fates)))
        self.moments.append(datetime.now(UTC))
        return self.hits[-1]


class FailingGrid(LocalGrid):
    """Messages of a LocalGrid at each of which something may die; a dead node comes back at once, under a new id."""

    def __init__(self, clients: dict[int, Client], chance: Chance) -> None:
        super().__init__(clients)
        self.clients = clients  # shared with the next start of the server
        self._chance = chance

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        if self._chance.draw(("server",)):
            raise PowerCut
        return super().pull_messages(message_ids)

    def _deliver(self, message: Message) -> str | None:
        fate = self._chance.draw(FATES)
        if fate == "server":
            raise PowerCut
        if not fate:
            return super()._deliver(message)
        node = message.metadata.dst_node_id
        client = self.clients[node]

        def dying(asked: Message) -> None:
            if fate != "node before its work":
                client(asked)

        self.clients[node] = dying
        name = super()._deliver(message)
        del self.clients[node]
        self.clients[max([node, *self.clients]) + 1] = client
        if fate == "server and node":
            raise PowerCut
        return name


@dataclass
class Story:
    """What a run went through.

    Attributes:
        kills: fates in order.
        starts: of the server.
        refusals: sentences of starts that stopped by themselves, as a preparation without one of its sites does.
    """

    kills: list[str] = field(default_factory=list)
    starts: int = 0
    refusals: list[str] = field(default_factory=list)


def run_through_failures(config: FederateConfig, sites: int, chance: Chance) -> Story:
    """Start a run again and again until it ends.

    Raises:
        AssertionError: it does not end.
    """
    story, clients = Story(), real_sites(config, sites)
    while story.starts < _MOST_STARTS:
        story.starts += 1
        try:
            run_server(FailingGrid(clients, chance), config)
        except PowerCut:
            continue
        except FederationError as error:
            story.refusals.append(str(error))
            continue
        story.kills = chance.hits
        return story
    raise AssertionError(f"the run did not end; refusals: {story.refusals[-3:]}")


def fingerprint_of_results(config: FederateConfig) -> dict[str, dict[str, Any]]:
    """Owner -> tensors: the server's last weights, and of every results folder the final checkpoint."""
    found: dict[str, dict[str, Any]] = {"server's state": dict(final_weights(config))}
    root = Path(config.root)
    for path in sorted(root.glob("**/fold_all/checkpoint_final.pth")):
        saved = torch.load(path, map_location="cpu", weights_only=False)
        owner = path.relative_to(root).parts[: 2 if "sites" in path.parts else 1]
        found["/".join(owner)] = {name: value.numpy() for name, value in saved["network_weights"].items()}
    return found


def differences(expected: dict[str, dict[str, Any]], found: dict[str, dict[str, Any]]) -> list[str]:
    """Tensors that are not the same bit for bit, and owners without a model."""
    wrong = [f"{owner} has no model" for owner in sorted(set(expected) ^ set(found))]
    for owner in sorted(set(expected) & set(found)):
        names = sorted(set(expected[owner]) | set(found[owner]))
        wrong += [
            f"{owner}: {name}"
            for name in names
            if name not in found[owner]
            or name not in expected[owner]
            or expected[owner][name].tobytes() != found[owner][name].tobytes()
        ]
    return wrong


def rounds_lost(config: FederateConfig) -> int:
    """Rounds that were complete and were trained once more all the same."""
    events, _ = read_events(Path(config.root) / "server" / "fedharm" / EVENTS_FILE)
    ended = Counter((event["phase"], event["round"]) for event in events if event["event"] == "round_end")
    return sum(ended.values()) - len(ended)
