"""`study.toml`: what a study compares, on which data, at which size."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from nnunet_fedharm.differences.notes import APPROXIMATE
from nnunet_fedharm.errors import CheckpointError, DataError
from nnunet_fedharm.harmonizers import KINDS, LEARNED
from nnunet_fedharm.planning.section import CONFIGURATIONS, StartModel
from nnunet_fedharm.planning.start import find_checkpoint, models_behind
from nnunet_fedharm.privacy.options import PrivacyOptions
from nnunet_fedharm.sites.files import labelled_cases, read_dataset_json
from nnunet_fedharm.sites.registry import SITES_FILE, SitesFile
from nnunet_fedharm.study.study_tables import (
    BASELINES,
    CONTROL,
    MODES,
    Arms,
    PrivateTraining,
    Report,
    Subject,
    Training,
)

STUDY_FILE = "study.toml"
FEWEST_LABELLED = 3
"""Labelled cases of a site that learns from its own."""
Part = TypeVar("Part")


@dataclass(frozen=True)
class StudyFile:
    """A checked study.

    Attributes:
        folder: where study.toml lies and everything is written.
        privacy: options of private trainings but epsilon, as `PrivacyOptions` names them.
        private_training: what private trainings do otherwise than `training` says.
    """

    folder: Path
    subject: Subject
    arms: Arms = field(default_factory=Arms)
    training: Training = field(default_factory=Training)
    report: Report = field(default_factory=Report)
    privacy: Mapping[str, Any] = field(default_factory=dict)
    private_training: PrivateTraining = field(default_factory=PrivateTraining)

    @property
    def raw_dataset(self) -> Path:
        """The dataset, absolute."""
        return (self.folder / Path(self.subject.dataset).expanduser()).resolve()

    @cached_property
    def registry(self) -> SitesFile:
        """sites.json of the dataset."""
        return SitesFile.load(self.raw_dataset / SITES_FILE)

    @property
    def sites(self) -> tuple[str, ...]:
        """All sites, in the order of sites.json."""
        return tuple(self.registry.sites)

    @property
    def held_out_sites(self) -> tuple[str, ...]:
        """Sites that take part in no central or federated training."""
        return tuple(site for site in self.sites if site in self.subject.held_out_sites)

    @property
    def training_sites(self) -> tuple[str, ...]:
        """Sites of central and federated trainings, with or without labels."""
        return tuple(site for site in self.sites if site not in self.subject.held_out_sites)

    @property
    def labelled_sites(self) -> tuple[str, ...]:
        """Sites whose labels are used; by default all training sites that have any."""
        return self.subject.labelled_sites or tuple(site for site in self.training_sites if self.label_counts[site])

    @cached_property
    def label_counts(self) -> dict[str, int]:
        """Labelled cases of each site in the dataset."""
        cases = labelled_cases(self.raw_dataset, read_dataset_json(self.raw_dataset, site="study"))
        owners = [self.registry.cases.get(case.case) for case in cases]
        return {site: owners.count(site) for site in self.sites}

    @property
    def own_sites(self) -> tuple[str, ...]:
        """Sites that can train on their own labels: two cases, and one to test on."""
        return tuple(site for site in self.sites if self.label_counts[site] >= FEWEST_LABELLED)

    @property
    def unlabelled_sites(self) -> tuple[str, ...]:
        """Sites whose labels are withheld, held-out sites among them: where harmonization has to show what it is good for."""
        return tuple(site for site in self.sites if site not in self.labelled_sites)

    @property
    def start(self) -> str:
        """Checkpoint that every training starts from, absolute; empty: random weights.

        Raises:
            DataError: there is none at `start_from`.
        """
        given = self.training.start_from
        try:
            return str(find_checkpoint(self.folder / Path(given).expanduser())) if given else ""
        except CheckpointError as error:
            raise DataError(f"start_from in {self.folder / STUDY_FILE}: {error}") from error

    @cached_property
    def starts(self) -> tuple[StartModel, ...]:
        """The models behind `start`, for cards; of one that is gone since the trainings, its name."""
        try:
            return models_behind(self.start)
        except (CheckpointError, DataError):
            return (StartModel(Path(self.training.start_from).name),)

    def private(self, epsilon: float) -> PrivacyOptions:
        """Options of a private training."""
        return PrivacyOptions(epsilon=epsilon, **self.privacy)

    @property
    def private_changes(self) -> dict[str, tuple[Any, Any]]:
        """What private arms do otherwise than the same arms without privacy: key -> value there, value here."""
        if not self.arms.epsilons:
            return {}
        plain, private = self.training, self.training_at(self.arms.epsilons[0])
        pairs = {item.name: (getattr(plain, item.name), getattr(private, item.name)) for item in fields(Training)}
        pairs["augmentation"] = (True, self.private_training.augmentation)
        if not set(self.arms.private_harmonizers) & set(LEARNED):
            del pairs["harmonizer_epochs"]
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def training_at(self, epsilon: float | None) -> Training:
        """Size and length of an arm; None: without differential privacy."""
        return self.training if epsilon is None else self.private_training.of(self.training)


def read_study(folder: Path) -> StudyFile:
    """The study of a folder.

    Raises:
        DataError: no study.toml, unknown keys, values that contradict each other or the data; the message names the key.
    """
    path = folder / STUDY_FILE
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing. Write one with `nnunet-fedharm study init`.") from error
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}). Mend the file.") from error
    known = ("study", "arms", "training", "report", "privacy")
    for key in content:
        if key not in known:
            raise DataError(f"{path} has the unknown table [{key}]. Known tables: {', '.join(known)}.")
    privacy, private_training = _read_privacy(content.get("privacy", {}), path)
    study = StudyFile(
        folder.resolve(),
        _read(Subject, content.get("study", {}), "study", path),
        _read(Arms, content.get("arms", {}), "arms", path),
        _read(Training, content.get("training", {}), "training", path),
        _read(Report, content.get("report", {}), "report", path),
        privacy,
        private_training,
    )
    _check(study, path)
    return study


def _read(part: type[Part], values: Any, table: str, path: Path) -> Part:
    known = {item.name: item for item in fields(part)}  # type: ignore[arg-type]
    _check_keys(values, known, table, path)
    missing = [name for name, item in known.items() if item.default is MISSING and name not in values]
    if missing:
        raise DataError(f"{path}: [{table}] needs {missing[0]!r}.")
    kinds = get_type_hints(part)
    return part(**{name: _value(value, kinds[name], name, table, path) for name, value in values.items()})


def _read_privacy(values: Any, path: Path) -> tuple[Mapping[str, Any], PrivateTraining]:
    """Options of privacy and the length of private arms, which share a table."""
    options = [item.name for item in fields(PrivacyOptions) if item.name != "epsilon"]
    lengths = [item.name for item in fields(PrivateTraining)]
    _check_keys(values, [*options, *lengths], "privacy", path)
    kinds = get_type_hints(PrivacyOptions) | get_type_hints(PrivateTraining)
    checked = {name: _value(value, kinds[name], name, "privacy", path) for name, value in values.items()}
    privacy = {name: value for name, value in checked.items() if name in options}
    PrivacyOptions(epsilon=1.0, **privacy)
    return privacy, PrivateTraining(**{name: value for name, value in checked.items() if name in lengths})


def _check_keys(values: Any, known: Collection[str], table: str, path: Path) -> None:
    if not isinstance(values, dict):
        raise DataError(f"{path}: {table} must be a table, [{table}], got {values!r}.")
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise DataError(f"{path}: unknown key {unknown[0]!r} in [{table}]. Known keys: {', '.join(known)}.")


def _value(value: Any, kind: Any, name: str, table: str, path: Path) -> Any:
    """A value as its dataclass has it: a list becomes a tuple, a whole number may stand for a number."""
    inside = get_args(kind)
    if inside and isinstance(value, list):
        what = f"each item of {name}"
        return tuple(_value(item, inside[0], what, table, path) for item in value)
    expected = tuple if inside else kind
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if inside or not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise DataError(f"{path}: {name} in [{table}] must be a {_WORDS[expected]}, got {value!r}.")
    return value


_WORDS: Mapping[Any, str] = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    tuple: "list",
}


def _check(study: StudyFile, path: Path) -> None:
    subject, arms = study.subject, study.arms
    _one_of(subject.configuration, CONFIGURATIONS, "configuration", path)
    for site in (subject.reference, *subject.labelled_sites, *subject.held_out_sites):
        _one_of(site, study.sites, "site", path)
    harmonizers = tuple(kind for kind in KINDS if kind not in (CONTROL, *BASELINES))
    for kind in arms.harmonizers:
        _one_of(kind, harmonizers, "harmonizer", path)
    for kind in arms.private_harmonizers:
        _one_of(kind, (CONTROL, *harmonizers), "kind in private_harmonizers", path)
    for mode in arms.modes:
        _one_of(mode, MODES, "mode", path)
    for name in arms.baselines:
        _one_of(name, BASELINES, "baseline", path)
    if not set(arms.modes) & {"central", "federated"}:
        raise DataError(f"{path}: modes needs central or federated, or there is nothing to compare.")
    if not subject.seeds or len(set(subject.seeds)) < len(subject.seeds) or min(subject.seeds) < 0:
        raise DataError(f"{path}: seeds must be different whole numbers from 0 on, got {list(subject.seeds)}.")
    if not 0 <= subject.hours < math.inf:
        raise DataError(f"{path}: hours must be a number from 0 on, got {subject.hours}.")
    if subject.site_report_cases and subject.site_report_cases < APPROXIMATE:
        raise DataError(
            f"{path}: site_report_cases must be 0 or at least {APPROXIMATE}, got {subject.site_report_cases}: a site with fewer "
            "patients is not judged."
        )
    if len(study.sites) < 2:
        raise DataError(f"{study.raw_dataset / SITES_FILE} lists {len(study.sites)} site; a study needs two or more.")
    _check_held_out(study, path)
    if not 0 < study.report.margin < 0.5:
        raise DataError(f"{path}: margin in [report] must lie between 0 and 0.5 Dice, got {study.report.margin:g}.")
    if not 0 <= study.report.least_dice < 1:
        raise DataError(
            f"{path}: least_dice in [report] must be at least 0 and below 1, got {study.report.least_dice:g}."
        )
    if not all(value > 0 for value in study.report.lesion_labels):
        given = list(study.report.lesion_labels)
        raise DataError(f"{path}: lesion_labels in [report] must be label values above 0, got {given}.")
    for epsilon in arms.epsilons:
        study.private(epsilon)
    if arms.epsilons and not arms.private_harmonizers:
        raise DataError(f'{path}: epsilons without private_harmonizers. Name kinds there, "none" for the control.')
    axes = 2 if subject.configuration == "2d" else 3
    if study.training.patch_size and len(study.training.patch_size) != axes:
        raise DataError(f"{path}: patch_size needs {axes} values for {subject.configuration}, or none.")
    if not all(size > 0 for size in study.training.patch_size):
        raise DataError(f"{path}: patch_size must be voxel counts above 0, got {list(study.training.patch_size)}.")
    for training in (study.training, study.private_training.of(study.training)):
        training.schedule(0, harmonizer_epochs=training.harmonizer_epochs)


def _check_held_out(study: StudyFile, path: Path) -> None:
    subject, cases = study.subject, study.registry.cases
    unknown = [case for case in subject.held_out_cases if case not in cases]
    if unknown:
        raise DataError(f"{path}: the case {unknown[0]} of held_out_cases is not in {study.raw_dataset / SITES_FILE}.")
    without = sorted(set(study.sites) - {cases[case] for case in subject.held_out_cases})
    if not 0 <= subject.held_out_fraction < 1 or (without and not subject.held_out_fraction):
        why = f", as held_out_cases has none of site {without[0]}" if without and subject.held_out_cases else ""
        raise DataError(f"{path}: held_out_fraction must lie between 0 and 1{why}, got {subject.held_out_fraction}.")
    if subject.reference in subject.held_out_sites:
        raise DataError(
            f"{path}: the reference {subject.reference!r} is in held_out_sites, but harmonizers are trained on its images. "
            "Choose another reference, or hold another site out."
        )
    both = [site for site in subject.labelled_sites if site in subject.held_out_sites]
    if both:
        raise DataError(
            f"{path}: {both[0]!r} is in labelled_sites and in held_out_sites, whose labels no training uses. "
            "Remove it from one of them."
        )
    if study.held_out_sites and "federated" in study.arms.modes and len(study.training_sites) < 2:
        raise DataError(
            f"{path}: held_out_sites leaves {study.training_sites[0]} alone to train with, but a federation needs two sites. "
            'Hold fewer sites out, or remove "federated" from modes.'
        )


def _one_of(value: str, known: tuple[str, ...], what: str, path: Path) -> None:
    if value not in known:
        raise DataError(f"{path}: unknown {what} {value!r}. Known: {', '.join(known)}.")
