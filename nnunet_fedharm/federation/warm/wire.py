"""What goes over the socket between Flower's process and the worker: length-prefixed JSON, protobuf and raw bytes.

One parcel is: 4 bytes magic, 8 bytes length of the JSON head, the head, Flower's own protobuf of all records but the arrays, then
the bytes of every array as they came. Arrays are not put into the protobuf, which ends at 2 GiB. Nothing is unpickled.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any, Protocol

from flwr.app import Array, ArrayRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto

from nnunet_fedharm.errors import FederationError

_MAGIC = b"fdh1"
_PREFIX = struct.Struct(">4sQ")
_MOST_HEAD = 64 * 2**20
_MOST_BYTES = 2**35
_PIECE = 2**24


class Closed(FederationError):
    """The other end is gone."""


class Sink(Protocol):
    """What parcels are sent into: a socket."""

    def sendall(self, data: Any, /) -> None: ...


class Source(Protocol):
    """What parcels are received from: a socket."""

    def recv_into(self, buffer: Any, /) -> int: ...


def send(stream: Sink, head: Mapping[str, Any], content: RecordDict) -> None:
    """Send one parcel.

    Raises:
        Closed: the other end is gone.
    """
    arrays = [
        (record, name, array) for record, values in content.array_records.items() for name, array in values.items()
    ]
    rest = RecordDict({key: value for key, value in content.items() if not isinstance(value, ArrayRecord)})
    records = recorddict_to_proto(rest).SerializeToString()
    listing = [
        {
            "record": record,
            "name": name,
            "dtype": array.dtype,
            "shape": list(array.shape),
            "stype": array.stype,
            "bytes": len(array.data),
        }
        for record, name, array in arrays
    ]
    empty = [record for record, values in content.array_records.items() if not values]
    parcel = {"head": dict(head), "records": len(records), "arrays": listing, "empty": empty}
    text = json.dumps(parcel, separators=(",", ":")).encode()
    try:
        stream.sendall(_PREFIX.pack(_MAGIC, len(text)) + text + records)
        for _, _, array in arrays:
            stream.sendall(array.data)
    except OSError as error:
        raise Closed("The worker's socket was closed while a message was sent.") from error


def receive(stream: Source) -> tuple[dict[str, Any], RecordDict]:
    """Receive one parcel.

    Raises:
        Closed: the other end is gone.
        FederationError: this is no parcel.
    """
    parcel = _parcel(stream)
    proto = RecordDictProto.FromString(bytes(_read(stream, parcel["records"])))
    content = recorddict_from_proto(proto)
    if sum(item["bytes"] for item in parcel["arrays"]) > _MOST_BYTES:
        raise FederationError("The arrays of a message on the worker's socket are too large.")
    records: dict[str, dict[str, Array]] = {record: {} for record in parcel["empty"]}
    for item in parcel["arrays"]:
        data = bytes(_read(stream, item["bytes"]))
        array = Array(dtype=item["dtype"], shape=tuple(item["shape"]), stype=item["stype"], data=data)
        records.setdefault(item["record"], {})[item["name"]] = array
    for record, arrays in records.items():
        content[record] = ArrayRecord(arrays)
    return parcel["head"], content


def receive_head(stream: Source) -> dict[str, Any]:
    """The head alone of the parcel that comes next; its records stay in the stream.

    Raises:
        Closed, FederationError: as `receive`.
    """
    return dict(_parcel(stream)["head"])


def _parcel(stream: Source) -> dict[str, Any]:
    magic, length = _PREFIX.unpack(_read(stream, _PREFIX.size))
    if magic != _MAGIC or length > _MOST_HEAD:
        raise FederationError("What came over the worker's socket is not a message of this release.")
    return dict(json.loads(_read(stream, length)))


def _read(stream: Source, length: int) -> bytearray:
    data = bytearray(length)
    view, done = memoryview(data), 0
    while done < length:
        try:
            count = stream.recv_into(view[done : done + _PIECE])
        except OSError as error:
            raise Closed("The worker's socket was closed while a message was read.") from error
        if not count:
            raise Closed("The worker's socket was closed before a message was whole.")
        done += count
    return data
