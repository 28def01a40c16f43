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
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nnunet_fedharm.harmonizers import check_options
from nnunet_fedharm.harmonizers.polarity import JudgedHarmonizer
from nnunet_fedharm.harmonizers.training import HarmonizerTraining
from nnunet_fedharm.planning.section import reads_styles
from nnunet_fedharm.privacy.accounting import Noise
from nnunet_fedharm.privacy.ledger import Ledger
from nnunet_fedharm.privacy.noise import SecureNoise
from nnunet_fedharm.privacy.options import RESERVE, VOTE_NOISE, PrivacyOptions, common_noise
from nnunet_fedharm.privacy.patient_gradients import PatientGradients, draw_patients, refuse_mixing_layers
from nnunet_fedharm.privacy.releases import GAUSSIAN, SUBSAMPLED, Release
from nnunet_fedharm.privacy.shared_steps import SharedSteps
from nnunet_fedharm.privacy.votes import private_votes
from nnunet_fedharm.trainers.patches import PatchSampler
from nnunet_fedharm.trainers.patient_loader import Cases
from nnunet_fedharm.trainers.private_card import write_privacy_card
from nnunet_fedharm.trainers.private_sampling import (
    HARMONIZER,
    SEGMENTER,
    most_votes_of_a_patient,
    sampling_of,
    voting_sites,
)

if TYPE_CHECKING:
    from nnunet_fedharm.trainers.fedharm_trainer import nnUNetTrainerFedHarm

VOTES = "votes on polarity"
VOTE_ERROR = 0.25
"""Standard deviation of the noise on a mean vote (-1 to 1) that large sites are content with."""


