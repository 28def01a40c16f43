"""A results folder for a site that took no part in the training: measured, written, and described in words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nnunet_fedharm import __version__
from nnunet_fedharm.errors import DataError, SetupError
from nnunet_fedharm.evaluation.adapt import Adaptation, FoldEvidence, adapt, load_folds
from nnunet_fedharm.evaluation.adapt_page import render_adaptation
from nnunet_fedharm.evaluation.adapt_volumes import find_cases
from nnunet_fedharm.harmonizers.base import INVERTED_BELOW
from nnunet_fedharm.trainers.adapted_folder import EVIDENCE, check_target, write_adapted_folder

PICTURES = "adaptation.html"


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
        SetupError: fewer than one process.
    """
    if not site.strip():
        raise DataError("--site is empty. Give the hospital's name.")
    if num_processes < 1:
        raise SetupError(f"-np must be at least 1, got {num_processes}.")
    check_target(model, output, overwrite=overwrite)
    models = load_folds(model, folds, checkpoint=checkpoint, device=device)
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
    """What was found as a table: a row per fold."""
    rows = [("fold", "distance to the reference (sd)", "polarity by channel (vote)", "gate")]
    for fold, found in adaptation.folds.items():
        distance = f"{found.distance_before:.3f} -> {found.distance_after:.3f}"
        rows.append((fold.removeprefix("fold_"), distance, _polarity(found), _gate(found)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    labels = f", {adaptation.n_labelled} with labels" if adaptation.n_labelled else ""
    return "\n".join([f"{adaptation.style.n_cases} volumes{labels}", *lines])


def _polarity(found: FoldEvidence) -> str:
    if found.votes is None:
        return "not judged: this kind has no judge"
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
