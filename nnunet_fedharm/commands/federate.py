"""`nnunet-fedharm federate`: train across the sites of a consortium folder through Flower, on this machine."""

from __future__ import annotations

import argparse
import math
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from nnunet_fedharm.commands.card import write_federated_card
from nnunet_fedharm.federation.config import FederateConfig, key_of

HELP = "train across sites through Flower: plans, harmonizer rounds, segmenter rounds, results at the server and every site"
AUTO = "auto"
_SHORT = {"dataset": "-d", "configuration": "-c", "plans_name": "-p", "fold": "-f"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One option per field of FederateConfig."""
    deadline = "an hour for each site, divided by --parallel-sites"
    add_config_arguments(parser, defaults={"device": (AUTO, "cuda where there is one"), "deadline_s": (None, deadline)})


def add_config_arguments(
    parser: argparse.ArgumentParser,
    *,
    skip: Collection[str] = (),
    config: type[Any] = FederateConfig,
    defaults: Mapping[str, tuple[Any, str]] | None = None,
) -> None:
    """One option per field of a run's configuration, but for those that are skipped.

    Args:
        defaults: of the command, in the place of the field's, and what the help calls them; the command makes the field's value
            of them.
    """
    for item in fields(config):
        default, words = (defaults or {}).get(item.name, (item.default, ""))
        if item.name in skip:
            continue
        names = [_SHORT[item.name]] if item.name in _SHORT else []
        shared: dict[str, Any] = {
            "dest": item.name,
            "default": default,
            "help": _help(words or default, item.metadata),
        }
        if isinstance(item.default, bool):
            parser.add_argument(*names, f"--{key_of(item)}", action=argparse.BooleanOptionalAction, **shared)
        else:
            required = item.name in ("root", "dataset")
            parser.add_argument(*names, f"--{key_of(item)}", type=type(item.default), required=required, **shared)


def run(args: argparse.Namespace) -> int:
    """Run the federation and name the results folder."""
    from nnunet_fedharm.federation.launch import federate

    values = {item.name: getattr(args, item.name) for item in fields(FederateConfig)}
    if values["device"] == AUTO:
        import torch

        values["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    if values["deadline_s"] is None:
        values["deadline_s"] = _deadline(FederateConfig(**{**values, "deadline_s": FederateConfig.deadline_s}))
    write_federated_card(federate(FederateConfig(**values)))
    return 0


def _deadline(config: FederateConfig) -> float:
    """Seconds of a round in which the sites of this machine train one after another."""
    from nnunet_fedharm.federation.server_root import resolve_sites

    return config.deadline_s * math.ceil(len(resolve_sites(config).site_names) / config.parallel_sites)


def _help(default: object, metadata: Any) -> str:
    text = str(metadata["help"])
    return text if default in ("", False) or "default" in text else f"{text} (default: {default})"
