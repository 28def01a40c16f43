"""`nnunet-fedharm harmonize`: harmonized volumes as NIfTI on the input's grid."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HELP = "write harmonized volumes as NIfTI with the input's geometry and intensity scale"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "-m",
        "--model",
        type=Path,
        required=True,
        help="results folder TRAINER__PLANS__CONFIGURATION of our trainers",
    )
    parser.add_argument("-i", "--images", type=Path, required=True, help="folder of images CASE_0000.nii.gz, ...")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the harmonized images, same names")
    parser.add_argument(
        "--site", help="style to map from; default: the one stored in the checkpoint, else that of each whole volume"
    )
    parser.add_argument("-f", "--fold", help="0 to 4 or all; default: the first fold that is there")
    parser.add_argument("--checkpoint", default="checkpoint_final.pth", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Harmonize every case of the folder."""
    # Imported here: torch and nnU-Net take seconds that --help need not wait for.
    from nnunet_fedharm.evaluation.harmonize_folder import harmonize_folder

    cases = harmonize_folder(
        args.model,
        args.images,
        args.output,
        site=args.site,
        fold=args.fold,
        checkpoint=args.checkpoint,
        device=args.device,
    )
    sys.stdout.write(f"{cases} cases written to {args.output}\n")
    return 0
