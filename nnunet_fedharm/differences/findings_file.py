"""Findings from JSON: the inverse of `findings.to_json`."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from nnunet_fedharm.errors import DataError

T = TypeVar("T")


def from_json(kind: type[T], data: Any) -> T:
    """A dataclass of `findings` from what `to_json` made of it.

    Raises:
        DataError: a key is missing or unknown, or a value has another form; the message names it.
    """
    return _build(kind, data, kind.__name__)


def _build(kind: Any, data: Any, where: str) -> Any:
    if data is None or kind is Any:
        return data
    if is_dataclass(kind):
        return _dataclass(kind, data, where)
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _build(next(option for option in inner if option is not type(None)), data, where)
    if origin is dict and isinstance(data, Mapping):
        return {str(key): _build(inner[1], value, f"{where}.{key}") for key, value in data.items()}
    if origin is list and isinstance(data, list):
        return [_build(inner[0], value, f"{where}[{index}]") for index, value in enumerate(data)]
    if origin is tuple and isinstance(data, list):
        kinds = [inner[0]] * len(data) if inner[-1] is Ellipsis else inner
        if len(kinds) == len(data):
            return tuple(_build(one, value, where) for one, value in zip(kinds, data, strict=True))
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if isinstance(kind, type) and type(data) is kind:
        return data
    raise DataError(f"{where} of the report is {str(data)[:80]!r}, which is not the expected {kind}.")


def _dataclass(kind: Any, data: Any, where: str) -> Any:
    hints = _hints(kind)
    names = {item.name for item in fields(kind)}
    if not isinstance(data, Mapping) or set(data) != names:
        odd = sorted(set(data) ^ names) if isinstance(data, Mapping) else [type(data).__name__]
        raise DataError(f"{where} of the report does not have the expected keys ({', '.join(odd)}).")
    return kind(**{name: _build(hints[name], data[name], f"{where}.{name}") for name in names})


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)
