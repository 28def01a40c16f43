"""Weights on the wire."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_fedharm.errors import FederationError, ShapeError
from nnunet_fedharm.federation.codec import BUNDLE, bundle, decode, encode, payload_bytes

SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)


def example() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "b.weight": generator.normal(size=(3, 2)).astype(np.float32),
        "a.count": np.array(7, dtype=np.int64),
        "c.mask": np.array([True, False]),
        "c.levels": np.array([0, 255], dtype=np.uint8),
        "d.fortran": np.asfortranarray(generator.normal(size=(4, 3)).astype(np.float32)),
    }


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, dtype=st.sampled_from(["float32", "int64", "uint8", "bool"]), seed=st.integers(0, 99))
def test_any_allowed_array_survives_the_journey(shape: tuple[int, ...], dtype: str, seed: int) -> None:
    value = (np.random.default_rng(seed).normal(size=shape) * 100).astype(dtype)
    back = decode(encode({"x": value}), source="A")["x"]
    assert back.dtype == value.dtype
    assert back.shape == value.shape
    np.testing.assert_array_equal(back, value)


def test_names_are_sorted_and_checked_against_the_expected_ones() -> None:
    weights = example()
    record = encode(weights)
    assert list(record) == sorted(weights)
    assert list(decode(record, like=weights, source="A")) == sorted(weights)


def test_float16_halves_the_bytes_and_is_float32_again_in_memory() -> None:
    weights = {"w": np.linspace(-3, 3, 10_000, dtype=np.float32)}
    short = encode(weights, fp16=True)
    assert payload_bytes(short) < 0.51 * payload_bytes(encode(weights))
    back = decode(short, like=weights, source="A")["w"]
    assert back.dtype == np.float32
    np.testing.assert_allclose(back, weights["w"], rtol=6e-4, atol=1e-6)


def test_float16_leaves_integers_exact() -> None:
    weights = {"n": np.array([2**40 + 1], dtype=np.int64)}
    np.testing.assert_array_equal(decode(encode(weights, fp16=True), source="A")["n"], weights["n"])


def test_a_value_beyond_float16_is_refused_by_name() -> None:
    with pytest.raises(FederationError, match=r"big holds 1e\+06, beyond float16"):
        encode({"big": np.array([1e6], dtype=np.float32)}, fp16=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_are_refused_when_sent_and_when_received(bad: float) -> None:
    value = np.array([bad], dtype=np.float32)
    with pytest.raises(FederationError, match="w from the sender holds NaN or infinity"):
        encode({"w": value})
    with pytest.raises(FederationError, match="w from B holds NaN or infinity"):
        decode(ArrayRecord({"w": Array(value)}), source="B")


@pytest.mark.parametrize("dtype", ["float64", "complex64", "int32", "object"])
def test_other_dtypes_are_refused(dtype: str) -> None:
    with pytest.raises(FederationError, match="dtype"):
        encode({"w": np.zeros(2, dtype=dtype)})


def test_an_array_that_needs_unpickling_is_refused() -> None:
    stream = io.BytesIO()
    np.save(stream, np.array([{"x": 1}], dtype=object), allow_pickle=True)
    forged = Array(dtype="float32", shape=(1,), stype="numpy.ndarray", data=stream.getvalue())
    with pytest.raises(FederationError, match="Cannot read w from B"):
        decode(ArrayRecord({"w": forged}), source="B")


def test_a_header_that_promises_more_than_the_message_holds_is_refused() -> None:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": (10**12,)})
    forged = Array(dtype="float32", shape=(10**12,), stype="numpy.ndarray", data=stream.getvalue())
    with pytest.raises(FederationError, match="0 bytes do not make"):
        decode(ArrayRecord({"w": forged}), source="B")


@pytest.mark.parametrize("data", [b"", b"junk", b"\x93NUMPY\x01\x00\xff\xff"])
def test_bytes_that_are_no_array_are_refused(data: bytes) -> None:
    forged = Array(dtype="float32", shape=(1,), stype="numpy.ndarray", data=data)
    with pytest.raises(FederationError, match="Cannot read w from B"):
        decode(ArrayRecord({"w": forged}), source="B")


def test_missing_unknown_and_misshapen_tensors_are_named() -> None:
    like = {"a": np.zeros(2, np.float32), "b": np.zeros(2, np.float32)}
    with pytest.raises(ShapeError, match="missing 'b'"):
        decode(encode({"a": like["a"]}), like=like, source="B")
    with pytest.raises(ShapeError, match="unknown 'c'"):
        decode(encode({**like, "c": like["a"]}), like=like, source="B")
    with pytest.raises(ShapeError, match=r"b from B is float32 \(3,\), expected float32 \(2,\)"):
        decode(encode({**like, "b": np.zeros(3, np.float32)}), like=like, source="B")


def test_a_bundle_is_one_array_and_says_the_same() -> None:
    weights = {**example(), "e.empty": np.zeros((0, 3), np.float32)}
    record = bundle(encode(weights, fp16=True))
    assert list(record) == [BUNDLE]
    found, wanted = decode(record, like=weights, source="A"), decode(encode(weights, fp16=True), source="A")
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value)
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
    assert list(decode(bundle(encode({})), like={}, source="A")) == []


def forged_bundle(index: str, body: bytes = b"") -> ArrayRecord:
    text = index.encode()
    data = np.frombuffer(len(text).to_bytes(8, "big") + text + body, dtype=np.uint8)
    return ArrayRecord({BUNDLE: Array(data)})


@pytest.mark.parametrize(
    "index",
    [
        "",
        "{",
        "[1]",
        "[{}]",
        '{"name": 1}',
        '[{"name": "w", "dtype": "float32", "shape": null, "bytes": 0}]',
        '[{"name": "w", "dtype": "float32", "shape": [1], "bytes": 1000000000000}]',
        '[{"name": "w", "dtype": "float32", "shape": [1], "bytes": -3}]',
        "[" * 5000,
    ],
)
def test_a_bundle_with_a_wrong_index_is_refused(index: str) -> None:
    with pytest.raises(FederationError, match="B"):
        decode(forged_bundle(index, b"abc"), source="B")


def test_arrays_in_a_bundle_are_checked_like_any_other() -> None:
    stream = io.BytesIO()
    np.save(stream, np.array([{"x": 1}], dtype=object), allow_pickle=True)
    data = stream.getvalue()
    index = f'[{{"name": "w", "dtype": "float32", "shape": [1], "bytes": {len(data)}}}]'
    with pytest.raises(FederationError, match="Cannot read w from B"):
        decode(forged_bundle(index, data), source="B")
    with pytest.raises(FederationError, match="Cannot read bundle from B"):
        decode(ArrayRecord({BUNDLE: Array(np.zeros(2, np.float32))}), source="B")


def test_the_index_of_a_bundle_is_bounded_before_it_is_read() -> None:
    text = b"[" + b",".join([b'{"name":"w","dtype":"float32","shape":[0],"bytes":0}'] * 400_000) + b"]"
    record = ArrayRecord({BUNDLE: Array(np.frombuffer(len(text).to_bytes(8, "big") + text, dtype=np.uint8))})
    with pytest.raises(FederationError, match="index of their bundle is too long"):
        decode(record, source="A")
