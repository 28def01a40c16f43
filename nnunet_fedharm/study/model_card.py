"""A model card: what a trained model is for, what it was trained on, how well it does where, what it reveals, how to run it.

`model_card` takes plain facts and reads no file, so that a study's cell, an export and a notebook can all call it.

References:
    Mitchell et al., "Model Cards for Model Reporting", FAT* 2019: the sections below are theirs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from nnunet_fedharm.differences.notes import joined
from nnunet_fedharm.evaluation.words import count, number, scientific
from nnunet_fedharm.planning.section import StartModel

NOT_STATED = "not stated"
CARD = "MODEL_CARD.md"


@dataclass(frozen=True)
class CardSite:
    """One site of the training.

    Attributes:
        scanner: vendor, field and sequence; "" where sites.json does not say.
        labels: whether its labels were used; None where it is not known.
        simulated: made by `simulate-sites`, not scanned there.
    """

    name: str
    scanner: str = ""
    labels: bool | None = None
    simulated: bool = False


@dataclass(frozen=True)
class CardScore:
    """Mean over test cases at one site with 95% interval; None where it is not known."""

    site: str
    cases: int
    dice: tuple[float | None, float | None, float | None]
    hd95_mm: tuple[float | None, float | None, float | None] = (None, None, None)


@dataclass(frozen=True)
class CardPrivacy:
    """A promise of differential privacy.

    Attributes:
        unit: patient or site: whose participation is hidden.
        epsilon, delta: of the promise. spent: at the site that spent most; None where it is not known.
        without_noise: what left without any noise, so without any epsilon.
        site: whose patients alone it is for, by that site's own policy; "" for those of all sites.
    """

    unit: str
    epsilon: float
    delta: float
    spent: float | None = None
    without_noise: tuple[str, ...] = ()
    site: str = ""


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """Everything that a card says.

    Attributes:
        name: of the model, for the title.
        dataset, configuration, trainer, plans, folds, checkpoint: as nnU-Net names them.
        channels, labels: in order.
        harmonizer: kind. reference: site whose appearance it maps to, or consensus.
        mode: central, federated, local; "" where it is not known.
        sites: of the training. scores: on test cases. score_source: where they come from.
        privacy: promises; empty without differential privacy.
        trained: epochs and steps, in words.
        starts: the model whose weights it started from, then the one before that, and so on; empty: random weights.
        versions: package -> version of this writing.
        notes: further limits, in sentences.
        license: of the weights, "" where it is not stated.
    """

    name: str
    dataset: str
    configuration: str
    trainer: str
    plans: str
    folds: tuple[str, ...]
    checkpoint: str
    channels: tuple[str, ...]
    labels: tuple[str, ...]
    harmonizer: str
    reference: str
    mode: str = ""
    sites: tuple[CardSite, ...] = ()
    scores: tuple[CardScore, ...] = ()
    score_source: str = ""
    privacy: tuple[CardPrivacy, ...] = ()
    trained: str = ""
    starts: tuple[StartModel, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    license: str = ""
    created: str = ""


def model_card(facts: CardFacts) -> str:
    """The card as Markdown."""
    parts = [
        f"# Model card: {facts.name}",
        "## Model details\n\n" + _details(facts),
        "## Intended use\n\n" + _use(facts),
        "## Factors\n\n" + _factors(facts),
        "## Metrics and evaluation data\n\n" + _scores(facts),
        "## Training data\n\n" + _training(facts),
        "## Privacy\n\n" + _privacy(facts),
        "## Limits and ethical considerations\n\n" + _bullets(limits(facts)),
        "## How to use it\n\n" + _how(facts),
        "## Reference\n\nMitchell et al., *Model Cards for Model Reporting*, FAT* 2019.",
    ]
    return "\n\n".join(parts) + "\n"


def card_data(facts: CardFacts) -> dict[str, Any]:
    """The same as JSON values."""
    return {**asdict(facts), "versions": dict(facts.versions), "limits": limits(facts)}


def card_files(facts: CardFacts) -> dict[str, str]:
    """File name -> text: the card for people and for programs."""
    data = json.dumps(card_data(facts), indent=1, allow_nan=False) + "\n"
    return {CARD: model_card(facts), "model_card.json": data}


def limits(facts: CardFacts) -> list[str]:
    """What the model must not be taken for."""
    said = [
        "A research model. It is no medical device, and no physician may rely on it.",
        "It knows the scanners of its training sites. At another hospital measure it first on labelled cases of that hospital; "
        "`nnunet-fedharm adapt` makes a results folder for it.",
    ]
    if facts.harmonizer not in ("none", "augment"):
        said.append(
            "Harmonized images are for this segmenter. Do not read them as scans: a harmonizer may change what matters to a "
            "reader."
        )
        said.append(
            "The plans and the checkpoint hold the style of each training site: mean quantiles of its images' intensities, "
            "no image."
        )
    if not facts.scores:
        said.append("No test scores came with this card: how good the model is, it does not say.")
    if any(site.simulated for site in facts.sites):
        said.append("Some of its sites were simulated; real scanners differ in more ways.")
    if not facts.privacy:
        said.append(
            "It was trained without differential privacy: what its weights reveal about a patient has no bound."
        )
    elif all(promise.site for promise in facts.privacy):
        names = joined([promise.site for promise in facts.privacy])
        said.append(f"What its weights reveal about a patient of another site than {names} has no bound.")
    return [*said, *facts.notes]


def _details(facts: CardFacts) -> str:
    size = f"{count(len(facts.folds), 'fold')} ({', '.join(facts.folds)})"
    lines = [
        f"nnU-Net v2 segmenter, configuration `{facts.configuration}`, {size}, `{facts.checkpoint}`",
        f"Harmonizer in front of it: `{facts.harmonizer}`"
        + ("" if facts.harmonizer in ("none", "augment") else f", to the appearance of {facts.reference}"),
        f"Trainer `{facts.trainer}`, plans `{facts.plans}`",
        f"Training: {facts.mode or 'mode ' + NOT_STATED}" + (f", {facts.trained}" if facts.trained else ""),
        *(f"Started from {start}" for start in facts.starts),
        f"Versions: {', '.join(f'{name} {version}' for name, version in facts.versions.items()) or NOT_STATED}",
        f"License of the weights: {facts.license or NOT_STATED + '; that of the training data binds them too'}",
    ]
    return _bullets([*lines, *([f"Card written {facts.created}"] if facts.created else [])])


def _use(facts: CardFacts) -> str:
    return (
        f"Research on segmenting {joined(facts.labels)} in MR images with the channels {joined(facts.channels)}, such as "
        "those of "
        f"`{facts.dataset}`. Not for diagnosis or treatment."
    )


def _factors(facts: CardFacts) -> str:
    if not facts.sites:
        return "Sites and scanners of the training are not stated."
    rows = ["| site | scanner | took part with |", "|---|---|---|"]
    words = {True: "images and labels", False: "images", None: NOT_STATED}
    for site in facts.sites:
        scanner = (site.scanner or NOT_STATED) + (" (simulated)" if site.simulated else "")
        rows.append(f"| {site.name} | {scanner} | {words[site.labels]} |")
    return "\n".join(rows)


def _scores(facts: CardFacts) -> str:
    if not facts.scores:
        return "Not measured, or not handed over with the model."
    rows = ["| site | test cases | Dice (95% interval) | HD95 in mm (95% interval) |", "|---|---|---|---|"]
    for score in facts.scores:
        rows.append(f"| {score.site} | {score.cases} | {_interval(score.dice, 3)} | {_interval(score.hd95_mm, 2)} |")
    known = [score for score in facts.scores if score.dice[0] is not None and score.site != "all"]
    worst = min(known, key=lambda score: score.dice[0] or 0.0, default=None)
    words = (
        f"\n\nWorst site: {worst.site}, Dice {number(worst.dice[0], 3)}."
        if worst is not None and len(known) > 1
        else ""
    )
    return "\n".join(rows) + words + (f" {facts.score_source}" if facts.score_source else "")


def _interval(value: tuple[float | None, float | None, float | None], digits: int) -> str:
    mean, low, high = (number(part, digits) for part in value)
    return mean if value[1] is None else f"{mean} ({low} to {high})"


def _training(facts: CardFacts) -> str:
    with_labels = [site.name for site in facts.sites if site.labels]
    words = f"`{facts.dataset}`"
    if facts.sites:
        words += f", {count(len(facts.sites), 'site')}"
    if with_labels:
        words += f"; labels of {joined(with_labels)}"
    return words + ". No image of it comes with the model."


def _privacy(facts: CardFacts) -> str:
    if not facts.privacy:
        return "None: trained without differential privacy."
    said = []
    for promise in facts.privacy:
        line = f"epsilon {promise.epsilon:g}, delta {scientific(promise.delta)}; unit: {promise.unit}"
        if promise.site:
            line += f" of site {promise.site} alone, by that site's own policy"
        if promise.spent is not None:
            line += f"; spent {promise.spent:.2f} at the site that spent most"
        if promise.without_noise:
            line += f"; not covered, for it left without noise: {joined(promise.without_noise)}"
        said.append(line)
    said += [f"not covered: the patients of {start.model}, which it started from" for start in facts.starts]
    return _bullets(said)


def _how(facts: CardFacts) -> str:
    folds = " ".join(facts.folds)
    install = ""
    if facts.trainer.startswith("nnUNetTrainerFedHarm"):
        version = facts.versions.get("nnunet_fedharm", "")
        install = (
            "Unmodified nnU-Net v2 finds the trainer once `nnunet_fedharm` is installed in the same environment"
            + (f" (version {version} or a compatible one)" if version else "")
            + ": from a copy of its repository,\n\n```bash\npip install .\n```\n\nThen "
        )
    return (
        f"{install or 'With unmodified nnU-Net v2, '}install the zip and predict. Images are named `CASE_0000`, "
        "`CASE_0001`, ... in the "
        f"order of the channels.\n\n```bash\nnnUNetv2_install_pretrained_model_from_zip model.zip\n"
        f"nnUNetv2_predict -d {facts.dataset} -c {facts.configuration} -tr {facts.trainer} -p {facts.plans} -f {folds} "
        f"-chk {facts.checkpoint} -i IMAGES -o OUTPUT\n```"
    )


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
