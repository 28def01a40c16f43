"""`nnunet-fedharm card`: the model card beside a trained model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

HELP = "write the model card of a trained model into its results folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_card_arguments(parser)


def add_card_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, and what its card says beside what the folder tells."""
    parser.add_argument("-m", "--model", type=Path, required=True, help="results folder TRAINER__PLANS__CONFIGURATION")
    parser.add_argument("-f", "--folds", nargs="+", help="0 to 4 or all; default: every fold that has the checkpoint")
    parser.add_argument("--checkpoint", default="checkpoint_final.pth", help="default: %(default)s")
    card = parser.add_argument_group("what the model card says beside what the folder tells")
    card.add_argument("--metrics", type=Path, help="metrics.json of `nnunet-fedharm evaluate` on test cases")
    card.add_argument("--sites", type=Path, help="sites.json of the training data; default: the plans' names of sites")
    card.add_argument("--mode", default="", help="how it was trained: central, federated or local")
    card.add_argument("--license", default="", help="license of the weights")


def facts_of(args: argparse.Namespace) -> Any:
    """Facts for the card from the model's folder and the options."""
    from nnunet_fedharm.study.card_beside import card_facts

    known = {name: getattr(args, name) for name in ("checkpoint", "folds", "sites", "metrics", "mode", "license")}
    return card_facts(args.model.expanduser().resolve(), **known)


def write_federated_card(results: Path) -> None:
    """The card of a finished federation, at its server.

    Args:
        results: the fold's folder.
    """
    from nnunet_fedharm.study.card_beside import FINAL, card_facts, write_card

    if not (results / FINAL).is_file():
        return  # harmonizer rounds alone: no model yet
    model = results.parent
    print(f"The model card: {write_card(model, card_facts(model, mode='federated'))}")


def run(args: argparse.Namespace) -> int:
    """Write the card and name it."""
    from nnunet_fedharm.study.card_beside import write_card

    facts = facts_of(args)
    print(f"Written: {write_card(args.model.expanduser().resolve(), facts)}")
    if not facts.scores:
        print("The card says nothing about how good the model is: add --metrics metrics.json.")
    return 0
