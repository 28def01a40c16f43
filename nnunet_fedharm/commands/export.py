"""`nnunet-fedharm export`: a trained model as a zip for `nnUNetv2_install_pretrained_model_from_zip`, with a model card."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunet_fedharm.commands.card import add_card_arguments, facts_of

HELP = "pack a trained model, with its model card, into a zip that unmodified nnU-Net installs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("-o", "--output", type=Path, required=True, help="the zip to write")
    add_card_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a former zip")


def run(args: argparse.Namespace) -> int:
    """Pack the model and say how it is installed."""
    # Imported here: torch takes seconds that --help need not wait for.
    from nnunet_fedharm.study.model_export import export_model

    model = args.model.expanduser().resolve()
    facts = facts_of(args)
    written = export_model(model, args.output, facts, overwrite=args.overwrite)
    print(f"Written: {written.path} ({written.size / 1e6:.1f} MB)")
    for name in written.names:
        print(f"  {name}")
    print("\nOn the machine that predicts, with nnU-Net and this package installed:")
    print(f"  nnUNetv2_install_pretrained_model_from_zip {written.path.name}")
    print(
        f"  nnUNetv2_predict -d {facts.dataset} -c {facts.configuration} -tr {facts.trainer} -p {facts.plans} "
        f"-f {' '.join(facts.folds)} -chk {args.checkpoint} -i IMAGES -o OUTPUT"
    )
    if not facts.scores:
        print("\nThe card says nothing about how good the model is: add --metrics metrics.json.")
    return 0
