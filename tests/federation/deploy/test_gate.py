"""The SuperLink's gate: what other machines may ask for, who is the operator, how large a request may be."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from typing import Any

import pytest
from flwr.common.constant import ACCESS_TOKEN_KEY
from sqlalchemy import text
from starlette.testclient import TestClient

from nnunet_fedharm.federation.deploy.server_folder import ServerFolder
from nnunet_fedharm.federation.deploy.superlink import DATABASE_WAIT_S, MOST_BYTES, Gate, OperatorAccess, make_app

OUTSIDE, SERVER = ("192.0.2.7", 50000), ("192.0.2.1", 9092)
PATHS = (
    "/v1/control/start-run",
    "/v1/control/register-node",
    "/v1/runtime/acquire-task",
    "/docs",
    "/openapi.json",
    "/",
)


def ask(path: str, client: Any, *, body: bytes = b"", headers: tuple[tuple[bytes, bytes], ...] = ()) -> tuple[int, int]:
    """Status, and how many bytes the application behind the gate has read."""
    read = 0
    status = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        nonlocal read
        while (message := await receive())["type"] == "http.request":
            read += len(message["body"])
            if not message["more_body"]:
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})

    pieces = [body[start : start + 2**20] for start in range(0, len(body), 2**20)] or [b""]
    waiting = [{"type": "http.request", "body": piece, "more_body": piece is not pieces[-1]} for piece in pieces]

    async def receive() -> Any:
        return waiting.pop(0)

    async def send(message: Any) -> None:
        status.append(message.get("status"))

    scope = {
        "type": "http",
        "path": path,
        "client": client,
        "server": SERVER,
        "headers": list(headers),
        "method": "POST",
    }
    asyncio.run(Gate(inner)(scope, receive, send))
    return status[0], read


@pytest.mark.parametrize("path", PATHS)
def test_other_machines_find_only_the_sites_door(path: str) -> None:
    assert ask(path, OUTSIDE)[0] == 404
    assert ask(path, None)[0] == 404
    assert ask(path, ("127.0.0.1", 1))[0] == 200
    assert ask(path, ("::1", 1))[0] == 200
    assert ask(path, (SERVER[0], 1))[0] == 200, "the server's own processes, where it listens on one address only"


@pytest.mark.parametrize("path", ["/v1/fleet/pull-messages", "/v1/fleet/push-object", "/health"])
def test_the_sites_door_is_open(path: str) -> None:
    assert ask(path, OUTSIDE)[0] == 200


def test_a_path_that_only_begins_in_the_same_way_is_not_open() -> None:
    assert ask("/v1/fleet", OUTSIDE)[0] == 404
    assert ask("/v1/fleetx/start", OUTSIDE)[0] == 404


def test_a_request_is_bounded_whether_it_states_its_length_or_not() -> None:
    path = "/v1/fleet/push-object"
    stated = ((b"content-length", str(MOST_BYTES + 1).encode()),)
    assert ask(path, OUTSIDE, headers=stated)[0] == 413
    assert ask(path, OUTSIDE, headers=((b"content-length", b"-1"),))[0] == 413
    assert ask(path, OUTSIDE, body=b"x" * 100) == (200, 100)
    assert ask(path, OUTSIDE, body=bytes(MOST_BYTES + 2**20))[1] <= MOST_BYTES


def test_the_operator_is_known_by_the_token() -> None:
    access = OperatorAccess("secret")
    assert access.validate_tokens_in_metadata([(ACCESS_TOKEN_KEY, "secret")])[0]
    for wrong in ([], [(ACCESS_TOKEN_KEY, "")], [(ACCESS_TOKEN_KEY, "Secret")], [("other", "secret")]):
        assert access.validate_tokens_in_metadata(wrong) == (False, None)


def test_flowers_own_app_asks_for_token_secret_and_node_key(server: ServerFolder) -> None:
    client = TestClient(make_app(server), client=("127.0.0.1", 5))
    protobuf = {"content-type": "application/protobuf", "accept": "application/protobuf"}
    for path in ("list-nodes", "start-run", "register-node", "stop-run"):
        assert client.post(f"/v1/control/{path}", headers=protobuf).status_code == 401
        wrong = {**protobuf, "authorization": "Bearer wrong"}
        assert client.post(f"/v1/control/{path}", headers=wrong).status_code == 401
    right = {**protobuf, "authorization": f"Bearer {server.operator_token.read_text()}"}
    assert client.post("/v1/control/list-nodes", headers=right).status_code == 200
    assert client.post("/v1/runtime/acquire-task", headers=protobuf).status_code in (401, 403), "the secret is missing"
    for path in ("pull-messages", "push-messages", "get-run", "get-fab", "register-node", "activate-node"):
        assert client.post(f"/v1/fleet/{path}", headers=protobuf).status_code == 401, path


def test_a_request_waits_for_a_busy_database_longer_than_flower_would(server: ServerFolder) -> None:
    """Flower's own 5 s are over soon on a busy machine, and a single refusal ends its helper and with it the server."""
    state = make_app(server).state.linkstate_factory.state()
    for _ in range(2):
        with state.session() as session:
            assert session.execute(text("PRAGMA busy_timeout")).scalar_one() == 1000 * DATABASE_WAIT_S
    other = sqlite3.connect(server.database, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    freed = threading.Timer(6.0, other.rollback)
    freed.start()
    try:
        assert state.reserve_nonce("test", "a", time.time() + 60)
    finally:
        freed.join()
        other.close()
