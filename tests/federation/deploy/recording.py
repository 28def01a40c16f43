"""Two listeners on the wire between sites and server: one sees what a network sees, one what the server sees."""

from __future__ import annotations

import select
import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Message
from flwr.proto.fleet_pb2 import PushMessagesRequest, PushMessagesResponse
from flwr.proto.message_pb2 import PullObjectRequest, PullObjectResponse, PushObjectRequest
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents


@dataclass
class Proxy:
    """Passes a TCP connection on and keeps what went by; with a certificate it ends TLS and begins it anew.

    Attributes:
        target: port on loopback that is passed on to.
        tls: certificate, its key, and the authority of the target; None passes bytes on as they are.
        sent, received: bytes of each connection from the client and to it.
    """

    target: int
    tls: tuple[Path, Path, Path] | None = None
    sent: list[bytearray] = field(default_factory=list)
    received: list[bytearray] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._open = True
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._open = False
        self._listener.close()

    def _accept(self) -> None:
        while self._open:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: Any) -> None:
        server: Any = None
        try:
            server = socket.create_connection(("127.0.0.1", self.target))
            if self.tls is not None:
                certificate, key, authority = self.tls
                inside = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                inside.load_cert_chain(certificate, key)
                client = inside.wrap_socket(client, server_side=True)
                outside = ssl.create_default_context(cafile=str(authority))
                server = outside.wrap_socket(server, server_hostname="localhost")
            both = (bytearray(), bytearray())
            self.sent.append(both[0])
            self.received.append(both[1])
            self._pass_on(client, server, both)
        except OSError:
            pass  # either side may leave at any time
        finally:
            for end in (client, server):
                if end is not None:
                    end.close()

    def _pass_on(self, client: Any, server: Any, kept: tuple[bytearray, bytearray]) -> None:
        while self._open:
            waiting = [end for end in (client, server) if isinstance(end, ssl.SSLSocket) and end.pending()]
            ready = waiting or select.select([client, server], [], [], 1.0)[0]
            for end in ready:
                data = _read(end)
                if data is None:
                    continue
                if not data:
                    return
                other, whose = (server, 0) if end is client else (client, 1)
                kept[whose].extend(data)
                other.sendall(data)


def _read(end: Any) -> bytes | None:
    """What is there; None where only TLS's own words were (session tickets), for which a blocking read would wait for ever."""
    end.settimeout(0)
    try:
        return bytes(end.recv(65536))
    except (ssl.SSLWantReadError, BlockingIOError):
        return None
    finally:
        end.settimeout(None)


def http_parts(stream: bytes) -> Iterator[tuple[str, bytes]]:
    """First line and body of each HTTP/1.1 request or response of a connection."""
    position = 0
    while (end := stream.find(b"\r\n\r\n", position)) >= 0:
        head = stream[position:end].decode("latin-1").split("\r\n")
        fields = {name.lower(): value.strip() for name, value in (line.split(":", 1) for line in head[1:])}
        assert "transfer-encoding" not in fields, "Flower states the length of what it sends"
        length = int(fields.get("content-length", 0))
        yield head[0], stream[end + 4 : end + 4 + length]
        position = end + 4 + length


def messages_from_sites(proxy: Proxy) -> list[Message]:
    """Every message that sites pushed, whole, whatever pieces it travelled in."""
    objects: dict[str, bytes] = {}
    trees = []
    for sent, received in zip(proxy.sent, proxy.received, strict=True):
        answers = [body for _, body in http_parts(bytes(received))]
        for index, (line, body) in enumerate(http_parts(bytes(sent))):
            path = line.split()[1]
            if path == "/v1/fleet/push-object":
                pushed = PushObjectRequest.FromString(body)
                objects[pushed.object_id] = pushed.object_content
            elif path == "/v1/fleet/push-messages":
                answer = (
                    PushMessagesResponse.FromString(answers[index]) if index < len(answers) else PushMessagesResponse()
                )
                wanted = set(answer.objects_to_push)
                trees += [(tree, wanted) for tree in PushMessagesRequest.FromString(body).message_object_trees]
            elif path == "/v1/fleet/pull-object" and index < len(answers):
                # What the server sent before and a site sends back unchanged does not travel again.
                asked = PullObjectRequest.FromString(body)
                objects.setdefault(asked.object_id, PullObjectResponse.FromString(answers[index]).object_content)
    found = []
    for tree, wanted in trees:
        parts = [item.object_id for item in iterate_object_tree(tree)]
        missing = set(parts) - set(objects)
        if missing and not missing & wanted:
            continue  # it came too late, so the server did not ask for its content, which never left the site
        contents = {part: objects[part] for part in parts}
        found.append(inflate_object_from_contents(tree.object_id, contents))
    return found
