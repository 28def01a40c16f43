"""What the demo's page says: the numbers of this run in words, and what they do not show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_fedharm.datasets.demo import DATASET_NAME, HOSPITALS, UNLABELLED_SITE
from nnunet_fedharm.evaluation.page import Report, Step
from nnunet_fedharm.evaluation.report import (
    SiteFolders,
    before_and_after,
    histograms,
    labels_and_errors,
    traffic,
    training_lines,
)

Events = Mapping[str, Sequence[Mapping[str, Any]]]
Metrics = Mapping[str, Mapping[str, Any]]

_LEAD = (
    "Three simulated hospitals trained one brain segmenter through Flower; cedar has images but no labels. Only weights and "
    "style numbers travelled. Predictions are by stock nnUNetv2_predict, on subjects that no training has seen."
)
_NOTES = (
    "Anatomy: the MNI152 T1 template and its tissue maps, as nilearn ships them. Every subject has its own smooth "
    "deformation, head size and tissue contrast; every hospital its own tone curve, receive field, point spread, Rician "
    "noise and raw scale. The tone curves of two hospitals never overlap.",
    "none is the control: plain nnU-Net in the same federation, same plans, same seed, same number of optimizer steps of the "
    "segmenter. The harmonizer's rounds need no labels and come on top.",
    "curve is the tone curve alone here, its gain field is off: in cedar's saturated images a bias field cannot be told from "
    "tissue. cedar's tone curve was made strong on purpose; under a mild one plain nnU-Net loses little, and there is little "
    "to gain. That setting, and the harmonizer's, were chosen on other simulated subjects (seed 0) such that plain nnU-Net fails "
    "at cedar; the subjects of this page played no part in the choice, but the size of the effect is a choice, not a finding.",
    "What this does not show: a few small subjects made from one template are no study. The interval is over the held-out "
    "cases of one run, not over repeated training. See benchmarks/ for real multi-site data.",
)


def demo_report(
    root: Path,
    *,
    steps: Sequence[tuple[str, str, float]],
    events: Events,
    metrics: Metrics,
    settings: Mapping[str, Any],
) -> Report:
    """Collect everything on the page from the demo's folder.

    Args:
        root: folder of the demo.
        steps: (name, what, seconds).
        events: harmonizer kind -> records of its rounds.
        metrics: harmonizer kind -> metrics, first the control.
        settings: sizes of the demo, for the notes.
    """
    folders = [_folders(root, site, list(metrics)) for site in HOSPITALS]
    return Report(
        title="Federated MRI harmonization for nnU-Net: the demo",
        lead=_LEAD,
        headline=_headline(steps, events, metrics),
        pictures=before_and_after(folders),
        overlays=labels_and_errors(folders),
        label_names=list(next(iter(metrics.values()))["labels"]),
        kinds=list(metrics),
        metrics=metrics,
        histograms=histograms(folders),
        training={
            "Harmonizer phase: self-paired loss": training_lines(events, "harmonizer", "train_loss"),
            "Segmenter phase: training loss": training_lines(events, "segmenter", "train_loss"),
            "Segmenter phase: nnU-Net's pseudo Dice": training_lines(events, "segmenter", "dice"),
        },
        steps=[Step(*step) for step in steps],
        notes=[*_NOTES, _settings_in_words(settings)],
    )


def _folders(root: Path, site: str, kinds: Sequence[str]) -> SiteFolders:
    raw = root / "sites" / site / "nnUNet_raw" / DATASET_NAME
    hospital = HOSPITALS[site]
    return SiteFolders(
        site=site,
        note=f"{hospital.field:g} T, {hospital.sequence}; {'labelled' if hospital.labelled else 'no labels'}",
        images=raw / "imagesTs",
        harmonized=root / "harmonized" / site,
        labels=raw / "labelsTs",
        predictions={kind: root / "predictions" / kind / site for kind in kinds},
    )


def _headline(steps: Sequence[tuple[str, str, float]], events: Events, metrics: Metrics) -> list[tuple[str, str]]:
    control, tested = list(metrics)
    cards = []
    for site in sorted(HOSPITALS, key=lambda name: name != UNLABELLED_SITE):
        before, after = (metrics[kind]["sites"][site]["labels"]["mean"]["dice"]["mean"] for kind in (control, tested))
        what = "the hospital without labels" if site == UNLABELLED_SITE else "with labels"
        cards.append((f"{_dice(before)} → {_dice(after)}", f"mean Dice at {site}, {what}: {control} → {tested}"))
    down, up = traffic(events[tested])
    minutes = sum(seconds for _, _, seconds in steps) / 60
    cards.append(
        (f"{(down + up) / 2**20:.0f} MiB", f"travelled in all rounds of {tested}; 0 images. {minutes:.1f} min in all")
    )
    return cards


def _dice(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _settings_in_words(settings: Mapping[str, Any]) -> str:
    size = settings["size"]
    return (
        f"Settings: {size['training']} training and {size['held_out']} held-out subjects per hospital at "
        f"{size['spacing_mm']:g} mm, {settings['harmonizer_rounds']} harmonizer and {settings['segmenter_rounds']} segmenter "
        f"rounds of {settings['iterations']} steps, batch {settings['batch_size']}, {settings['base_features']} features in "
        "the first stage."
    )
