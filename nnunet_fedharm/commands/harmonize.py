"""`nnunet-fedharm harmonize`: harmonized volumes as NIfTI on the input's grid."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nnunet_fedharm.errors import DataError, SetupError

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


def harmonize_folder(
    model_folder: Path,
    images: Path,
    output: Path,
    *,
    site: str | None = None,
    fold: str | None = None,
    checkpoint: str = "checkpoint_final.pth",
    device: str = "cpu",
    progress: bool = True,
) -> int:
    """Harmonize a folder; one file per channel, named as the input. Returns the number of cases.

    Raises:
        DataError: no case, an unreadable file, or an output folder that is the input folder.
        SetupError: the device does not exist.
    """
    # Imported here: torch and nnU-Net take seconds that --help need not wait for.
    import torch
    from tqdm import tqdm

    from nnunet_fedharm.evaluation.harmonize import harmonize_case, load_harmonizer
    from nnunet_fedharm.evaluation.volumes import write_like
    from nnunet_fedharm.sites.files import cases_in

    if output.resolve() == images.resolve():
        raise DataError(f"Output and input are both {images}; the originals would be lost. Choose another -o.")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SetupError("There is no CUDA device here. Use --device cpu.")
    model = load_harmonizer(model_folder, fold=fold, checkpoint=checkpoint, device=device)
    cases = cases_in(images, model.dataset_json, labels=None)
    if not cases:
        ending = model.dataset_json["file_ending"]
        raise DataError(f"{images} holds no image named CASE_0000{ending}, as the model's dataset.json wants it.")
    reader = model.plans.image_reader_writer_class.__name__
    for case in tqdm(cases, "harmonize", disable=not progress):
        volume = harmonize_case(model, case, site=site)
        for channel, path in zip(volume, case.images, strict=True):
            write_like(channel, path, reader, output / path.name)
    return len(cases)
