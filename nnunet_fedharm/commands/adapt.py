"""`nnunet-fedharm adapt`: a results folder for a hospital that took no part in the training."""

from __future__ import annotations

import argparse
import json
import shlex
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_fedharm import __version__
from nnunet_fedharm.errors import DataError, SetupError

if TYPE_CHECKING:
    from nnunet_fedharm.evaluation.adapt import Adaptation, FoldEvidence

HELP = "make a results folder for a new hospital from a few of its volumes, with or without labels; no weight moves"

PICTURES = "adaptation.html"


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
        device=args.device,
        num_processes=args.num_processes,
        overwrite=args.overwrite,
    )
    print(format_adaptation(adaptation))
    print(f"\nWritten in {time.monotonic() - started:.0f} s: {args.output} (look at {args.output / PICTURES})")
    print("Predict with:")
    print("  " + predict_command(args.output, list(adaptation.folds), checkpoint=args.checkpoint, device=args.device))
    return 0


def adapt_model(
    model: Path,
    images: Path,
    output: Path,
    *,
    site: str,
    scanner: str = "",
    folds: Sequence[str] | None = None,
    checkpoint: str = "checkpoint_final.pth",
    labels: Path | None = None,
    device: str = "cpu",
    num_processes: int = 1,
    overwrite: bool = False,
    progress: bool = True,
) -> Adaptation:
    """Measure a site and write its results folder.

    Raises:
        DataError: images, labels or the output folder cannot be used.
        CheckpointError: the model is not ours, is not finished, or the disk is full.
        PlanError: a kind that changes nothing at prediction.
        SetupError: the device does not exist.
    """
    # Imported here: torch and nnU-Net take seconds that --help need not wait for.
    from nnunet_fedharm.commands.device import torch_device
    from nnunet_fedharm.evaluation.adapt import adapt, load_folds
    from nnunet_fedharm.evaluation.adapt_page import render_adaptation
    from nnunet_fedharm.evaluation.adapt_volumes import find_cases
    from nnunet_fedharm.trainers.adapted_folder import EVIDENCE, check_target, write_adapted_folder

    if not site.strip():
        raise DataError("--site is empty. Give the hospital's name.")
    if num_processes < 1:
        raise SetupError(f"-np must be at least 1, got {num_processes}.")
    check_target(model, output, overwrite=overwrite)
    models = load_folds(model, folds, checkpoint=checkpoint, device=str(torch_device(device)))
    first = next(iter(models.values()))
    cases = find_cases(images, first.dataset_json, labels=labels)
    found = adapt(
        model, models, cases, site=site, checkpoint=checkpoint, num_processes=num_processes, progress=progress
    )
    facts: dict[str, Any] = {
        "site": site,
        "scanner": scanner,
        "model": model.resolve().name,
        "checkpoint": checkpoint,
        "harmonizer": first.section.kind,
        "reference": first.section.reference,
        **found.evidence(),
        "versions": {"nnunet_fedharm": __version__, **{name: version(name) for name in ("nnunetv2", "torch")}},
    }
    page = render_adaptation(
        found,
        title=f"{site}: adapted to {first.section.reference}",
        lead=f"{first.section.kind} harmonizer, {found.style.n_cases} volumes. {scanner}",
        table=format_adaptation(found),
        channels=[str(name) for name in first.dataset_json["channel_names"].values()],
    )
    texts = {EVIDENCE: json.dumps(facts, indent=2, allow_nan=False) + "\n", PICTURES: page}
    write_adapted_folder(model, output, found.buffers, checkpoint=checkpoint, texts=texts, overwrite=overwrite)
    return found


def format_adaptation(adaptation: Adaptation) -> str:
    """The table that is printed: a row per fold."""
    rows = [("fold", "distance to the reference (sd)", "polarity by channel (vote)", "gate")]
    for fold, found in adaptation.folds.items():
        distance = f"{found.distance_before:.3f} -> {found.distance_after:.3f}"
        rows.append((fold.removeprefix("fold_"), distance, _polarity(found), _gate(found)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    labels = f", {adaptation.n_labelled} with labels" if adaptation.n_labelled else ""
    return "\n".join([f"{adaptation.style.n_cases} volumes{labels}", *lines])


def predict_command(folder: Path, folds: Sequence[str], *, checkpoint: str, device: str) -> str:
    """How the stock predictor uses the folder."""
    words = ["nnUNetv2_predict_from_modelfolder", "-i", "IMAGES", "-o", "PREDICTIONS", "-m", str(folder), "-f"]
    words += [fold.removeprefix("fold_") for fold in folds]
    words += ["-chk", checkpoint] if checkpoint != "checkpoint_final.pth" else []
    return shlex.join([*words, "-device", device.split(":")[0]])


def _polarity(found: FoldEvidence) -> str:
    if found.votes is None:
        return "not judged: this kind has no judge"
    from nnunet_fedharm.harmonizers.base import INVERTED_BELOW

    words = []
    for vote, inverted in zip(found.votes, found.inverted, strict=True):
        verdict = "inverted" if inverted else "upright" if vote > -INVERTED_BELOW else "undecided, taken as upright"
        words.append(f"{verdict} ({vote:+.2f})")
    return ", ".join(words)


def _gate(found: FoldEvidence) -> str:
    verdict = "open" if found.gate else "shut: images stay as they are"
    if found.dice_open is None or found.dice_shut is None:
        return verdict
    return f"{verdict} (Dice {found.dice_open:.3f} open, {found.dice_shut:.3f} shut)"
