"""Weights on the wire: named numpy arrays, sorted by name, checked on arrival, nothing unpickled.

float16 exists on the wire only, as the short form of float32; in memory it is float32 again.

Flower moves every array of a record in requests of their own, several times between server and site, which for a network's
hundred tensors takes longer than their bytes do. So weights travel in a bundle: one array of bytes with all the others in it.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord

from nnunet_fedharm.errors import FederationError, ShapeError

Weights = dict[str, npt.NDArray[Any]]
Tensors = Mapping[str, npt.NDArray[Any]]
"""Weights that need not be in memory; see `spool`."""

MEMORY_DTYPES = ("float32", "int64", "uint8", "bool")
WIRE_DTYPES = (*MEMORY_DTYPES, "float16")
BUNDLE = "bundle"
"""Name of the one array of a bundle."""
MAX_TENSORS = 20_000
MAX_BYTES = 8 * 2**30
"""Bound on one message's weights: 8 GiB, about twenty times nnU-Net's largest preset."""
_HEADER_BYTES = 10_000
_INDEX_BYTES = MAX_TENSORS * 1_000
_FLOAT16_MAX = float(np.finfo(np.float16).max)


def encode(weights: Mapping[str, npt.NDArray[Any]], *, fp16: bool = False, also: tuple[str, ...] = ()) -> ArrayRecord:
    """Arrays as a Flower record, in the order of their names.

    Args:
        weights: name -> array of float32, int64, uint8 or bool.
        fp16: send float32 as float16 (relative error up to 5e-4).
        also: further dtypes to allow; float64 sums of a report, for instance, which weights never are.

    Raises:
        FederationError: a dtype that is not allowed, NaN or infinity, or a value beyond float16's range.
    """
    arrays: dict[str, Array] = {}
    for name in sorted(weights):
        value = np.asarray(weights[name])
        if str(value.dtype) not in (*MEMORY_DTYPES, *also):
            raise FederationError(f"Cannot send {name}: dtype {value.dtype}; allowed are {', '.join(MEMORY_DTYPES)}.")
        _check_finite(name, value, "the sender")
        sent = _shorten(name, value) if fp16 and value.dtype == np.float32 else value
        arrays[name] = Array(np.asarray(sent, order="C"))
    return ArrayRecord(arrays)


def bundle(record: ArrayRecord) -> ArrayRecord:
    """All arrays of a record as one array of bytes; `decode` takes either.

    8 bytes length of the index, the index (JSON: name, dtype, shape and bytes of each array), the arrays as they were.
    """
    index = [
        {"name": name, "dtype": array.dtype, "shape": list(array.shape), "bytes": len(array.data)}
        for name, array in record.items()
    ]
    text = json.dumps(index, separators=(",", ":")).encode()
    parts = [len(text).to_bytes(8, "big"), text, *(array.data for array in record.values())]
    return ArrayRecord({BUNDLE: Array(np.frombuffer(b"".join(parts), dtype=np.uint8))})


def decode(
    record: ArrayRecord,
    *,
    like: Mapping[str, npt.NDArray[Any]] | None = None,
    source: str,
    also: tuple[str, ...] = (),
) -> Weights:
    """Arrays of a record, in the order of their names.

    Args:
        record: as it arrived; everything about it is checked.
        like: arrays whose names, shapes and dtypes the record has to have; None checks sizes and dtypes only.
        source: who sent it, for messages.
        also: as in `encode`.

    Raises:
        ShapeError: names or shapes differ from `like`.
        FederationError: dtype, size or content is not allowed.
    """
    _check_size(record, source)  # before a bundle is opened, which copies it
    if set(record) == {BUNDLE}:
        record = _unbundled(record[BUNDLE], source)
        _check_size(record, source)
    if like is not None:
        _check_names(set(record), set(like), source)
    weights: Weights = {}
    for name in sorted(record):
        value = _read_array(name, record[name], source, (*WIRE_DTYPES, *also))
        if like is not None:
            _check_like(name, value, like[name], source)
        _check_finite(name, value, source)
        weights[name] = value
    return weights


def payload_bytes(record: ArrayRecord) -> int:
    """Bytes of all arrays as they travel."""
    return sum(len(array.data) for array in record.values())


def _check_size(record: ArrayRecord, source: str) -> None:
    if len(record) > MAX_TENSORS or payload_bytes(record) > MAX_BYTES:
        raise FederationError(
            f"The weights from {source} are too large: {len(record)} tensors, {payload_bytes(record)} bytes; "
            f"at most {MAX_TENSORS} tensors and {MAX_BYTES} bytes are read."
        )


def _unbundled(array: Array, source: str) -> ArrayRecord:
    """The record that a bundle was made of; what its arrays hold is not looked at yet."""
    data = _read_array(BUNDLE, array, source, ("uint8",)).tobytes()
    start = 8 + int.from_bytes(data[:8], "big")
    if start > _INDEX_BYTES:
        raise FederationError(f"Cannot read the weights from {source}: the index of their bundle is too long.")
    arrays: dict[str, Array] = {}
    try:
        for item in json.loads(data[8:start]):
            stop = start + max(0, int(item["bytes"]))
            arrays[str(item["name"])] = Array(
                dtype=str(item["dtype"]), shape=tuple(item["shape"]), stype="numpy.ndarray", data=data[start:stop]
            )
            start = stop
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FederationError(
            f"Cannot read the weights from {source}: the index of their bundle is damaged."
        ) from error
    if start != len(data):
        raise FederationError(f"Cannot read the weights from {source}: their bundle is not as long as its index says.")
    return ArrayRecord(arrays)


def _shorten(name: str, value: npt.NDArray[Any]) -> npt.NDArray[np.float16]:
    largest = float(np.abs(value).max(initial=0.0))
    if largest > _FLOAT16_MAX:
        raise FederationError(f"{name} holds {largest:.3g}, beyond float16's range (65504). Run without --fp16.")
    return value.astype(np.float16)


def _read_array(name: str, array: Array, source: str, allowed: tuple[str, ...]) -> npt.NDArray[Any]:
    """One array without numpy.load, so that no header can ask for memory that the message does not hold."""
    where = f"{name} from {source}"
    if array.stype != "numpy.ndarray" or array.dtype not in allowed:
        raise FederationError(
            f"Cannot read {where}: {array.stype} of dtype {array.dtype}; allowed: {', '.join(allowed)}."
        )
    stream = io.BytesIO(array.data)
    try:
        version = np.lib.format.read_magic(stream)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = reader(stream, max_header_size=_HEADER_BYTES)
    except ValueError as error:
        raise FederationError(f"Cannot read {where}: not a numpy array.") from error
    body = memoryview(array.data)[stream.tell() :]
    if fortran or str(dtype) != array.dtype or tuple(shape) != tuple(array.shape):
        raise FederationError(
            f"Cannot read {where}: its header says {dtype} {shape}, its record {array.dtype} {array.shape}."
        )
    if len(body) != math.prod(shape) * dtype.itemsize:
        raise FederationError(f"Cannot read {where}: {len(body)} bytes do not make {dtype} {tuple(shape)}.")
    value = np.frombuffer(body, dtype=dtype).reshape(shape)
    return value.astype(np.float32) if dtype == np.float16 else value.copy()


def _check_names(found: set[str], wanted: set[str], source: str) -> None:
    if found != wanted:
        extra, missing = sorted(found - wanted), sorted(wanted - found)
        what = f"unknown {extra[0]!r}" if extra else f"missing {missing[0]!r}"
        raise ShapeError(
            f"The weights from {source} do not fit: {len(found)} tensors instead of {len(wanted)}, {what}. "
            "Install the same nnunet_fedharm and nnunetv2 at every site."
        )


def _check_like(name: str, value: npt.NDArray[Any], like: npt.NDArray[Any], source: str) -> None:
    if value.shape != like.shape or value.dtype != like.dtype:
        raise ShapeError(f"{name} from {source} is {value.dtype} {value.shape}, expected {like.dtype} {like.shape}.")


def _check_finite(name: str, value: npt.NDArray[Any], source: str) -> None:
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        raise FederationError(
            f"{name} from {source} holds NaN or infinity; lower --initial-lr and look at the site's log."
        )