class PrivateTraining:
    """Noise, accounting and steps of one trainer under DP.

    Args:
        trainer: with its network and its site of each case.
        options: of the plans.
        ledger: of the site.
        run_id: names the run in the ledger.
        shared: the segmenter's noise is shared with other sites and not added here, see `clipped_sum`, and its size holds for the
            harmonizer's own; None adds all of it here.

    Raises:
        PlanError: a harmonizer that is not for it.
        PrivacyError: batch norm, a delta too large for the patients, or a budget that does not last.
    """

    def __init__(
        self,
        trainer: nnUNetTrainerFedHarm,
        options: PrivacyOptions,
        *,
        ledger: Ledger,
        run_id: str,
        shared: SharedSteps | None = None,
    ) -> None:
        refuse_mixing_layers(trainer.network)
        check_options(trainer.section.kind, trainer.section.harmonizer, private=True)
        self.trainer = trainer
        self.options = options
        self.ledger = ledger
        self.run_id = run_id
        self.shared = shared
        self.noise = SecureNoise()
        self._held: dict[str, int] = {}
        """Steps that `check_budget` has held against the budget and that are not entered yet."""
        rates = {} if shared is None else {SEGMENTER: shared.sample_rate, HARMONIZER: shared.harmonizer_rate}
        self.phases = sampling_of(trainer, options, rates)
        for phase in self.phases.values():
            options.check_delta(len(phase.patients))

    @classmethod
    def beside(
        cls, trainer: nnUNetTrainerFedHarm, options: PrivacyOptions, *, shared: SharedSteps | None = None
    ) -> PrivateTraining:
        """With the ledger in the folder `fedharm` beside nnUNet_preprocessed, where a federation's site keeps its own."""
        root = Path(trainer.preprocessed_dataset_folder_base).parent.parent
        names = (trainer.plans_manager.dataset_name, trainer.plans_manager.plans_name, trainer.configuration_name)
        run_id = trainer.run_id or "/".join([*map(str, names), type(trainer).__name__, f"fold_{trainer.fold}"])
        return cls(trainer, options, ledger=Ledger(root / "fedharm"), run_id=run_id, shared=shared)

    @cached_property
    def noise_multiplier(self) -> float:
        """sigma of both phases."""
        if self.shared is not None:
            return self.shared.noise
        parts = tuple((phase.sample_rate, phase.steps_per_epoch * phase.epochs) for phase in self.phases.values())
        settled = (
            *self.options.statistics_part(styled=reads_styles(self.trainer.section.kind)),
            *(Noise(release.noise_multiplier) for release in self._vote_releases),
        )
        return common_noise(self.options.epsilon, self.options.delta, parts, settled)

    def check_budget(self, *, harmonizer_epochs: int, segmenter_epochs: int) -> None:
        """Refuse to go on with that many epochs ahead if the budget cannot hold them.

        Raises:
            PrivacyError: it cannot.
        """
        planned: list[Release] = []
        self._held.clear()
        for what, epochs in ((HARMONIZER, harmonizer_epochs), (SEGMENTER, segmenter_epochs)):
            if what in self.phases and epochs > 0:
                self._held[what] = epochs * self.phases[what].steps_per_epoch
                planned.append(self._release(what, steps=self._held[what]))
        if harmonizer_epochs > 0:
            planned += self._vote_releases
        self.ledger.refuse_beyond(self.options.budget, planned)

    def record(self, what: str) -> None:
        """Enter an epoch into the ledger; call it before its weights are written or sent.

        Raises:
            PrivacyError: the budget is used up, by repeated epochs or by what others released here in the meantime.
        """
        if what not in self.phases:
            return  # nobody here takes part in it
        phase = self.phases[what]
        release = self._release(what, steps=phase.steps_per_epoch)
        planned = math.ceil((1 + RESERVE) * phase.steps_per_epoch * phase.epochs)
        self._held[what] = self._held.get(what, 0) - release.steps
        # In a federation the server says how many are ahead: nobody's word counts for more than what was held.
        if self._held[what] < 0 or self.ledger.steps_of(self.run_id, what) + release.steps > planned:
            self.ledger.refuse_beyond(self.options.budget, [release])
        self.ledger.record(release, within=self.options.budget)

    def spent(self) -> float:
        """Epsilon of all noisy releases of this place so far."""
        return self.ledger.spent(self.options.delta).epsilon

    def write_card(self, folder: Path) -> None:
        """Epsilon, delta and unit beside the checkpoints."""
        phases = {
            what: {"sample_rate": phase.sample_rate, "steps": phase.steps_per_epoch * phase.epochs}
            for what, phase in self.phases.items()
        }
        facts = {"noise_multiplier": self.noise_multiplier, "clip": self.options.clip, "phases": phases}
        write_privacy_card(folder, self.ledger, self.options.delta, facts)

    def gradients(self, what: str, parameters: Any) -> PatientGradients:
        """Collector of a phase."""
        return PatientGradients(
            parameters,
            clip=self.options.clip,
            noise_multiplier=0.0 if self.shared is not None and what == SEGMENTER else self.noise_multiplier,
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
        losses = self.collect(draw, gradients)
        gradients.release()
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad(set_to_none=True)
        return losses

    def collect(self, draw: Any, gradients: PatientGradients) -> list[float]:
        """The backward passes of one draw; the patients' losses, which stay here."""
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
        trainer.harmonizer.set_batch_styles(None)
        return losses

    def votes(self, sampler: PatchSampler) -> dict[int, torch.Tensor]:
        """site -> (patients, C), each patient's mean vote, of the sites that vote; exact, so they stay at this place."""
        harmonizer, found = self.trainer.harmonizer, {}
        if not isinstance(harmonizer, JudgedHarmonizer) or harmonizer.polarity_judge is None:
            return {}
        for site, patients in self._voting_sites.items():
            own, rows = harmonizer.bank_quantiles[site : site + 1], []
            for cases in patients:
                image, _ = sampler.of(cases, self.options.patches_per_patient).next()
                votes = harmonizer.votes(image.to(self.trainer.device), own.expand(len(image), -1, -1))
                rows.append(torch.nan_to_num(votes).mean(dim=0))
            found[site] = torch.stack(rows)
        return found

    def vote_noise(self, patients: int) -> Noise:
        """Of a site's votes; one of so many patients moves the sum of the votes of C channels by at most sqrt(C).

        Who was scanned at m sites is in the votes of each: all noise is sqrt(m) times as large then, as that of styles.
        """
        sites = max(1, most_votes_of_a_patient(self.trainer, self._voting_sites))
        return Noise(math.sqrt(sites) * self._least_vote_noise(patients))

    def _least_vote_noise(self, patients: int) -> float:
        return max(VOTE_NOISE, VOTE_ERROR * patients / math.sqrt(self.trainer.harmonizer.num_channels))

    def _vote(self, sampler: PatchSampler) -> None:
        """Mean vote of each site's patients, with noise, where it is due and is a release."""
        for release in self._vote_releases:
            self.ledger.record(release, within=self.options.budget)
        for site, votes in self.votes(sampler).items():
            multiplier = self.vote_noise(len(votes)).noise_multiplier
            told = private_votes(votes, noise_multiplier=multiplier, noise=self.noise)
            self.trainer.harmonizer.bank_polarity[site] = told

    @property
    def _vote_releases(self) -> list[Release]:
        """The votes of all sites here, which cost a patient what those of the own site do: the least noise among them."""
        least = [self._least_vote_noise(len(patients)) for patients in self._voting_sites.values()]
        return (
            [Release(what=VOTES, mechanism=GAUSSIAN, noise_multiplier=min(least), run_id=self.run_id)] if least else []
        )

    @cached_property
    def _voting_sites(self) -> dict[int, list[Cases]]:
        """site -> patients, of the sites that vote."""
        return voting_sites(self.trainer)

    def _release(self, what: str, *, steps: int) -> Release:
        if self.shared is not None and what == SEGMENTER:
            return self.shared.release(what, steps=steps, run_id=self.run_id)
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
