"""Who is drawn in the private steps of each phase, how often, and who votes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nnunet_fedharm.harmonizers.polarity import JudgedHarmonizer
from nnunet_fedharm.privacy.options import PrivacyOptions
from nnunet_fedharm.sites.registry import SITES_FILE, SitesFile
from nnunet_fedharm.trainers.patient_loader import Cases, by_patient

if TYPE_CHECKING:
    from nnunet_fedharm.trainers.fedharm_trainer import nnUNetTrainerFedHarm

HARMONIZER, SEGMENTER = "harmonizer training", "segmenter training"


@dataclass(frozen=True)
class Sampling:
    """One phase at one place.

    Attributes:
        patients: cases of each patient.
        sample_rate: probability of a patient in a step.
        steps_per_epoch, epochs: of the whole phase.
    """

    patients: tuple[Cases, ...]
    sample_rate: float
    steps_per_epoch: int
    epochs: int

    @property
    def expected(self) -> float:
        """Patients in a step, on average."""
        return self.sample_rate * len(self.patients)


def sampling_of(
    trainer: nnUNetTrainerFedHarm, options: PrivacyOptions, rates: Mapping[str, float]
) -> dict[str, Sampling]:
    """Phase -> its sampling, of the phases in which somebody here takes part.

    Args:
        rates: phase -> chance of a patient in a step; where none is given: by the options.
    """
    schedule = trainer.section.schedule
    found: dict[str, Sampling] = {}

    def add(what: str, cases: Sequence[str], epochs: int) -> None:
        patients = by_patient(cases, _patient_of(trainer))
        if patients:
            rate = rates.get(what) or options.sample_rate(len(patients))
            found[what] = Sampling(tuple(patients), rate, schedule.iterations_per_epoch, epochs)

    if trainer.harmonizer.learned and schedule.harmonizer_epochs:
        add(HARMONIZER, _harmonizer_cases(trainer), schedule.harmonizer_epochs)
    if Path(trainer.preprocessed_dataset_folder).is_dir():
        add(SEGMENTER, trainer.do_split()[0], schedule.segmenter_epochs)
    return found


def voting_sites(trainer: nnUNetTrainerFedHarm) -> dict[int, list[Cases]]:
    """site -> patients, of the sites that vote on their polarity."""
    harmonizer, schedule = trainer.harmonizer, trainer.section.schedule
    judged = isinstance(harmonizer, JudgedHarmonizer) and harmonizer.polarity_judge is not None
    if not judged or not schedule.harmonizer_epochs:
        return {}
    cases, patient_of = trainer.all_patches(np.random.default_rng()).cases, _patient_of(trainer)
    foreign = sorted({case.site for case in cases} - set(harmonizer.reference_sites()))
    return {site: by_patient([case.name for case in cases if case.site == site], patient_of) for site in foreign}


def most_votes_of_a_patient(trainer: nnUNetTrainerFedHarm, voters: Mapping[int, Sequence[Cases]]) -> int:
    """Largest number of sites in whose votes one patient is; 0 where nobody votes.

    Args:
        voters: as `voting_sites` gives them.
    """
    patient_of = _patient_of(trainer)
    counts = Counter(patient_of.get(cases[0], cases[0]) for patients in voters.values() for cases in patients)
    return max(counts.values(), default=0)


def _harmonizer_cases(trainer: nnUNetTrainerFedHarm) -> list[str]:
    training = trainer.harmonizer.make_training(lr=1.0, total_epochs=1)
    everybody = trainer.all_patches(np.random.default_rng())
    sites = set(trainer.harmonizer.reference_sites()) if training.uses_references else None
    return [
        case.name
        for case in everybody.cases
        if trainer.harmonizer.trains_on(case.site) and (sites is None or case.site in sites)
    ]


def _patient_of(trainer: nnUNetTrainerFedHarm) -> dict[str, str]:
    path = Path(trainer.preprocessed_dataset_folder_base) / SITES_FILE
    return dict(SitesFile.load(path).patients) if path.is_file() else {}
