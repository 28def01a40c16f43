"""The `fedharm` section of an nnU-Net configuration: harmonizer, styles and schedule.

nnU-Net keeps unknown keys of a configuration, copies them into each checkpoint's `init_args` and hands them to
`build_network_architecture`, so this section alone rebuilds the harmonizer under the stock `nnUNetv2_predict`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from nnunet_fedharm.errors import PlanError
from nnunet_fedharm.harmonizers import AT_REFERENCE
from nnunet_fedharm.harmonizers.style import Style, average_styles
from nnunet_fedharm.privacy.options import PrivacyOptions

SECTION = "fedharm"
SECTION_VERSION = 1
CONSENSUS = "consensus"
CONFIGURATIONS = ("2d", "3d_fullres")
PHASES = ("frozen", "alternate", "finetune")
TRAINABLE = ("norm", "encoder", "decoder", "heads")
"""Groups of the segmenter's tensors, as `trainers.groups` tells them apart."""
STOCK_PLANS = "nnUNetPlans"
_TAKEN = ("dataset", "dataset_fingerprint", "sites", "splits_final")
"""Other files of a preprocessed dataset's folder, where plans lie beside them."""
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def is_file_name(name: str) -> bool:
    """Whether a name stays in its folder, on every system."""
    return _FILE_NAME.fullmatch(name) is not None


