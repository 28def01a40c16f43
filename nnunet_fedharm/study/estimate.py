"""What a study will cost, before it runs: from its own finished cells, else from timed steps of the planned network."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from nnunet_fedharm.errors import FedHarmError
from nnunet_fedharm.sites.files import read_dataset_json, read_json
from nnunet_fedharm.study.data import BASE_PLANS, StudyData
from nnunet_fedharm.study.matrix import Arm, Cell, harmonizer_epochs
from nnunet_fedharm.study.results import StudyResults
from nnunet_fedharm.study.site_report import seconds_of_site_report
from nnunet_fedharm.study.study_file import StudyFile
from nnunet_fedharm.trainers.names import trainer_name_for

TIMED_STEPS = 3
PRIVATE_FACTOR = 2.0
"""A patch of a step under differential privacy takes so many times longer than one of a plain step (benchmarks: 1.3 to 2)."""


@dataclass(frozen=True)
class Estimate:
    """Seconds of one cell.

    Attributes:
        seconds: None where nothing is known.
        basis: where the number comes from, for people.
    """

    seconds: float | None
    basis: str


UNPREPARED = Estimate(None, "not known before the data are prepared (`nnunet-fedharm study prepare`)")


class Estimator:
    """Estimates of a study's cells on one device."""

    def __init__(self, study: StudyFile, results: StudyResults, device: str) -> None:
        self.study = study
        self.results = results
        self.device = device
        self._step: float | None = None

    def of(self, cell: Cell) -> Estimate:
        """Time of a cell that has not run."""
        same = self._finished([arm for arm in self.results.by_arm if arm == cell.arm])
        if same is not None:
            return Estimate(same, "as its other seeds took")
        like = [arm for arm in self.results.by_arm if _alike(arm, cell.arm)]
        alike = self._finished(like)
        if alike is not None:
            return Estimate(alike, f"as {like[0].title} took")
        steps, control = self._steps(cell.arm), self.results.control
        if steps is None:
            return UNPREPARED
        took, in_control = self._finished([arm for arm in self.results.by_arm if arm == control]), self._steps(control)
        if took is not None and in_control:  # nearer to the truth than three steps, on a busy machine above all
            each = took / in_control
            return Estimate(each * steps, f"by the steps of {control.title}, {each:.2g} s each")
        step = self.seconds_of_step()
        if step is None:
            return UNPREPARED
        return Estimate(step * steps, f"{TIMED_STEPS} timed steps of the planned network, {step:.2g} s each")

    def _finished(self, arms: Sequence[Arm]) -> float | None:
        took = [
            result.cost.train_s + (result.cost.adapt_s or 0.0) for arm in arms for result in self.results.by_arm[arm]
        ]
        return median(took) if took else None

    def _steps(self, arm: Arm) -> float | None:
        """Plain steps that take as long; None where that depends on plans that are not made."""
        training = self.study.training_at(arm.epsilon)
        sites = len(self.study.labelled_sites) if arm.mode == "federated" else 1
        steps = (harmonizer_epochs(self.study, arm) + training.segmenter_epochs * sites) * training.iterations_per_epoch
        if arm.epsilon is None:
            return steps
        options = self.study.private(arm.epsilon)
        patches = options.patients_per_step * options.patches_per_patient
        plans = self._plans()
        if plans is None:
            return None
        batch_size = int(plans["configurations"][self.study.subject.configuration]["batch_size"])
        return steps * PRIVATE_FACTOR * patches / batch_size

    def _plans(self) -> dict[str, Any] | None:
        """None before the data are prepared."""
        data = StudyData(self.study)
        path = data.pooled.preprocessed / data.dataset_name / f"{BASE_PLANS}.json"
        return read_json(path, what="The study's plans") if path.is_file() else None

    def seconds_of_step(self) -> float | None:
        """Measured once on random patches; None before the data are prepared."""
        if self._step is None and (plans := self._plans()) is not None:
            self._step = _time_step(StudyData(self.study), plans, self.device)
        return self._step


def estimate_site_report(study: StudyFile) -> Estimate:
    """Time of the site report that is missing; unknown where something is in its way, which is then the basis."""
    try:
        return Estimate(seconds_of_site_report(study), "one measured case")
    except FedHarmError as error:
        return Estimate(None, str(error))


def _alike(finished: Arm, asked: Arm) -> bool:
    """Arms that take about the same time."""
    return (finished.mode, finished.harmonizer, finished.epsilon is None) == (
        asked.mode,
        asked.harmonizer,
        asked.epsilon is None,
    )


def _time_step(data: StudyData, plans: dict[str, Any], device: str) -> float:
    import torch

    from nnunet_fedharm.trainers.results import build_network

    configuration = data.study.subject.configuration
    planned = plans["configurations"][configuration]
    description = read_dataset_json(data.study.raw_dataset, site="study")
    network = build_network(plans, description, configuration, trainer_name_for("none")).to(device)
    shape = (planned["batch_size"], len(description["channel_names"]), *planned["patch_size"])
    image = torch.randn(shape, device=device)
    seconds = []
    for _ in range(TIMED_STEPS):
        began = time.perf_counter()
        outputs = network(image)
        sum(output.square().mean() for output in outputs).backward()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
