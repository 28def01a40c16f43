"""The recorder itself: a test that looks at the wire proves nothing if the recorder sees nothing."""

from __future__ import annotations

import socket
import threading
import time

import numpy as np
from flwr.app import Message, RecordDict
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.task_identity import TaskIdentity

from nnunet_fedharm.federation.codec import decode, encode
from nnunet_fedharm.federation.messages import error_reply
from tests.federation.deploy.recording import Proxy, messages_from_sites


def request(path: str, body: bytes) -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def answer(body: bytes = b"") -> bytes:
    return f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


def test_a_message_is_put_together_from_pieces_of_several_connections() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    weights = np.random.default_rng(0).normal(size=(1000, 1700)).astype(np.float32)  # more than one piece
    content = error_reply("Kind", "text")
    content["weights"] = encode({"segmenter.w": weights})
    question = Message(RecordDict(), dst_node_id=7, message_type="train")
    question.metadata.__dict__["_message_id"] = "question"
    message = Message(content, reply_to=question)
    message.metadata.__dict__["_message_id"] = message.object_id
    objects = list(get_all_nested_objects(message).items())
    assert len(objects) > 6
    proxy = Proxy(target=1)
    proxy.close()
    for index in range(2):
        pushes = [
            request(
                "/v1/fleet/push-object",
                PushObjectRequest(object_id=name, object_content=thing.deflate()).SerializeToString(),
            )
            for name, thing in objects[index::2]
        ]
        proxy.sent.append(bytearray(b"".join(pushes)))
        proxy.received.append(bytearray(answer() * len(pushes)))
    trees = PushMessagesRequest(
        messages_list=[message_to_proto(message)], message_object_trees=[get_object_tree(message)]
    )
    proxy.sent[0][:0] = request("/v1/fleet/push-messages", trees.SerializeToString())
    proxy.received[0][:0] = answer()
    (found,) = messages_from_sites(proxy)
    assert found.metadata.message_type == "train"
    assert found.content.config_records["config"]["text"] == "text"
    np.testing.assert_array_equal(decode(found.content.array_records["weights"], source="A")["segmenter.w"], weights)


def test_bytes_pass_both_ways_and_are_kept() -> None:
    with socket.create_server(("127.0.0.1", 0)) as target:

        def echo() -> None:
            client, _ = target.accept()
            while data := client.recv(1024):
                client.sendall(data.upper())

        threading.Thread(target=echo, daemon=True).start()
        proxy = Proxy(target.getsockname()[1])
        with socket.create_connection(("127.0.0.1", proxy.port)) as client:
            client.sendall(b"hello")
            assert client.recv(1024) == b"HELLO"
        time.sleep(0.05)
        assert (bytes(proxy.sent[0]), bytes(proxy.received[0])) == (b"hello", b"HELLO")
        proxy.close()