def check_plans_name(name: str) -> None:
    """Refuse a name of plans that would overwrite what is not ours.

    Raises:
        PlanError: what would be overwritten, or signs that are no file's name.
    """
    if not is_file_name(name):
        raise PlanError(f"The plans name {name!r} is not usable; use letters, digits, '.', '_' and '-'.")
    if name == STOCK_PLANS:
        raise PlanError(f"Choose another plans name than {STOCK_PLANS}: stock nnU-Net's plans are never overwritten.")
    if name in _TAKEN:
        raise PlanError(
            f"Plans named {name} would overwrite {name}.json of the preprocessed dataset. Choose another plans name."
        )


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long each phase trains. The defaults of the segmenter phase are nnU-Net's own."""

    harmonizer_epochs: int = 0
    """Epochs of the harmonizer phase, which needs no labels; 0 for harmonizers that have nothing to learn."""
    segmenter_epochs: int = 1000
    """Epochs of the segmenter phase: nnU-Net's num_epochs, and the length of its learning-rate clock."""
    iterations_per_epoch: int = 250
    """Optimizer steps in one epoch of either phase."""
    val_iterations_per_epoch: int = 50
    """Validation patches batches per segmenter epoch."""
    initial_lr: float = 1e-2
    """Start of nnU-Net's polynomial decay for the segmenter."""
    momentum: float = 0.99
    """Nesterov momentum of the segmenter. nnU-Net's 0.99 averages over 100 steps; for rounds or trainings that are not much
    longer than that, 0.9 with ten times the learning rate learns many times faster at the same effective step."""
    harmonizer_lr: float = 1e-3
    """AdamW learning rate of the harmonizer phase."""
    phases: str = "frozen"
    """frozen: the harmonizer, then the segmenter behind the frozen harmonizer. alternate: blocks of both in turn. finetune: as
    frozen, but in the segmenter phase the segmentation loss moves the harmonizer too; not where some sites have no labels."""
    alternate_every: int = 50
    """Segmenter epochs in one block of `alternate`; the harmonizer epochs are spread evenly before the blocks."""
    finetune_lr_factor: float = 0.1
    """Learning rate of the harmonizer in `finetune`, as a share of the segmenter's."""
    augmentation: bool = True
    """nnU-Net's augmentation of the segmenter's patches. Without it a study sees what it gives; mirroring at prediction goes
    with it."""
    trained_groups: str = ""
    """Groups of the segmenter's tensors that are trained, comma separated: norm, encoder, decoder, heads; empty: all. The others
    stay as they start, without gradient and without noise: for a training from the weights of another one."""
    seed: int | None = None
    """Seed of the first weights and of every draw; with nnUNet_n_proc_DA=0 on a CPU a training then repeats exactly. None:
    nnU-Net's own behaviour, no seed."""

    def __post_init__(self) -> None:
        for name, least in (
            ("harmonizer_epochs", 0),
            ("segmenter_epochs", 1),
            ("iterations_per_epoch", 1),
            ("val_iterations_per_epoch", 1),
            ("alternate_every", 1),
        ):
            if getattr(self, name) < least:
                raise PlanError(f"schedule.{name} must be >= {least}, got {getattr(self, name)}.")
        if self.phases not in PHASES:
            raise PlanError(f"schedule.phases is {self.phases!r}; choose one of {', '.join(PHASES)}.")
        if self.phases == "alternate" and self.harmonizer_epochs == 0:
            raise PlanError(
                "schedule.phases is 'alternate', but harmonizer_epochs is 0: there is nothing to alternate with. "
                "Give harmonizer_epochs, or choose 'frozen'."
            )
        for name in self.groups:
            if name not in TRAINABLE:
                raise PlanError(f"schedule.trained_groups names {name!r}; choose among {', '.join(TRAINABLE)}.")
        if self.seed is not None and self.seed < 0:
            raise PlanError(f"schedule.seed must be >= 0 or null, got {self.seed}.")
        for name in ("initial_lr", "harmonizer_lr", "finetune_lr_factor"):
            if not getattr(self, name) > 0:
                raise PlanError(f"schedule.{name} must be > 0, got {getattr(self, name)}.")
        if not 0 < self.momentum < 1:
            raise PlanError(f"schedule.momentum must lie between 0 and 1, got {self.momentum}.")

    @property
    def groups(self) -> tuple[str, ...]:
        """`trained_groups` as names; empty for all."""
        return tuple(name.strip() for name in self.trained_groups.split(",") if name.strip())

    def harmonizer_epochs_before(self, segmenter_epoch: int) -> int:
        """Harmonizer epochs that are done when a segmenter epoch (from 0) starts; all of them unless phases alternate."""
        if self.phases != "alternate":
            return self.harmonizer_epochs
        blocks = -(-self.segmenter_epochs // self.alternate_every)
        block = min(segmenter_epoch // self.alternate_every, blocks - 1) + 1
        return -(-self.harmonizer_epochs * block // blocks)


UNIT = "patient"
"""Whose data epsilon and delta bound; it stands beside them in plans, and so in every checkpoint."""


def reads_styles(kind: str) -> bool:
    """Whether a harmonizer has any use for the sites' styles; who trains without one need not spend privacy on them."""
    return kind != "none"


def judge_of(options: Mapping[str, Any]) -> str:
    """Judge of contrast that a harmonizer's options ask for, one of `harmonizers.judges.JUDGES`."""
    return str(options.get("judge", "network"))


def private_judge(kind: str, options: Mapping[str, Any], *, private: bool, start_from: str) -> str:
    """What stands against a judge of contrast that has to learn privately from random weights; empty where nothing does.

    Args:
        options: of the harmonizer.
    """
    if not private or start_from or kind not in AT_REFERENCE:
        return ""
    if judge_of(options) == "linear" or not options.get("polarity", True):
        return ""
    return (
        f"The judge of {kind} is a network that starts from random weights and is trained under differential privacy. On 42 "
        "patients it missed the inverted site at epsilon 8 and guessed at 3 and below, and a judge that guesses turns sites over "
        'at random. Ask for judge "linear" in the harmonizer\'s options, or give start-from: a model of the same kind of public '
        "images of the same contrast, whose judge is taken."
    )


@dataclass(frozen=True)
class StartModel:
    """A model that a training started from. Its own patients are in the weights too, and no epsilon of the training covers them.

    Attributes:
        model: DATASET/TRAINER__PLANS__CONFIGURATION, the same on every machine; no path.
        epsilon, delta: of its own training, by patient; None where it was trained without differential privacy by patient.
    """

    model: str
    epsilon: float | None = None
    delta: float | None = None

    def __str__(self) -> str:
        bound = "without" if self.epsilon is None else f"at epsilon {self.epsilon:g} and delta {self.delta:g} of"
        return f"{self.model}, trained {bound} differential privacy by patient"


@dataclass(frozen=True, kw_only=True)
class FedHarmSection:
    """Parsed form of `configurations[*]["fedharm"]`.

    Attributes:
        kind: name of the harmonizer, one of `nnunet_fedharm.harmonizers.KINDS`.
        harmonizer: its sizes and loss weights; unknown keys are refused where it is built.
        reference: "consensus" (barycentre of all sites, each weighing the same) or a site's name.
        styles: site -> style, in the order of the style bank; may be empty before the bank is made.
        schedule: lengths and learning rates of the phases.
        privacy: differential privacy of the training; None trains without.
        start_from: checkpoint file that a training on this machine starts from; "" starts at random.
        starts: the model of these weights, then the one that it started from itself, and so on; for cards.
    """

    kind: str
    harmonizer: dict[str, Any] = field(default_factory=dict)
    reference: str = CONSENSUS
    styles: dict[str, Style] = field(default_factory=dict)
    schedule: Schedule = field(default_factory=Schedule)
    privacy: PrivacyOptions | None = None
    start_from: str = ""
    starts: tuple[StartModel, ...] = ()

    @property
    def reference_style(self) -> Style | None:
        """The style that the harmonizer maps to; None before the bank is made.

        Raises:
            PlanError: the reference site has no style in the bank.
        """
        if not self.styles:
            return None
        if self.reference == CONSENSUS:
            return average_styles(list(self.styles.values()))
        if self.reference not in self.styles:
            raise PlanError(
                f"The reference site {self.reference!r} has no style in the plans. "
                f"Choose one of {sorted(self.styles)} or {CONSENSUS!r}."
            )
        return self.styles[self.reference]

    def to_dict(self) -> dict[str, Any]:
        return {
            "version": SECTION_VERSION,
            "kind": self.kind,
            "harmonizer": deepcopy(self.harmonizer),
            "reference": self.reference,
            "styles": {site: style.to_dict() for site, style in self.styles.items()},
            "schedule": asdict(self.schedule),
            **({} if self.privacy is None else {"privacy": {**self.privacy.to_dict(), "unit": UNIT}}),
            **({"start_from": self.start_from} if self.start_from else {}),
            **({"starts": [asdict(start) for start in self.starts]} if self.starts else {}),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FedHarmSection:
        """Inverse of `to_dict`.

        Raises:
            PlanError: unknown version or key, missing kind, value out of range.
        """
        if data.get("version") != SECTION_VERSION:
            raise PlanError(
                f"The fedharm section has version {data.get('version')!r}; this release reads version {SECTION_VERSION}. "
                "Make the plans again with `nnunet-fedharm plan`."
            )
        known = {"version", "kind", "harmonizer", "reference", "styles", "schedule", "privacy", "start_from", "starts"}
        _refuse_unknown(set(data) - known, known, "fedharm section")
        if "kind" not in data:
            raise PlanError(
                "The fedharm section has no harmonizer kind. Make the plans again with `nnunet-fedharm plan`."
            )
        schedule_keys = {item.name for item in fields(Schedule)}
        schedule = dict(data.get("schedule", {}))
        if "finetune_harmonizer" in schedule:
            raise PlanError(
                'The fedharm schedule has the old key \'finetune_harmonizer\'. Write "phases": "finetune" instead of true, '
                '"phases": "frozen" instead of false.'
            )
        _refuse_unknown(set(schedule) - schedule_keys, schedule_keys, "fedharm schedule")
        private = data.get("privacy")
        if private is not None:
            options = {item.name for item in fields(PrivacyOptions)}
            private = dict(private)
            if private.pop("unit", UNIT) != UNIT:
                raise PlanError(
                    f"The privacy of these plans is not by {UNIT}; this release knows no other unit. Plan again."
                )
            _refuse_unknown(set(private) - options, options, "fedharm section's privacy")
        starts = [dict(start) for start in data.get("starts", [])]
        for start in starts:
            names = {item.name for item in fields(StartModel)}
            _refuse_unknown(set(start) - names, names, "fedharm section's starts")
        return cls(
            kind=str(data["kind"]),
            harmonizer=dict(data.get("harmonizer", {})),
            reference=str(data.get("reference", CONSENSUS)),
            styles={site: Style.from_dict(style) for site, style in dict(data.get("styles", {})).items()},
            schedule=Schedule(**schedule),
            privacy=None if private is None else PrivacyOptions(**private),
            start_from=str(data.get("start_from", "")),
            starts=tuple(StartModel(**start) for start in starts),
        )


def _refuse_unknown(unknown: set[str], known: set[str], where: str) -> None:
    if unknown:
        raise PlanError(f"Unknown key {sorted(unknown)[0]!r} in the {where}. Known keys: {', '.join(sorted(known))}.")


def read_section(configuration: Mapping[str, Any], *, configuration_name: str = "this configuration") -> FedHarmSection:
    """The section of one resolved configuration (`plans_manager.get_configuration(name).configuration`).

    Raises:
        PlanError: the section is missing.
    """
    if SECTION not in configuration:
        raise PlanError(
            f"The plans have no fedharm section for {configuration_name}. "
            "Add one with `nnunet-fedharm plan -d DATASET -c CONFIGURATION` or train with a stock nnU-Net trainer."
        )
    return FedHarmSection.from_dict(configuration[SECTION])


def with_section(
    plans: Mapping[str, Any], section: FedHarmSection, configuration_names: tuple[str, ...]
) -> dict[str, Any]:
    """A copy of the plans whose named configurations carry the section.

    Raises:
        PlanError: a configuration is missing from the plans, or is not supported (only 2d and 3d_fullres are).
    """
    changed = deepcopy(dict(plans))
    for name in configuration_names:
        if name not in CONFIGURATIONS:
            raise PlanError(f"Configuration {name!r} is not supported; choose one of {', '.join(CONFIGURATIONS)}.")
        if name not in changed["configurations"]:
            raise PlanError(
                f"The plans have no configuration {name!r}; they have {', '.join(sorted(changed['configurations']))}."
            )
        changed["configurations"][name][SECTION] = section.to_dict()
    return changed
