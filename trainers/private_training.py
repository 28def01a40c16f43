"""Training under differential privacy: what both phases share. The unit is the patient, see `privacy.patient_gradients`.

| released | mechanism |
|---|---|
| a step of the harmonizer's or the segmenter's optimizers | Gaussian noise on the sum of clipped gradients of drawn patients |
| a site's votes on its polarity, once, with the last harmonizer epoch | Gaussian noise on the mean of its patients' votes |

Gates are not judged by images, no validation runs, and no loss or Dice is written into a checkpoint or sent: each would be a
release of its own. Styles and a federated site's fingerprint are measured before the training, with noise of their own
(`planning.private_style`, `planning.private_summary`), which the noise of the training takes into account.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nnunet_fedharm.errors import PrivacyError
from nnunet_fedharm.harmonizers.polarity import JudgedHarmonizer
from nnunet_fedharm.harmonizers.training import HarmonizerTraining
from nnunet_fedharm.privacy.accounting import Noise
from nnunet_fedharm.privacy.ledger import Ledger
from nnunet_fedharm.privacy.noise import SecureNoise
from nnunet_fedharm.privacy.options import PRIVACY_FILE, RESERVE, PrivacyOptions, common_noise
from nnunet_fedharm.privacy.patient_gradients import PatientGradients, draw_patients, refuse_mixing_layers
from nnunet_fedharm.privacy.releases import GAUSSIAN, SUBSAMPLED, Release
from nnunet_fedharm.sites.files import write_json
from nnunet_fedharm.sites.registry import SITES_FILE, SitesFile
from nnunet_fedharm.trainers.patches import PatchSampler
from nnunet_fedharm.trainers.patient_loader import Cases, by_patient

if TYPE_CHECKING:
    from nnunet_fedharm.trainers.fedharm_trainer import nnUNetTrainerFedHarm

HARMONIZER, SEGMENTER, VOTES = "harmonizer training", "segmenter training", "votes on polarity"
VOTE_NOISE = 8.0
"""Least noise multiplier of the votes: one such release costs an epsilon of about 0.5 at delta 1e-5."""
VOTE_ERROR = 0.25
"""Standard deviation of the noise on a mean vote (-1 to 1) that large sites are content with."""


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


class PrivateTraining:
    """Noise, accounting and steps of one trainer under DP.

    Args:
        trainer: with its network and its site of each case.
        options: of the plans.
        ledger: of the site.
        run_id: names the run in the ledger.

    Raises:
        PrivacyError: several processes, batch norm, a delta too large for the patients, or a budget that does not last.
    """

    def __init__(self, trainer: nnUNetTrainerFedHarm, options: PrivacyOptions, *, ledger: Ledger, run_id: str) -> None:
        if trainer.is_ddp:
            raise PrivacyError("Differential privacy trains in one process: start it without -num_gpus.")
        refuse_mixing_layers(trainer.network)
        self.trainer = trainer
        self.options = options
        self.ledger = ledger
        self.run_id = run_id
        self.noise = SecureNoise()
        self.phases = self._phases()
        for phase in self.phases.values():
            options.check_delta(len(phase.patients))

    @classmethod
    def beside(cls, trainer: nnUNetTrainerFedHarm, options: PrivacyOptions) -> PrivateTraining:
        """With the ledger in the folder `fedharm` beside nnUNet_preprocessed, where a federation's site keeps its own."""
        root = Path(trainer.preprocessed_dataset_folder_base).parent.parent
        names = (trainer.plans_manager.dataset_name, trainer.plans_manager.plans_name, trainer.configuration_name)
        run_id = trainer.run_id or "/".join([*map(str, names), type(trainer).__name__, f"fold_{trainer.fold}"])
        return cls(trainer, options, ledger=Ledger(root / "fedharm"), run_id=run_id)

    @cached_property
    def noise_multiplier(self) -> float:
        """sigma of both phases."""
        parts = tuple((phase.sample_rate, phase.steps_per_epoch * phase.epochs) for phase in self.phases.values())
        settled = (*self.options.statistics_part, *map(self._vote_noise, self._voters))
        return common_noise(self.options.epsilon, self.options.delta, parts, settled)

    def check_budget(self, *, harmonizer_epochs: int, segmenter_epochs: int) -> None:
        """Refuse to go on with that many epochs ahead if the budget cannot hold them.

        Raises:
            PrivacyError: it cannot.
        """
        planned: list[Release] = []
        for what, epochs in ((HARMONIZER, harmonizer_epochs), (SEGMENTER, segmenter_epochs)):
            if what in self.phases and epochs > 0:
                planned.append(self._release(what, steps=epochs * self.phases[what].steps_per_epoch))
        if harmonizer_epochs > 0:
            planned += [self._vote_release(count) for count in self._voters]
        self.ledger.refuse_beyond(self.options.budget, planned)

    def record(self, what: str) -> None:
        """Enter an epoch into the ledger; call it before its weights are written or sent.

        Raises:
            PrivacyError: the budget is used up, by repeated epochs or by other runs.
        """
        if what not in self.phases:
            return  # nobody here takes part in it
        phase = self.phases[what]
        release = self._release(what, steps=phase.steps_per_epoch)
        former = [entry for entry in self.ledger.releases() if entry.run_id == self.run_id and entry.what == what]
        planned = math.ceil((1 + RESERVE) * phase.steps_per_epoch * phase.epochs)
        if sum(entry.steps for entry in former) + release.steps > planned:
            self.ledger.refuse_beyond(self.options.budget, [release])
        self.ledger.record(release)

    def spent(self) -> float:
        """Epsilon of all noisy releases of this place so far."""
        return self.ledger.spent(self.options.delta).epsilon

    def write_card(self, folder: Path) -> None:
        """Epsilon, delta and unit beside the checkpoints."""
        cost = self.ledger.spent(self.options.delta)
        write_json(
            {
                "unit": "patient",
                "epsilon": cost.epsilon,
                "delta": self.options.delta,
                "of": "all noisy releases of this place's ledger so far, this training among them",
                "without_noise": list(cost.unbounded),
                "noise_multiplier": self.noise_multiplier,
                "clip": self.options.clip,
                "phases": {
                    what: {"sample_rate": phase.sample_rate, "steps": phase.steps_per_epoch * phase.epochs}
                    for what, phase in self.phases.items()
                },
            },
            folder / PRIVACY_FILE,
        )

    def gradients(self, what: str, parameters: Any) -> PatientGradients:
        """Collector of a phase."""
        return PatientGradients(
            parameters,
            clip=self.options.clip,
            noise_multiplier=self.noise_multiplier,
            expected_patients=self.phases[what].expected,
            noise=self.noise,
        )

    def harmonizer_epoch(
        self, training: HarmonizerTraining, sampler: PatchSampler, *, generator: torch.Generator, last: bool
    ) -> dict[str, float]:
        """As `harmonizer_phase.harmonizer_epoch`, patient by patient; the caller calls `record` afterwards.

        Args:
            sampler: patches of everybody here.
            last: the votes are due.
        """
        harmonizer, device = training.harmonizer, self.trainer.device
        harmonizer.train()
        polarity = harmonizer.bank_polarity.clone()
        losses: list[float] = []
        phase = self.phases.get(HARMONIZER)
        if phase is not None:
            optimizers = training.optimizers.values()
            parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
            gradients = self.gradients(HARMONIZER, parameters)
            training.collecting = True
            for _ in range(phase.steps_per_epoch):
                for cases in draw_patients(phase.patients, phase.sample_rate):
                    image, sites = sampler.of(cases, self.options.patches_per_patient).next()
                    image = image.to(device)
                    gradients.start_patient()
                    references = image if training.uses_references else None
                    losses.append(training.step(image, sites.to(device), generator, references)["loss"])
                    gradients.end_patient()
                gradients.release()
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
            training.collecting = False
        harmonizer.bank_polarity.copy_(polarity)  # votes of single patches, without noise
        if last:
            self._vote(sampler)
        harmonizer.trained_epochs += 1
        return {"loss": sum(losses) / len(losses) if losses else math.nan}

    def segmenter_step(self, draw: Any, gradients: PatientGradients) -> list[float]:
        """Backward passes and the optimizer's step of one draw; the patients' losses, which stay here."""
        trainer, losses = self.trainer, []
        for batch in draw:
            trainer.tell_sites(batch)
            data = batch["data"].to(trainer.device, non_blocking=True)
            target = [t.to(trainer.device, non_blocking=True) for t in _as_list(batch["target"])]
            gradients.start_patient()
            # bfloat16: nnU-Net's float16 needs a scale that follows the gradients, which would be one more release.
            with torch.autocast(trainer.device.type, dtype=torch.bfloat16, enabled=trainer.device.type == "cuda"):
                loss = trainer.loss(trainer.network(data), target if isinstance(batch["target"], list) else target[0])
            loss.backward()
            gradients.end_patient()
            losses.append(float(loss.detach()))
        gradients.release()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)
        trainer.harmonizer.set_batch_styles(None)
        return losses

    def _vote(self, sampler: PatchSampler) -> None:
        """Mean vote of each site's patients, with noise, where it is due and is a release."""
        harmonizer = self.trainer.harmonizer
        if not isinstance(harmonizer, JudgedHarmonizer) or harmonizer.polarity_judge is None:
            return
        for site, patients in self._voting_sites.items():
            own = harmonizer.bank_quantiles[site : site + 1]
            total = torch.zeros_like(harmonizer.bank_polarity[site])
            for cases in patients:
                image, _ = sampler.of(cases, self.options.patches_per_patient).next()
                votes = harmonizer.votes(image.to(self.trainer.device), own.expand(len(image), -1, -1))
                total += torch.nan_to_num(votes).mean(dim=0)
            noise = self.noise(total.shape, total.device) * self._vote_noise(len(patients)).noise_multiplier
            harmonizer.bank_polarity[site] = ((total + noise * math.sqrt(total.numel())) / len(patients)).clamp(-1, 1)
            self.ledger.record(self._vote_release(len(patients)))

    def _phases(self) -> dict[str, Sampling]:
        trainer, schedule = self.trainer, self.trainer.section.schedule
        found: dict[str, Sampling] = {}
        if trainer.harmonizer.learned and schedule.harmonizer_epochs:
            training = trainer.harmonizer.make_training(lr=1.0, total_epochs=1)
            everybody = trainer.all_patches(np.random.default_rng())
            sites = set(trainer.harmonizer.reference_sites()) if training.uses_references else None
            cases = [
                case.name
                for case in everybody.cases
                if trainer.harmonizer.trains_on(case.site) and (sites is None or case.site in sites)
            ]
            found |= self._sampling(HARMONIZER, cases, schedule.harmonizer_epochs)
        if Path(trainer.preprocessed_dataset_folder).is_dir():
            found |= self._sampling(SEGMENTER, trainer.do_split()[0], schedule.segmenter_epochs)
        return found

    def _sampling(self, what: str, cases: Sequence[str], epochs: int) -> dict[str, Sampling]:
        patients = by_patient(cases, self._patient_of)
        if not patients:
            return {}
        rate = self.options.sample_rate(len(patients))
        steps = self.trainer.section.schedule.iterations_per_epoch
        return {what: Sampling(tuple(patients), rate, steps, epochs)}

    @cached_property
    def _patient_of(self) -> dict[str, str]:
        path = Path(self.trainer.preprocessed_dataset_folder_base) / SITES_FILE
        return dict(SitesFile.load(path).patients) if path.is_file() else {}

    @cached_property
    def _voting_sites(self) -> dict[int, list[Cases]]:
        """site -> patients, of the sites that vote."""
        harmonizer, schedule = self.trainer.harmonizer, self.trainer.section.schedule
        judged = isinstance(harmonizer, JudgedHarmonizer) and harmonizer.polarity_judge is not None
        if not judged or not schedule.harmonizer_epochs:
            return {}
        cases = self.trainer.all_patches(np.random.default_rng()).cases
        foreign = sorted({case.site for case in cases} - set(harmonizer.reference_sites()))
        return {
            site: by_patient([case.name for case in cases if case.site == site], self._patient_of) for site in foreign
        }

    @property
    def _voters(self) -> list[int]:
        """Patients of each voting site. Sites share no patient, but all are counted together: an upper bound."""
        return [len(patients) for patients in self._voting_sites.values()]

    def _vote_noise(self, patients: int) -> Noise:
        """One patient moves the sum of the votes of C channels by at most sqrt(C)."""
        channels = self.trainer.harmonizer.num_channels
        return Noise(max(VOTE_NOISE, VOTE_ERROR * patients / math.sqrt(channels)))

    def _vote_release(self, patients: int) -> Release:
        multiplier = self._vote_noise(patients).noise_multiplier
        return Release(what=VOTES, mechanism=GAUSSIAN, noise_multiplier=multiplier, run_id=self.run_id)

    def _release(self, what: str, *, steps: int) -> Release:
        rate = self.phases[what].sample_rate
        return Release(
            what=what,
            mechanism=SUBSAMPLED if rate < 1 else GAUSSIAN,
            noise_multiplier=self.noise_multiplier,
            sample_rate=rate,
            steps=steps,
            run_id=self.run_id,
        )


def _as_list(target: Any) -> list[Any]:
    return target if isinstance(target, list) else [target]
