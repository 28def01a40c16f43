"""Command-line options from a frozen dataclass: the docstring under each field is the option's help."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from dataclasses import MISSING, Field, fields
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from nnunet_fedharm.planning.explain import field_docstrings

Options = TypeVar("Options")


def add_dataclass_options(
    parser: Any, cls: type[Any], *, skip: Collection[str] = (), show_defaults: bool = True
) -> None:
    """Add `--field-name` for every field (int, float, str, bool, tuple of one of these, or one of them or None).

    Without `show_defaults` the help leaves the class's defaults out: something else chooses what is not given. Options that are
    not given stay out of the namespace, so that `read_dataclass_options` leaves the class's own defaults.
    """
    helps, hints = field_docstrings(cls), get_type_hints(cls)
    for item in fields(cls):
        if item.name in skip:
            continue
        text = helps.get(item.name, "").replace("%", "%%") + (_default(item) if show_defaults else "")
        flag = "--" + item.name.replace("_", "-")
        kind, many = _kind(hints[item.name])
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            extra: dict[str, Any] = {"nargs": "+"} if many else {}
            metavar = {int: "N", float: "X", str: "NAME"}[kind]
            parser.add_argument(flag, type=kind, default=argparse.SUPPRESS, metavar=metavar, help=text, **extra)


def read_dataclass_options(args: argparse.Namespace, cls: type[Options], **given: Any) -> Options:
    """Build the dataclass from the options that were given, and from `given`."""
    return cls(**{**given_options(args, cls), **given})


def given_options(args: argparse.Namespace, cls: type[Any]) -> dict[str, Any]:
    """Field -> value, of the options that were given."""
    values = {item.name: getattr(args, item.name) for item in fields(cls) if hasattr(args, item.name)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _default(item: Field[Any]) -> str:
    if item.default is MISSING or item.default is None or isinstance(item.default, bool):
        return ""
    return f" Default: {item.default}."


def _kind(hint: Any) -> tuple[type[Any], bool]:
    if isinstance(hint, UnionType):
        hint = next(part for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is tuple:
        return get_args(hint)[0], True
    return hint, False
