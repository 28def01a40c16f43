"""`nnunet-fedharm export`: a trained model as a zip for `nnUNetv2_install_pretrained_model_from_zip`, with a model card."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "pack a trained model, with its model card, into a zip that unmodified nnU-Net installs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("-m", "--model", type=Path, required=True, help="results folder TRAINER__PLANS__CONFIGURATION")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the zip to write")
    parser.add_argument("-f", "--folds", nargs="+", help="0 to 4 or all; default: every fold that has the checkpoint")
    parser.add_argument("--checkpoint", default="checkpoint_final.pth", help="default: %(default)s")
    card = parser.add_argument_group("what the model card says beside what the folder tells")
    card.add_argument("--metrics", type=Path, help="metrics.json of `nnunet-fedharm evaluate` on test cases")
    card.add_argument("--sites", type=Path, help="sites.json of the training data; default: the plans' names of sites")
    card.add_argument("--mode", default="", help="how it was trained: central, federated or local")
    card.add_argument("--license", default="", help="license of the weights")
    parser.add_argument("--overwrite", action="store_true", help="replace a former zip")


def run(args: argparse.Namespace) -> int:
    """Pack the model and say how it is installed."""
    # Imported here: torch takes seconds that --help need not wait for.
    from nnunet_fedharm.study.model_export import export_model, find_folds
    from nnunet_fedharm.study.model_facts import name_parts, read_card_facts

    model = args.model.expanduser().resolve()
    trainer, plans, configuration = name_parts(model)
    folds = find_folds(model, args.checkpoint, args.folds)
    facts = read_card_facts(
        model,
        folds=folds,
        checkpoint=args.checkpoint,
        sites=args.sites,
        metrics=args.metrics,
        mode=args.mode,
        license=args.license,
    )
    written = export_model(model, args.output, facts, overwrite=args.overwrite)
    print(f"Written: {written.path} ({written.size / 1e6:.1f} MB)")
    for name in written.names:
        print(f"  {name}")
    print("\nOn the machine that predicts, with nnU-Net and this package installed:")
    print(f"  nnUNetv2_install_pretrained_model_from_zip {written.path.name}")
    print(
        f"  nnUNetv2_predict -d {facts.dataset} -c {configuration} -tr {trainer} -p {plans} -f {' '.join(folds)} "
        f"-chk {args.checkpoint} -i IMAGES -o OUTPUT"
    )
    if not facts.scores:
        print("\nThe card says nothing about how good the model is: add --metrics metrics.json.")
    return 0
