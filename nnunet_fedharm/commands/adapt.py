"""`nnunet-fedharm adapt`: a results folder for a hospital that took no part in the training."""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

HELP = "make a results folder for a new hospital from a few of its volumes, with or without labels; no weight moves"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "-m", "--model", type=Path, required=True, help="results folder TRAINER__PLANS__CONFIGURATION of our trainers"
    )
    parser.add_argument("-i", "--images", type=Path, required=True, help="the hospital's images CASE_0000.nii.gz, ...")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the hospital's results folder, to be written")
    parser.add_argument("--site", required=True, help="the hospital's name")
    parser.add_argument("--scanner", default="", help="a note for adaptation.json, such as vendor and field strength")
    parser.add_argument("-f", "--folds", nargs="+", help="0 to 4 or all; default: every fold that has the checkpoint")
    parser.add_argument("--checkpoint", default="checkpoint_final.pth", help="default: %(default)s")
    parser.add_argument(
        "--labels", type=Path, help="labels of some of the images: Dice, instead of appearance, then judges the gate"
    )
    parser.add_argument("-device", "--device", default="cpu", help="cpu, cuda, cuda:1, mps (default: %(default)s)")
    parser.add_argument(
        "-np", "--num-processes", type=int, default=1, help="volumes preprocessed side by side (default: %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that this command wrote before")


def run(args: argparse.Namespace) -> int:
    """Adapt the model, print what was found and how to predict."""
    # Imported here: torch and nnU-Net take seconds that --help need not wait for.
    from nnunet_fedharm.commands.device import torch_device
    from nnunet_fedharm.evaluation.adapt_model import PICTURES, adapt_model, format_adaptation

    started = time.monotonic()
    adaptation = adapt_model(
        args.model,
        args.images,
        args.output,
        site=args.site,
        scanner=args.scanner,
        folds=args.folds,
        checkpoint=args.checkpoint,
        labels=args.labels,
        device=str(torch_device(args.device)),
        num_processes=args.num_processes,
        overwrite=args.overwrite,
    )
    print(format_adaptation(adaptation))
    print(f"\nWritten in {time.monotonic() - started:.0f} s: {args.output} (look at {args.output / PICTURES})")
    print("Predict with:")
    print("  " + predict_command(args.output, list(adaptation.folds), checkpoint=args.checkpoint, device=args.device))
    return 0


def predict_command(folder: Path, folds: Sequence[str], *, checkpoint: str, device: str) -> str:
    """How the stock predictor uses the folder."""
    words = ["nnUNetv2_predict_from_modelfolder", "-i", "IMAGES", "-o", "PREDICTIONS", "-m", str(folder), "-f"]
    words += [fold.removeprefix("fold_") for fold in folds]
    words += ["-chk", checkpoint] if checkpoint != "checkpoint_final.pth" else []
    return shlex.join([*words, "-device", device.split(":")[0]])
