"""The cells of a study: every arm, once for each seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nnunet_fedharm.harmonizers import LEARNED
from nnunet_fedharm.study.study_file import StudyFile
from nnunet_fedharm.study.study_tables import CONTROL


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        mode: central, federated or local.
        harmonizer: kind; "none" is plain nnU-Net.
        augmentation: nnU-Net's own.
        epsilon: of the training's differential privacy; None trains without.
        site: the one site of a local training, which learns from its own labels alone; else "".
    """

    mode: str
    harmonizer: str
    augmentation: bool = True
    epsilon: float | None = None
    site: str = ""

    @property
    def name(self) -> str:
        """For folders."""
        parts = [self.mode, self.site, self.harmonizer, "" if self.augmentation else "no-augmentation"]
        parts.append("" if self.epsilon is None else f"epsilon-{self.epsilon:g}")
        return "_".join(filter(None, parts))

    @property
    def title(self) -> str:
        """For tables."""
        if self.site:
            return f"{self.site} alone"
        kinds = {CONTROL: "plain nnU-Net", "augment": "strong augmentation"}
        name = kinds.get(self.harmonizer, self.harmonizer)
        name += "" if self.augmentation else " without augmentation"
        return f"{name}, {self.mode}" + ("" if self.epsilon is None else f", epsilon {self.epsilon:g}")


@dataclass(frozen=True)
class Cell:
    """One training."""

    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.arm.name}_seed-{self.seed}"


def augmented(study: StudyFile, arm: Arm) -> bool:
    """Whether an arm trains with nnU-Net's augmentation."""
    return arm.augmentation and (arm.epsilon is None or study.private_training.augmentation)


def harmonizer_epochs(study: StudyFile, arm: Arm) -> int:
    """Epochs of an arm's harmonizer phase; 0 where its kind has nothing to learn."""
    return study.training_at(arm.epsilon).harmonizer_epochs if arm.harmonizer in LEARNED else 0


def control_arm(study: StudyFile) -> Arm:
    """Plain nnU-Net, central where the study has that mode."""
    return Arm("central" if "central" in study.arms.modes else "federated", CONTROL)


def control_cell(study: StudyFile) -> Cell:
    """The control's first training: it judges the lesions in harmonized volumes, which are kept of the first seed."""
    return Cell(control_arm(study), study.subject.seeds[0])


def arms_of(study: StudyFile) -> list[Arm]:
    """Every arm, the control first."""
    return list(dict.fromkeys(_arms(study)))


def cells_of(study: StudyFile) -> list[Cell]:
    """Every cell; all arms of the first seed come before those of the second, so that a short study is a whole one."""
    return [Cell(arm, seed) for seed in study.subject.seeds for arm in arms_of(study)]


def _arms(study: StudyFile) -> Iterator[Arm]:
    asked = study.arms
    modes = [mode for mode in asked.modes if mode != "local"]
    yield control_arm(study)
    for mode in modes:
        yield Arm(mode, CONTROL)
    for name in asked.baselines:
        yield Arm("central", CONTROL, augmentation=False) if name == "no-augmentation" else Arm("central", name)
    for kind in asked.harmonizers:
        for mode in modes:
            yield Arm(mode, kind)
    for site in study.own_sites:
        if asked.oracle or ("local" in asked.modes and site in study.labelled_sites):
            yield Arm("local", CONTROL, site=site)
    for epsilon in asked.epsilons:
        for kind in asked.private_harmonizers:
            for mode in modes:
                yield Arm(mode, kind, epsilon=epsilon)
