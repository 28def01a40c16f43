"""Why each value of the plans is what it is: the same words on the terminal and in `<plans name>_explained.md`."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from nnunet_fedharm.harmonizers.cyclegan import CycleGANConfig
from nnunet_fedharm.harmonizers.flow import FlowConfig
from nnunet_fedharm.harmonizers.upright import PolarityConfig
from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.planning.defaults import Choice, suggest_options, suggest_schedule
from nnunet_fedharm.planning.section import SECTION, FedHarmSection, Schedule, judge_of
from nnunet_fedharm.planning.situation import Device, Situation, situation_of
from nnunet_fedharm.sites.files import write_text

CONFIGS: dict[str, type[Any]] = {"diffusion": FlowConfig, "cyclegan": CycleGANConfig, "polarity": PolarityConfig}
"""Kinds of whose options the rules choose some, and the dataclass of these."""
CHOSEN = {"diffusion": ("width", "depth"), "cyclegan": ("width", "dilations")}
"""Kinds whose network has a size, and what makes it."""


@dataclass(frozen=True)
class Explained:
    """One value of the plans.

    Attributes:
        name: as it stands in the plans.
        value: as it stands in the plans.
        meaning: what it does.
        reason: why it has this value here.
    """

    name: str
    value: Any
    meaning: str
    reason: str


def explain(plans: Mapping[str, Any], device: Device) -> dict[str, list[Explained]]:
    """Configuration -> its explained values, of the configurations that have a `fedharm` section.

    A value that the rules would not choose on this device was set by hand, or chosen for another device; it says so.

    Raises:
        PlanError: a section cannot be read.
    """
    found = {}
    for name, configuration in plans["configurations"].items():
        if SECTION in configuration:
            section = FedHarmSection.from_dict(configuration[SECTION])
            situation = situation_of(
                configuration,
                kind=section.kind,
                reference=section.reference,
                styles=section.styles,
                device=device,
                private=section.privacy is not None,
            )
            situation = replace(situation, judge=judge_of(section.harmonizer))
            found[name] = [*_network(configuration), *_harmonizer(section, situation), *_schedule(section, situation)]
    return found


def _network(configuration: Mapping[str, Any]) -> list[Explained]:
    features = configuration["architecture"]["arch_kwargs"]["features_per_stage"]
    rows = (
        ("patch_size", configuration["patch_size"], "Voxels that the networks see at once."),
        ("batch_size", configuration["batch_size"], "Patches in one optimizer step."),
        ("features_per_stage", features, "Channels of the segmenter, stage by stage."),
    )
    return [Explained(name, value, meaning, "nnU-Net's planner") for name, value, meaning in rows]


def _harmonizer(section: FedHarmSection, situation: Situation) -> list[Explained]:
    images = ", ".join(f"{site} {count}" for site, count in situation.images.items())
    reference = f"asked for; training images: {images or 'none'}"
    rows = [
        Explained("kind", section.kind, "Harmonizer in front of the segmenter.", "asked for"),
        Explained("reference", section.reference, "Site, or mean of sites, whose appearance is mapped to.", reference),
    ]
    if section.kind not in CONFIGS:
        return rows
    config, given = CONFIGS[section.kind], section.harmonizer
    free = {name: value for name, value in given.items() if name not in (*CHOSEN.get(section.kind, ()), "judge")}
    meanings, choices = field_docstrings(config), suggest_options(situation, free)
    own = {item.name: item.default for item in fields(config)}
    for name, choice in choices.items():
        value = given.get(name, own[name])
        rows.append(Explained(name, value, _first_sentence(meanings[name]), _reason(value, choice)))
    if section.kind in CHOSEN:
        cost = situation.cost(given)
        ratios = f"training step {cost.training:.2f}, prediction {cost.prediction:.2f}"
        what = "Time with the harmonizer over the plain segmenter's, counted from convolutions."
        rows.append(Explained("cost", ratios, what, "`benchmarks/harmonizer_cost.py` measures it"))
    others = {name: value for name, value in given.items() if name not in choices}
    rows += [Explained(name, value, _first_sentence(meanings[name]), "set by hand") for name, value in others.items()]
    return rows


def _schedule(section: FedHarmSection, situation: Situation) -> list[Explained]:
    values = {item.name: getattr(section.schedule, item.name) for item in fields(Schedule)}
    meanings, choices = field_docstrings(Schedule), suggest_schedule(situation, values)
    return [
        Explained(name, value, _first_sentence(meanings[name]), _reason(value, choices[name]))
        for name, value in values.items()
    ]


def _reason(value: Any, choice: Choice) -> str:
    if value == choice.value or (isinstance(value, (list, tuple)) and list(value) == list(choice.value)):
        return choice.reason
    return f"set by hand, or for another device; the rule for this one: {choice.value} ({choice.reason})"


def _first_sentence(text: str) -> str:
    return text.split(". ")[0].rstrip(".") + "."


def markdown(plans_name: str, explained: Mapping[str, list[Explained]], device: Device) -> str:
    """The table as a page."""
    lines = [
        f"# Values of {plans_name}",
        "",
        f"Explained for: {device}. `nnunet-fedharm plan --explain` prints this again.",
    ]
    for configuration, rows in explained.items():
        lines += ["", f"## {configuration}", "", "| value | | what it means | why here |", "|---|---|---|---|"]
        for row in rows:
            cells = (f"`{row.name}`", str(row.value), row.meaning, row.reason)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def explanation_file(root: NnunetRoot, plans: Mapping[str, Any]) -> Path:
    """Where the explanations of plans lie."""
    return root.preprocessed / str(plans["dataset_name"]) / f"{plans['plans_name']}_explained.md"


def write_explanation(root: NnunetRoot, plans: Mapping[str, Any], device: Device) -> None:
    """Write the page beside the plans.

    Raises:
        SetupError: the folder cannot be written.
    """
    write_text(markdown(str(plans["plans_name"]), explain(plans, device), device), explanation_file(root, plans))


def field_docstrings(cls: type[Any]) -> dict[str, str]:
    """Field name -> the string literal that follows it in the class's source, on one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    statements = body.body if isinstance(body, ast.ClassDef) else []
    found = {}
    for before, after in pairwise(statements):
        if (
            isinstance(before, ast.AnnAssign)
            and isinstance(before.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            found[before.target.id] = " ".join(str(after.value.value).split())
    return found
