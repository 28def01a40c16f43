"""The SuperLink of a consortium: Flower's own, behind a gate.

Run as `python -m nnunet_fedharm.federation.deploy.superlink FOLDER`. Flower 1.41 serves three doors on one port: for sites
(Fleet), for the operator (Control: submit and stop runs, register nodes) and for its own processes (Runtime). Its command line
can protect the first one only: whoever reaches the port may use the others. Here

- from other machines only the sites' door is open, where node keys are asked for;
- the operator's door wants the operator's token;
- the processes' door gives work only to whom knows the secret of this machine;
- a request's body is bounded.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvicorn
from flwr.common.constant import (
    ACCESS_TOKEN_KEY,
    ISOLATION_MODE_PROCESS,
    NOOP_ACCOUNT_NAME,
    NOOP_FLWR_AID,
    TRANSPORT_TYPE_GRPC_RERE,
)
from flwr.supercore.auth.typing import AccountInfo
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.http_logging import get_uvicorn_log_config
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.main import create_app
from sqlalchemy import event
from sqlalchemy.pool import Pool
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nnunet_fedharm.errors import FedHarmError
from nnunet_fedharm.federation.deploy import app_bundle
from nnunet_fedharm.federation.deploy.server_folder import ServerFolder

DATABASE_WAIT_S = 120
"""How long a request waits for the database. Flower gives up after 5 s, and then its helper and the sites' SuperNodes end: on a
machine that is busy for a while the whole consortium would be down.
"""
MOST_BYTES = 64 * 2**20
"""Bound on one request: Flower cuts arrays into pieces of 5 MiB."""
FROM_OUTSIDE = ("/v1/fleet/", "/health")


class Gate:
    """Only what sites need is there for other machines, and no request is larger than `MOST_BYTES`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        if not self.is_open(scope):
            await PlainTextResponse("Not here.", status_code=404)(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > MOST_BYTES:
            await PlainTextResponse("Too large.", status_code=413)(scope, receive, send)
            return
        await self.app(scope, _bounded(receive), send)

    @staticmethod
    def is_open(scope: Scope) -> bool:
        """Whether this client may ask for this path."""
        return str(scope["path"]).startswith(FROM_OUTSIDE) or _same_machine(scope)


def _same_machine(scope: Scope) -> bool:
    client, server = (str((scope.get(end) or ("",))[0]) for end in ("client", "server"))
    try:
        return bool(client) and (client == server or ipaddress.ip_address(client).is_loopback)
    except ValueError:
        return False


def _bounded(receive: Receive) -> Receive:
    """A request without a stated length is cut where it is too long; the application then finds it damaged."""
    total = 0

    async def bounded() -> Message:
        nonlocal total
        message = await receive()
        total += len(message.get("body", b""))
        if total > MOST_BYTES:
            return {"type": "http.disconnect"}
        return message

    return bounded


class OperatorAccess(NoOpControlAuthnPlugin):
    """The operator's door: one account, known by its token."""

    def __init__(self, token: str) -> None:
        super().__init__()
        self._token = token

    def validate_tokens_in_metadata(self, metadata: Sequence[tuple[str, str | bytes]]) -> tuple[bool, Any]:
        """Whether the request carries the operator's token."""
        given = dict(metadata).get(ACCESS_TOKEN_KEY, "")
        text = given if isinstance(given, str) else given.decode(errors="replace")
        if not hmac.compare_digest(text.encode(), self._token.encode()):
            return False, None
        return True, AccountInfo(flwr_aid=NOOP_FLWR_AID, account_name=NOOP_ACCOUNT_NAME)

    def refresh_tokens(self, metadata: Sequence[tuple[str, str | bytes]]) -> tuple[Any, Any]:
        """There is nothing to refresh."""
        return None, None


def wait_for_database(connection: Any, *_: Any) -> None:
    """Let a connection wait its turn, instead of what Flower has set when it was made."""
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {DATABASE_WAIT_S * 1000}")
    cursor.close()


def make_app(folder: ServerFolder) -> Any:
    """Flower's SuperLink for a consortium, with the signed app in its store.

    Raises:
        SetupError: the folder is not whole, or the app is not signed.
    """
    if not event.contains(Pool, "checkout", wait_for_database):
        event.listen(Pool, "checkout", wait_for_database)
    consortium, settings = folder.consortium(), folder.settings()
    app_content = folder.app.read_bytes()
    signature = json.loads(folder.signature.read_text(encoding="utf-8"))
    app_bundle.check_signature(app_content, signature, consortium.signing_key)
    config = SuperLinkLifespanConfig(
        control_address="",
        health_server_address=None,
        host=settings["host"],
        port=settings["port"],
        insecure=False,
        certificates=tuple(
            path.read_bytes() for path in (folder.ca_certificate, folder.certificate, folder.certificate_key)
        ),
        superexec_auth_secret=folder.superexec_secret.read_bytes(),
        authn_plugin=OperatorAccess(folder.operator_token.read_text(encoding="utf-8").strip()),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=True,
        fleet_api_type=TRANSPORT_TYPE_GRPC_RERE,
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=str(folder.ca_certificate),
        ssl_certfile=str(folder.certificate),
        ssl_keyfile=str(folder.certificate_key),
        database=str(folder.database),
        isolation=ISOLATION_MODE_PROCESS,
        runtime_dependency_install=False,
    )
    app = create_app(config, SuperLinkLifespan)
    app.state.linkstate_factory.state().store_app(
        fab=Fab(
            app_bundle.app_hash(app_content),
            app_content,
            app_bundle.verifications(signature, consortium.signing_key),
        ),
        federation_id=NOOP_FEDERATION_ID,
        app_id=app_bundle.APP_ID,
        app_type=TaskType.SERVER_APP,
        added_by=NOOP_FLWR_AID,
    )
    app.add_middleware(Gate)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until a signal comes."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    folder = ServerFolder(Path(words[0]))
    try:
        app = make_app(folder)
        settings = folder.settings()
    except (FedHarmError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    uvicorn.run(
        app,
        **settings,
        ssl_certfile=str(folder.certificate),
        ssl_keyfile=str(folder.certificate_key),
        workers=1,
        access_log=False,
        log_config=get_uvicorn_log_config(20),
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=10,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
