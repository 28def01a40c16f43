"""What a results folder tells about its model, for the card: plans, dataset.json, privacy.json, and what is given beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nnunet_fedharm.errors import DataError
from nnunet_fedharm.planning.section import SECTION, FedHarmSection, read_section
from nnunet_fedharm.privacy.options import PRIVACY_FILE
from nnunet_fedharm.privacy.releases import PATIENT
from nnunet_fedharm.sites.files import read_json
from nnunet_fedharm.sites.registry import SitesFile
from nnunet_fedharm.study.model_card import CardFacts, CardPrivacy, CardScore, CardSite

PACKAGES = ("nnunet_fedharm", "nnunetv2", "torch")
ALL = "all"


def read_card_facts(
    model: Path,
    *,
    folds: Sequence[str],
    checkpoint: str,
    sites: Path | None = None,
    metrics: Path | None = None,
    mode: str = "",
    license: str = "",
) -> CardFacts:
    """Facts of a trained model.

    Args:
        model: results folder TRAINER__PLANS__CONFIGURATION below its dataset's.
        folds: names, such as "0" or "all".
        checkpoint: file in each fold's folder.
        sites: sites.json of the training data; without it only the names of the style bank are known.
        metrics: metrics.json of `nnunet-fedharm evaluate` on test cases.
        mode: central, federated or local.
        license: of the weights.

    Raises:
        DataError: a file is missing or damaged; the message names it.
    """
    trainer, plans_name, configuration = name_parts(model)
    plans = read_json(model / "plans.json", what="The plans")
    dataset = read_json(model / "dataset.json", what="The dataset description")
    section = _section(plans, configuration)
    promises = read_privacy(model, folds)
    return CardFacts(
        name=f"{model.parent.name}, {configuration}",
        dataset=model.parent.name,
        configuration=configuration,
        trainer=trainer,
        plans=plans_name,
        folds=tuple(folds),
        checkpoint=checkpoint,
        channels=tuple(str(name) for name in (dataset.get("channel_names") or dataset.get("modality") or {}).values()),
        labels=tuple(name for name in dataset["labels"] if name not in ("background", "ignore")),
        harmonizer="none" if section is None else section.kind,
        reference="" if section is None else section.reference,
        mode=mode,
        sites=_sites(sites, section),
        scores=() if metrics is None else read_scores(read_json(metrics, what="The metrics")),
        score_source="" if metrics is None else "From `nnunet-fedharm evaluate`; intervals by bootstrap over cases.",
        privacy=promises,
        trained="" if section is None else _trained(section),
        starts=() if section is None else section.starts,
        versions=versions(),
        license=license,
        created=datetime.now(UTC).date().isoformat(),
    )


def name_parts(model: Path) -> tuple[str, str, str]:
    """Trainer, plans and configuration of a results folder.

    Raises:
        DataError: the folder has another name, or does not exist.
    """
    parts = model.name.split("__")
    if len(parts) != 3 or not model.is_dir():
        raise DataError(
            f"{model} is no results folder of nnU-Net. Give the folder TRAINER__PLANS__CONFIGURATION below "
            "nnUNet_results/DatasetXXX_NAME."
        )
    return parts[0], parts[1], parts[2]


def read_privacy(model: Path, folds: Sequence[str]) -> tuple[CardPrivacy, ...]:
    """Promises of the folds' privacy.json: of a training in one place, or of a federation's server; the weakest fold counts.

    Raises:
        DataError: one fold was trained under differential privacy and another without, so nothing holds for the model.
    """
    found: dict[tuple[str, str], CardPrivacy] = {}
    without = [fold for fold in folds if not (model / f"fold_{fold}" / PRIVACY_FILE).is_file()]
    if without and len(without) < len(folds):
        raise DataError(
            f"{model}: fold {without[0]} has no {PRIVACY_FILE} and was trained without differential privacy, other folds were "
            "trained with it: the card could promise nothing. Export them apart."
        )
    for fold in folds:
        if fold in without:
            continue
        content = read_json(model / f"fold_{fold}" / PRIVACY_FILE, what="The record of privacy")
        own = dict(content.get("own_policy", {}).get("sites", {}))
        entries = [("", content[name]) for name in ("patient_level", "site_level") if name in content]
        entries += [(site, {"unit": PATIENT, **entry}) for site, entry in own.items()]
        for site, entry in entries or [("", content)]:
            bare = entry.get("not_covered") or entry.get("without_noise") or ()
            # A training in one place records what its ledger spent; a server states what it promised.
            numbers = (float(entry["epsilon"]), float(entry["delta"]))
            promise = CardPrivacy(str(entry["unit"]), *numbers, None, tuple(bare), site)
            known = found.get((promise.unit, site))
            if known is None or promise.epsilon > known.epsilon:
                found[promise.unit, site] = promise
    return tuple(found.values())


def read_scores(metrics: Mapping[str, Any]) -> tuple[CardScore, ...]:
    """Means over labels of each site, as `evaluation.segmentation.metrics_of` writes them."""

    def of(entry: Mapping[str, Any]) -> tuple[float | None, float | None, float | None]:
        return entry["mean"], entry["low"], entry["high"]

    return tuple(
        CardScore(
            site, int(entry["n_cases"]), of(entry["labels"]["mean"]["dice"]), of(entry["labels"]["mean"]["hd95_mm"])
        )
        for site, entry in metrics["sites"].items()
    )


def scanner_sites(registry: SitesFile, labelled: Sequence[str] | None) -> tuple[CardSite, ...]:
    """Sites as sites.json describes them.

    Args:
        registry: parsed sites.json.
        labelled: sites whose labels were used; None where it is not known.
    """
    found = []
    for name, info in registry.sites.items():
        words = [info.vendor, None if info.field is None else f"{info.field:g} T", info.sequence]
        labels = None if labelled is None else name in labelled
        found.append(
            CardSite(name, ", ".join(str(word) for word in words if word), labels, info.simulation is not None)
        )
    return tuple(found)


def versions() -> dict[str, str]:
    """Installed packages that the model needs."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a copy of the repository that is not installed
            continue
    return found


def _section(plans: Mapping[str, Any], configuration: str) -> FedHarmSection | None:
    content = plans["configurations"].get(configuration, {})
    return read_section(content, configuration_name=configuration) if SECTION in content else None


def _sites(path: Path | None, section: FedHarmSection | None) -> tuple[CardSite, ...]:
    if path is not None:
        return scanner_sites(SitesFile.load(path), None)
    return () if section is None else tuple(CardSite(name) for name in section.styles)


def _trained(section: FedHarmSection) -> str:
    schedule = section.schedule
    words = f"{schedule.segmenter_epochs} epochs of {schedule.iterations_per_epoch} steps"
    if schedule.harmonizer_epochs:
        words += f" after {schedule.harmonizer_epochs} of the harmonizer"
    return words + ("" if schedule.augmentation else ", without nnU-Net's augmentation")
