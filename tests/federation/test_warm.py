"""The warm worker: the same answers as from a fresh process, whatever happens to it in between."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from nnunet_fedharm.errors import FederationError
from nnunet_fedharm.federation import answers, client_app
from nnunet_fedharm.federation.codec import encode
from nnunet_fedharm.federation.durable import file_lock
from nnunet_fedharm.federation.messages import PREFLIGHT, TRAIN_REPLY, SiteFailure, pack, unpack_reply
from nnunet_fedharm.federation.messages import PREFLIGHT_REPLY as PREFLIGHT_ANSWER
from nnunet_fedharm.federation.server_app import run_server
from nnunet_fedharm.federation.site import Site, locate_site
from nnunet_fedharm.federation.warm import client
from nnunet_fedharm.federation.warm.client import FOLDER, WARM_MINUTES, ask, warm_minutes
from nnunet_fedharm.federation.warm.process import Watch, born, hung_up, serve
from nnunet_fedharm.federation.warm.wire import Closed, receive, send
from tests.federation.local_grid import Client, LocalGrid
from tests.federation.test_in_process import real_sites, tiny

HEAVY = ("torch", "nnunetv2", "scipy", "sklearn", "pandas", "matplotlib")
QUESTION = {"run_id": "0" * 12 + "-" + "0" * 6, "dataset": "1", "check_data": False}


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


@pytest.fixture
def parent() -> Iterator[subprocess.Popen[bytes]]:
    """A process that stands for the SuperNode: workers end with it."""
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def test_flowers_process_for_a_message_imports_nothing_heavy() -> None:
    code = f"import sys, nnunet_fedharm.federation.client_app; print([m for m in {HEAVY} if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_every_query_that_can_be_answered_is_registered() -> None:
    assert set(answers.HANDLERS) == {"train", "train.secure", *(f"query.{name}" for name in client_app.QUERIES)}


def test_only_a_deployed_site_has_a_worker() -> None:
    assert warm_minutes({"partition-id": 0, "num-partitions": 2}) == 0
    assert warm_minutes({"site": "A", "site-root": "/data"}) == WARM_MINUTES
    assert warm_minutes({"site": "A", "site-root": "/data", "warm-minutes": 0}) == 0


def test_a_parcel_arrives_as_it_was(pair: tuple[socket.socket, socket.socket]) -> None:
    weights = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros((0,), np.int64), "c": np.array(True)}
    content = RecordDict(
        {
            "config": ConfigRecord({"n": 1, "x": 1.0, "yes": True, "text": "é", "raw": b"\x00\xff", "list": [1, 2]}),
            "metrics": MetricRecord({"dice": 0.5}),
            "weights": encode(weights, fp16=True),
            "empty": ArrayRecord(),
        }
    )
    sender = threading.Thread(target=send, args=(pair[0], {"kind": "train", "run_config": {"lr": 1.0}}, content))
    sender.start()
    head, found = receive(pair[1])
    sender.join()
    assert head == {"kind": "train", "run_config": {"lr": 1.0}}
    assert type(head["run_config"]["lr"]) is float
    assert dict(found) == dict(content)
    assert type(found.config_records["config"]["n"]) is int


def test_half_a_parcel_is_an_end_and_anything_else_is_refused(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[0].sendall(b"fdh1" + (100).to_bytes(8, "big") + b"{")
    pair[0].shutdown(socket.SHUT_WR)
    with pytest.raises(Closed):
        receive(pair[1])
    one, other = socket.socketpair()
    with one, other:
        one.sendall(b"GET / HTTP/1.1\r\n")
        with pytest.raises(FederationError, match="not a message of this release"):
            receive(other)


def listening(folder: Path) -> tuple[socket.socket, str]:
    folder.mkdir(parents=True)
    return client._listener(folder, "1")


def test_an_idle_worker_ends(tmp_path: Path) -> None:
    listener, _ = listening(tmp_path / "worker")
    with listener:
        assert serve([listener], Watch(os.getpid()), minutes=0.001) == "idle for 0.001 minutes"


def test_a_worker_of_another_run_is_dismissed(tmp_path: Path) -> None:
    listener, address = listening(tmp_path / "worker")
    reasons: list[str] = []
    thread = threading.Thread(target=lambda: reasons.append(serve([listener], Watch(os.getpid()), minutes=1)))
    with listener:
        thread.start()
        record = tmp_path / "worker" / "1.json"
        record.write_text(f'{{"address": "{address}"}}')
        client._dismiss(record)
        thread.join(20)
    assert reasons == ["another run began"]


def test_a_socket_is_the_users_own_and_a_long_path_is_no_obstacle(tmp_path: Path) -> None:
    short, address = listening(tmp_path / "w")
    long, elsewhere = listening(tmp_path / ("x" * 120))
    with short, long:
        assert Path(address).stat().st_mode & 0o777 == 0o600
        assert len(elsewhere) < 100
        assert Path(elsewhere).parent.stat().st_mode & 0o777 == 0o700
    shutil.rmtree(Path(elsewhere).parent)


def test_a_closed_end_and_a_gone_process_are_noticed(parent: subprocess.Popen[bytes]) -> None:
    one, other = socket.socketpair()
    with one:
        assert not hung_up(one)
        other.close()
        assert hung_up(one)
    before = born(parent.pid)
    assert before == born(parent.pid) != ""
    parent.kill()
    parent.wait()
    assert born(parent.pid) == ""


def recorded(nodes: dict[int, Client], site: Path, copies: Path) -> tuple[dict[int, Client], list[Message]]:
    """Clients that keep every training request to the first node, and a copy of its site before each."""
    asked: list[Message] = []
    first, inner = next(iter(nodes.items()))

    def keeping(message: Message) -> Message | None:
        if message.metadata.message_type == "train":
            shutil.copytree(site, copies / str(len(asked)))
            asked.append(message)
        return inner(message)

    return {**nodes, first: keeping}, asked


def put_back(site: Path, copy: Path) -> None:
    shutil.rmtree(site)
    shutil.copytree(copy, site)


def worker_pid(site: Site, run_id: int) -> int:
    return int(json.loads((site.folder / FOLDER / f"{run_id}.json").read_text())["pid"])


def told(content: RecordDict) -> dict[str, Any]:
    """What a training reply says, apart from how long it took."""
    found = unpack_reply(TRAIN_REPLY, content, source="A")
    metrics = {name: value for name, value in found.values["metrics"].items() if name != "seconds"}
    arrays = {name: (array.dtype, array.shape, array.data) for name, array in found.weights.items()}
    return {**found.values, "seconds": 0, "metrics": metrics, "arrays": arrays}


def gone(pid: int, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while born(pid) and time.monotonic() < end:
        time.sleep(0.1)
    return not born(pid)


@pytest.mark.slow
def test_a_warm_round_is_a_cold_round_and_a_dead_worker_is_one_error(
    tmp_path: Path, make_consortium: Callable[..., Path], parent: subprocess.Popen[bytes]
) -> None:
    root = make_consortium(tmp_path / "c", {"A": (2, 0)})
    config = tiny(root, harmonizer="curve", harmonizer_rounds=1, phases="finetune", iterations_per_epoch=2)
    folder = root / "sites" / "A"
    nodes, asked = recorded(real_sites(config, 1), folder, tmp_path / "copies")
    run_server(LocalGrid(nodes), config)

    configs: Any = ({"site": "A", "site-root": str(folder)}, config.to_run_config())
    site = locate_site(*configs)

    def reply(run_id: int, number: int) -> RecordDict:
        return ask(site, "train", asked[number].content, configs, run_id=run_id, minutes=1, parent=parent.pid)

    put_back(folder, tmp_path / "copies" / "0")
    warm = [told(reply(7, number)) for number in range(3)]
    first = worker_pid(site, 7)
    assert warm[1]["arrays"] != warm[2]["arrays"]

    question = pack(PREFLIGHT, QUESTION)
    with file_lock(site.folder / "site.lock"):  # the worker stands at the lock when it dies
        threading.Timer(1.0, os.kill, (first, signal.SIGKILL)).start()
        content = ask(site, "query.preflight", question, configs, run_id=7, minutes=1, parent=parent.pid)
    with pytest.raises(SiteFailure, match="Site A: its worker ended in the middle of the work"):
        unpack_reply(PREFLIGHT_ANSWER, content, source="A")
    put_back(folder, tmp_path / "copies" / "2")
    assert told(reply(7, 2)) == warm[2], "a fresh worker answers what the former one answered"
    second = worker_pid(site, 7)
    assert second != first
    assert (site.folder / FOLDER).stat().st_mode & 0o777 == 0o700
    parent.kill()
    parent.wait()
    assert gone(second), "a worker ends with its SuperNode"


def test_a_parent_that_is_hidden_from_the_worker_is_still_there(tmp_path: Path) -> None:
    """`ProtectProc=invisible` of a systemd unit hides Flower's helper, which forbids others to look into it."""
    process = subprocess.Popen(["sleep", "60"])
    assert born(process.pid)
    assert born(process.pid, tmp_path) == "there"
    process.kill()
    process.wait()
    assert born(process.pid) == born(process.pid, tmp_path) == ""
