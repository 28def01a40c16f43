"""`nnunet-fedharm federate`: train across the sites of a consortium folder through Flower, on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from dataclasses import fields
from typing import Any

from nnunet_fedharm.federation.config import FederateConfig, key_of

HELP = "train across sites through Flower: plans, harmonizer rounds, segmenter rounds, results at the server and every site"
_SHORT = {"dataset": "-d", "configuration": "-c", "plans_name": "-p", "fold": "-f"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One option per field of FederateConfig."""
    add_config_arguments(parser)


def add_config_arguments(
    parser: argparse.ArgumentParser, *, skip: Collection[str] = (), config: type[Any] = FederateConfig
) -> None:
    """One option per field of a run's configuration, but for those that are skipped."""
    for item in fields(config):
        if item.name in skip:
            continue
        names = [_SHORT[item.name]] if item.name in _SHORT else []
        shared: dict[str, Any] = {
            "dest": item.name,
            "default": item.default,
            "help": _help(item.default, item.metadata),
        }
        if isinstance(item.default, bool):
            parser.add_argument(*names, f"--{key_of(item)}", action=argparse.BooleanOptionalAction, **shared)
        else:
            required = item.name in ("root", "dataset")
            parser.add_argument(*names, f"--{key_of(item)}", type=type(item.default), required=required, **shared)


def run(args: argparse.Namespace) -> int:
    """Run the federation and name the results folder."""
    from nnunet_fedharm.federation.launch import federate

    config = FederateConfig(**{item.name: getattr(args, item.name) for item in fields(FederateConfig)})
    federate(config)
    return 0


def _help(default: object, metadata: Any) -> str:
    text = str(metadata["help"])
    return text if default in ("", False) or "default" in text else f"{text} (default: {default})"
