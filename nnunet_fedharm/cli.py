"""The command `nnunet-fedharm`: one sub-command a module of `nnunet_fedharm.commands`, imported only when chosen."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from nnunet_fedharm import __version__
from nnunet_fedharm.errors import FedHarmError

COMMANDS: dict[str, str] = {
    "doctor": "check this machine, and mend what can be mended",
    "demo": "run the whole path on MR anatomy that ships with the packages, in minutes",
    "convert": "a published data set (BraTS 2021, MAMA-MIA, BIDS) as an nnU-Net raw dataset with sites",
    "simulate-sites": "a raw dataset as several scanners would show it, with ground truth",
    "sites": "measure how different sites are; split a multi-site data set into one root per site; check data",
    "plan": "plan a harmonized segmenter for data in one place",
    "federate": "train across sites through Flower, all of them simulated on this machine",
    "status": "how a federation is going: round, sites, who is late, losses, Dice, epsilon; TensorBoard export",
    "watch": "the same as a live page for a browser on this machine",
    "server": "the coordinator's side of real hospitals: make a consortium, start its server, let sites in, run trainings",
    "site": "a hospital's side: join a consortium, start, and say what may be asked of it (sites is another command)",
    "study": "compare central, federated and local training, harmonizers and epsilons on one data set, and report",
    "slurm": "write job scripts for a cluster: preprocessing, training, simulation, a node as a site",
    "privacy": "plan the noise for a target epsilon; what a site has released and spent",
    "audit": "attack our own models and private training: membership, canaries, statistics, gradient inversion",
    "evaluate": "score predictions: Dice and HD95 per label, case and site",
    "predict": "segment like nnUNetv2_predict, with each volume's own style where none is stored",
    "adapt": "a results folder for a new hospital from a few of its volumes; no weight moves",
    "harmonize": "write harmonized volumes as NIfTI",
    "card": "write the model card of a trained model into its results folder",
    "export": "pack a trained model, with its model card, into a zip that unmodified nnU-Net installs",
    "quality": "compare harmonized volumes with travelling subjects: fidelity, radiomics, site classifier, lesions",
}
"""Name -> help. The help stands here so that `--help` need not import torch, nnU-Net and Flower."""

EXIT_ERROR = 2


def command_parser(name: str) -> argparse.ArgumentParser:
    """The parser of one sub-command, made by its module's `add_arguments`."""
    module = importlib.import_module(f"nnunet_fedharm.commands.{name.replace('-', '_')}")
    parser = argparse.ArgumentParser(prog=f"nnunet-fedharm {name}", description=module.HELP)
    module.add_arguments(parser)
    parser.set_defaults(run=module.run)
    return parser


def top_parser() -> argparse.ArgumentParser:
    """The parser that knows the names only."""
    listing = "\n".join(f"  {name:<14} {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="nnunet-fedharm",
        description="Federated MRI harmonization for nnU-Net v2.",
        epilog=f"commands:\n{listing}\n\nnnunet-fedharm COMMAND --help explains one command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"nnunet-fedharm {__version__}")
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="one of the commands below")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words after `nnunet-fedharm`; None takes them from the command line.

    Returns:
        The exit status: 0 done, 1 the command found a problem, 2 refused with one sentence on stderr, 130 interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words:
        top_parser().print_help()
        return EXIT_ERROR
    chosen = top_parser().parse_args(words[:1]).command
    try:
        options = command_parser(chosen).parse_args(words[1:])
        return int(options.run(options))
    except FedHarmError as error:
        print(f"nnunet-fedharm {chosen}: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print(f"nnunet-fedharm {chosen}: interrupted.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
