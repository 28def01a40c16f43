"""Command-line options from a frozen dataclass: the docstring under each field is the option's help."""

from __future__ import annotations

import argparse
import ast
import inspect
import textwrap
from collections.abc import Collection
from dataclasses import MISSING, Field, fields
from itertools import pairwise
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

Options = TypeVar("Options")


def add_dataclass_options(parser: Any, cls: type[Any], *, skip: Collection[str] = ()) -> None:
    """Add `--field-name` for every field (int, float, str, bool, tuple of one of these, or one of them or None).

    Options that are not given stay out of the namespace, so that `read_dataclass_options` leaves the class's own defaults.
    """
    helps, hints = field_docstrings(cls), get_type_hints(cls)
    for item in fields(cls):
        if item.name in skip:
            continue
        text = helps.get(item.name, "").replace("%", "%%") + _default(item)
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
    values = {item.name: getattr(args, item.name) for item in fields(cls) if hasattr(args, item.name)}  # type: ignore[arg-type]
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return cls(**{**values, **given})


def field_docstrings(cls: type[Any]) -> dict[str, str]:
    """Field name -> the string literal that follows it in the class's source, on one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    statements = body.body if isinstance(body, ast.ClassDef) else []
    found = {}
    for before, after in pairwise(statements):
        if (
            isinstance(before, ast.AnnAssign)
            and isinstance(before.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            found[before.target.id] = " ".join(str(after.value.value).split())
    return found


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
