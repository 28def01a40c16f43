"""The operator's door of a running SuperLink: register sites, submit the signed app, see and stop runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from flwr.common.constant import Status
from flwr.common.serde import user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fab_pb2 import Fab
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from nnunet_fedharm.errors import FederationError, SetupError
from nnunet_fedharm.federation.deploy.app_bundle import APP_ID
from nnunet_fedharm.federation.deploy.keys import key_to_flower, parse_node_key
from nnunet_fedharm.federation.deploy.server_folder import ServerFolder
from nnunet_fedharm.nnunet_root import environment

_GONE = "unregistered"


class ServerTroubleError(FederationError):
    """The SuperLink answered that it could not do its work now."""


class ServerOffError(SetupError):
    """Nobody listens where the consortium's SuperLink should be."""


class _Token:
    """Adds the operator's token to every request."""

    def __init__(self, token: str) -> None:
        self._token = token

    def intercept(self, context: Any, call_next: Any) -> Any:
        context.request.headers["Authorization"] = f"Bearer {self._token}"
        return call_next(context)


@dataclass(frozen=True)
class Node:
    """A registered site as Flower sees it: "registered", "online" or "offline"."""

    node_id: int
    site: str
    status: str
    public_key: bytes


@dataclass(frozen=True)
class Operator:
    """Speaks with the SuperLink of a consortium on this machine."""

    client: Any

    def nodes(self) -> list[Node]:
        """Sites that are registered now."""
        found = _ask(self.client.ListNodes, ListNodesRequest()).nodes_info
        nodes = [Node(node.node_id, node.name, node.status, node.public_key) for node in found]
        return [node for node in nodes if node.status != _GONE]

    def sync(self, lines: Mapping[str, str]) -> tuple[list[str], list[str]]:
        """Register every site whose key is given, unregister every other one.

        Returns:
            Names that were added and removed.
        """
        wanted = {key_to_flower(parse_node_key(line, source=f"keys/{site}.pub")): site for site, line in lines.items()}
        present = {node.public_key: node for node in self.nodes()}
        removed, added = [], []
        for key, node in present.items():
            if wanted.get(key) != node.site:
                _ask(self.client.UnregisterNode, UnregisterNodeRequest(node_id=node.node_id))
                removed.append(node.site)
        for key, site in wanted.items():
            if key not in present or present[key].site != site:
                _ask(self.client.RegisterNode, RegisterNodeRequest(public_key=key, name=site))
                added.append(site)
        return sorted(added), sorted(removed)

    def start_run(self, app_sha256: str, run_config: Mapping[str, Any]) -> int:
        """Submit the signed app that the SuperLink holds; returns Flower's number of the run."""
        request = StartRunRequest(
            fab=Fab(hash_str=app_sha256),
            app_spec=APP_ID,
            override_config=user_config_to_proto(dict(run_config)),
        )
        return int(_ask(self.client.StartRun, request).run_id)

    def active_runs(self) -> dict[int, str]:
        """Number -> when it was submitted, UTC, ISO 8601, of every run that has not ended."""
        runs = _ask(self.client.ListRuns, ListRunsRequest(limit=50)).run_dict
        return {int(key): run.pending_at for key, run in runs.items() if run.status.status != Status.FINISHED}

    def is_active(self, run_id: int) -> bool | None:
        """Whether a run has not ended; None where the SuperLink is too busy to say so now."""
        try:
            return run_id in self.active_runs()
        except (httpx.TimeoutException, ServerTroubleError):
            return None

    def stop_run(self, run_id: int) -> None:
        """End a run; what its last completed round has made stays."""
        _ask(self.client.StopRun, StopRunRequest(run_id=run_id))


@contextmanager
def operator(folder: ServerFolder) -> Iterator[Operator]:
    """The operator's connection over loopback, with the consortium's own authority.

    Raises:
        SetupError: nobody answers, or not in time, or it is another consortium's SuperLink.
    """
    # The client looks at exported proxies when it is made, and would ask them for this machine's own SuperLink.
    with environment({"NO_PROXY": "*", "no_proxy": "*"}):
        client = ControlHttpClient.from_server_address(
            server_address=local_address(folder),
            insecure=False,
            root_certificates=folder.ca_certificate.read_bytes(),
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="nnunet-fedharm"),
                _Token(folder.operator_token.read_text(encoding="utf-8").strip()),
            ],
        )
    try:
        yield Operator(client)
    except httpx.TimeoutException as error:
        raise SetupError(
            f"This consortium's server at {local_address(folder)} is there, but did not answer in time: its machine is very "
            f"busy. Try again; `nnunet-fedharm server watch {folder.path}` shows whether a run goes on."
        ) from error
    except httpx.TransportError as error:
        raise ServerOffError(
            f"This consortium's server does not answer at {local_address(folder)}. Start it: "
            f"`nnunet-fedharm server start {folder.path}`."
        ) from error
    finally:
        client.close()


def local_address(folder: ServerFolder) -> str:
    """Where this machine's own processes reach the SuperLink."""
    settings = folder.settings()
    host = settings["host"]
    if host in ("0.0.0.0", "::", ""):
        host = "127.0.0.1" if host != "::" else "[::1]"
    return f"{host}:{settings['port']}"


def _ask(call: Any, request: Any) -> Any:
    try:
        return call(request)
    except httpx.HTTPStatusError as error:
        if error.response.status_code == httpx.codes.UNAUTHORIZED:
            raise SetupError(
                "The SuperLink does not take this folder's operator token. Is it another consortium's server?"
            ) from error
        kind = ServerTroubleError if error.response.is_server_error else FederationError
        raise kind(f"The SuperLink refused: {error.response.text[:300]}.") from error
