"""`nnunet-fedharm predict`: stock prediction, with a choice of where each volume's style comes from."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from nnunet_fedharm.errors import DataError, PlanError, SetupError

HELP = "segment like nnUNetv2_predict, with each volume's own style, the stored one, or a site's"

FOLDS = ("0", "1", "2", "3", "4")
DEFAULT_PLANS = "nnUNetFedHarmPlans"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; those of nnU-Net are spelled as nnU-Net does."""
    parser.add_argument("-i", "--images", type=Path, required=True, help="folder of images CASE_0000.nii.gz, ...")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the segmentations")
    parser.add_argument("-m", "--model", type=Path, help="results folder TRAINER__PLANS__CONFIGURATION")
    parser.add_argument("-d", help="data set number or name, in place of -m; then -tr and -c are needed")
    parser.add_argument("-tr", help="trainer's name")
    parser.add_argument("-p", default=DEFAULT_PLANS, help="plans' name (default: %(default)s)")
    parser.add_argument("-c", help="2d or 3d_fullres")
    parser.add_argument("-f", "--folds", nargs="+", help="default: all that have the checkpoint, as an ensemble")
    parser.add_argument("-chk", "--checkpoint", default="checkpoint_final.pth", help="default: %(default)s")
    parser.add_argument(
        "--style",
        metavar="volume|stored|SITE",
        help="each volume's own style; the one stored in the checkpoint; or that of a site of the training. "
        "Default: the stored one if there is one, else the volume's",
    )
    parser.add_argument("-device", "--device", default="cpu", help="cpu, cuda, cuda:1, mps (default: %(default)s)")
    parser.add_argument("--disable_tta", action="store_true", help="no mirroring: faster, less accurate")
    parser.add_argument("-step_size", type=float, default=0.5, help="of the sliding window (default: %(default)s)")
    parser.add_argument("--save_probabilities", action="store_true", help="also write probabilities")
    parser.add_argument("--continue_prediction", action="store_true", help="keep segmentations that are there")
    parser.add_argument("-npp", type=int, default=3, help="preprocessing processes (default: %(default)s)")
    parser.add_argument("-nps", type=int, default=3, help="export processes; 0 and -npp 0: all in this one")
    parser.add_argument("--not_on_device", action="store_true", help="gather results in CPU memory")
    parser.add_argument("--disable_progress_bar", action="store_true", help="for logs")
    parser.add_argument("--verbose", action="store_true", help="let nnU-Net talk")


def run(args: argparse.Namespace) -> int:
    """Segment every case of the folder."""
    # Imported here: torch and nnU-Net take seconds that --help need not wait for.
    from nnunet_fedharm.commands.device import torch_device
    from nnunet_fedharm.evaluation.adapt_volumes import find_cases
    from nnunet_fedharm.sites.files import read_json
    from nnunet_fedharm.trainers.predictor import FedHarmPredictor

    if not 0 < args.step_size <= 1:
        raise SetupError(f"-step_size must lie in (0, 1], got {args.step_size}.")
    device = torch_device(args.device)
    model = model_folder(args)
    if args.output.resolve() == args.images.resolve():
        raise DataError(f"Output and input are both {args.images}. Choose another -o.")
    cases = find_cases(args.images, read_json(model / "dataset.json", what="The dataset description"))
    predictor = FedHarmPredictor(
        style=args.style,
        tile_step_size=args.step_size,
        use_mirroring=not args.disable_tta,
        perform_everything_on_device=device.type == "cuda" and not args.not_on_device,
        device=device,
        verbose=args.verbose,
        verbose_preprocessing=args.verbose,
        allow_tqdm=not args.disable_progress_bar,
    )
    predictor.initialize_from_trained_model_folder(str(model), folds_of(model, args), args.checkpoint)
    make_folder(args.output)
    options = {"save_probabilities": args.save_probabilities, "overwrite": not args.continue_prediction}
    try:
        if args.npp == 0 and args.nps == 0:
            predictor.predict_from_files_sequential(str(args.images), str(args.output), **options)
        else:
            predictor.predict_from_files(
                str(args.images),
                str(args.output),
                **options,
                num_processes_preprocessing=max(1, args.npp),
                num_processes_segmentation_export=max(1, args.nps),
            )
    except RuntimeError as error:
        if "Background workers died" not in str(error):
            raise
        raise DataError(
            f"A volume in {args.images} could not be preprocessed; the lines above name it. "
            "Replace it, or use fewer processes (-npp 1) if memory ran out."
        ) from error
    print(f"{len(cases)} cases in {args.output}, style: {predictor.style}")
    return 0


def model_folder(args: argparse.Namespace) -> Path:
    """The results folder that -m names, or -d, -tr, -p and -c.

    Raises:
        PlanError: neither or both, or an option is missing.
        DataError: the folder does not exist.
        SetupError: nnUNet_results is not set.
    """
    if (args.model is None) == (args.d is None):
        raise PlanError("Give the model either as a folder (-m) or as a data set (-d, with -tr and -c).")
    folder: Path | None = args.model
    if folder is None:
        from nnunetv2.utilities.file_path_utilities import get_output_folder

        from nnunet_fedharm.nnunet_root import environment_paths

        if not (args.tr and args.c):
            raise PlanError("With -d, give the trainer (-tr nnUNetTrainerFedHarm...) and the configuration (-c) too.")
        environment_paths()
        try:
            folder = Path(get_output_folder(args.d, args.tr, args.p, args.c))
        except RuntimeError as error:
            raise DataError(f"nnU-Net knows no data set {args.d!r}: {error}") from error
    if not folder.is_dir():
        raise DataError(f"The results folder {folder} does not exist.")
    return folder


def make_folder(folder: Path) -> None:
    """Make the output folder where it is missing.

    Raises:
        SetupError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f"Cannot create {folder}: {error.strerror}. Choose another folder with -o.") from error


def folds_of(model: Path, args: argparse.Namespace) -> Sequence[str]:
    """The folds that were asked for, or those that have the checkpoint; fold "all" only where there is no other.

    Raises:
        DataError: there is none.
    """
    found = [fold for fold in (*FOLDS, "all") if (model / f"fold_{fold}" / args.checkpoint).is_file()]
    missing = [fold for fold in args.folds or [] if fold not in found]
    if missing or not found:
        which = missing[0] if missing else "*"
        raise DataError(
            f"{model} has no fold_{which}/{args.checkpoint}. Give a finished training, or another -f or -chk."
        )
    if args.folds:
        return list(args.folds)
    return [fold for fold in found if fold != "all"] or found
