"""A warm worker's memory: what a round needs is given back, and nothing of it stays for the next one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message, RecordDict

from nnunet_fedharm.federation.messages import PREFLIGHT, pack
from nnunet_fedharm.federation.server_app import run_server
from nnunet_fedharm.federation.site import locate_site
from nnunet_fedharm.federation.warm.client import FOLDER, ask
from tests.federation.local_grid import LocalGrid
from tests.federation.test_in_process import final_weights, tiny
from tests.federation.test_warm import QUESTION

pytestmark = [pytest.mark.long, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]

RUN, ROUNDS = 7, 8
MIB = 2**20


def memory(pid: int) -> dict[str, float]:
    """MiB that a process has now, and has had at most since it was asked last."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = {name: int(value) / 1024 for name, value in re.findall(r"(VmRSS|VmHWM):\s+(\d+) kB", status)}
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # the maximum begins anew
    return {"now": found["VmRSS"], "most": found["VmHWM"]}


def test_a_worker_gives_back_what_a_round_took_and_does_not_grow(
    tmp_path: Path, make_consortium: Callable[..., Path]
) -> None:
    root = make_consortium(tmp_path, {"A": (2, 0)})
    # A network of some size, so that one copy of it that stays is seen.
    config = tiny(root, segmenter_rounds=ROUNDS, base_features=128, max_features=512)
    configs: Any = ({"site": "A", "site-root": str(root / "sites" / "A")}, config.to_run_config())
    site = locate_site(*configs)
    most, after = [], []
    with subprocess.Popen(["sleep", "600"]) as parent:

        def asked(kind: str, content: RecordDict) -> RecordDict:
            return ask(site, kind, content, configs, run_id=RUN, minutes=1, parent=parent.pid)

        def by_worker(message: Message) -> Message:
            kind = message.metadata.message_type
            content = asked(kind, message.content)
            if kind == "train":
                pid = int(json.loads((site.folder / FOLDER / f"{RUN}.json").read_text())["pid"])
                most.append(memory(pid)["most"])
                # It gives back what a message took before it takes the next one.
                asked("query.preflight", pack(PREFLIGHT, QUESTION))
                after.append(memory(pid)["now"])
            return Message(content, reply_to=message)

        try:
            run_server(LocalGrid({100: by_worker}), config)
        finally:
            parent.kill()
    network = sum(value.nbytes for value in final_weights(config).values()) / MIB
    print(f"network {network:.0f} MiB; after each round {after}; at most {most}")
    assert len(after) == ROUNDS
    assert network > 16
    assert max(after[2:]) - after[1] < network / 2, f"what stays of each round adds up: {after}"
    given_back = [high - low for high, low in zip(most, after, strict=True)]
    assert min(given_back) > 2 * network, f"as it came, as it is trained, as it goes: {given_back}"
