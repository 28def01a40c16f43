"""A Grid without Flower's runtime: messages go straight to a client function, for tests of the loop's own logic."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

Client = Callable[[Message], Message | None]
"""What a node does with a message; None stays silent for ever."""


class LocalGrid(Grid):
    """Nodes that answer at once.

    Attributes:
        clients: node id -> client; changing it lets nodes leave and come back.
        sent: every message type with its node, in order.
    """

    def __init__(self, clients: Mapping[int, Client]) -> None:
        self.clients = dict(clients)
        self.sent: list[tuple[str, int]] = []
        self._replies: dict[str, Message] = {}
        self._count = 0
        # Flower's processes know whose they are before they make a message.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return list(self.clients)

    def push_messages(self, messages: Iterable[Message]) -> list[str | None]:
        return [self._deliver(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self._replies.pop(name) for name in message_ids if name in self._replies]

    def _deliver(self, message: Message) -> str | None:
        node = message.metadata.dst_node_id
        self.sent.append((message.metadata.message_type, node))
        if node not in self.clients:
            return None
        self._count += 1
        name = f"message-{self._count}"
        message.metadata.__dict__["_message_id"] = name
        reply = self.clients[node](message)
        if reply is not None:
            reply.metadata.__dict__["_reply_to_message_id"] = name
            self._replies[name] = reply
        return name


def app_client(
    app: Callable[[Message, Context], Message], node_config: dict[str, Any], run_config: dict[str, Any]
) -> Client:
    """The real ClientApp behind a node of a LocalGrid; exceptions become error replies, as Flower does it."""

    def client(message: Message) -> Message:
        context = Context(
            run_id=1,
            node_id=message.metadata.dst_node_id,
            node_config=node_config,
            state=RecordDict(),
            run_config=run_config,
        )
        try:
            return app(message, context)
        except Exception as error:  # noqa: BLE001 - Flower does the same
            return Message(Error(code=2, reason=str(error)), reply_to=message)

    return client
