"""The one-run audit on our own private steps: silent on the real ones, loud on every broken one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from nnunet_fedharm.errors import PrivacyError
from nnunet_fedharm.evaluation.audit.gradient_canaries import (
    Canaries,
    CanaryOptions,
    GradientAudit,
    audit_gradients,
)
from nnunet_fedharm.evaluation.audit.patient_canaries import audit_patients
from nnunet_fedharm.evaluation.audit.site import AuditedSite, audit_trainer
from nnunet_fedharm.privacy.patient_gradients import PatientGradients
from nnunet_fedharm.trainers.fedharm_trainer import nnUNetTrainerFedHarm
from tests.evaluation.audit import broken

DELTA = 1e-5
OPTIONS = {"epsilon": 2.0, "delta": DELTA, "patients_per_step": 3.0, "patches_per_patient": 1}
"""Every second patient in each step; ten steps of thirty are audited, so the claim is an epsilon of about 1."""
AUDIT = CanaryOptions(canaries=500, steps=10)

Break = Callable[[PatientGradients], None]


def collector(trainer: nnUNetTrainerFedHarm) -> PatientGradients:
    assert trainer._gradients is not None
    return trainer._gradients


def everybody_every_step(trainer: nnUNetTrainerFedHarm) -> None:
    """Accounting of rare random draws, and all patients in each step."""
    trainer.dataloader_train.sample_rate = 1.0


def audited(
    site: AuditedSite,
    breaking: Break | None = None,
    options: CanaryOptions = AUDIT,
    *,
    before: Callable[[nnUNetTrainerFedHarm], None] | None = None,
    **privacy: float,
) -> GradientAudit:
    with audit_trainer(site, site.privacy({**OPTIONS, **privacy})) as trainer:
        if breaking is not None:
            breaking(collector(trainer))
        if before is not None:
            before(trainer)
        return audit_gradients(trainer, options, delta=DELTA)


def test_the_real_steps_are_not_refuted_and_nothing_is_suspicious(site: AuditedSite) -> None:
    audit = audited(site)
    assert 0.5 < audit.claimed < audit.found.most
    assert audit.found.epsilon_low <= audit.claimed
    assert not audit.refuted
    assert audit.suspicions == []
    assert audit.measured.noise == pytest.approx(audit.noise_multiplier, rel=0.1)
    assert audit.measured.participation == pytest.approx(0.5, abs=0.05)
    assert audit.found.canaries == 500
    assert audit.patients == 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("breaking", "word"),
    [
        (broken.no_noise, "The noise is 0"),
        (broken.no_clipping, "clipping promises at most 1"),
        (broken.noise_repeats, "new in every step"),
        (broken.tensors_share_noise, "Two tensors of a step share noise"),
    ],
)
def test_every_broken_mechanism_is_refuted_and_its_cause_named(site: AuditedSite, breaking: Break, word: str) -> None:
    audit = audited(site, breaking)
    assert audit.found.epsilon_low > audit.claimed
    assert audit.refuted
    assert any(word in sentence for sentence in audit.suspicions)


@pytest.mark.slow
def test_noise_of_the_wrong_scale_is_refuted_and_named(site: AuditedSite) -> None:
    audit = audited(site, broken.noise_of_a_mean, patients_per_step=6.0)
    assert audit.refuted
    assert any("less than the promised" in sentence for sentence in audit.suspicions)


@pytest.mark.slow
def test_all_patients_in_each_step_are_refuted_where_rare_draws_are_accounted_for(site: AuditedSite) -> None:
    audit = audited(site, before=everybody_every_step, patients_per_step=0.6)
    assert audit.sample_rate == pytest.approx(0.1)
    assert audit.refuted
    assert any("Canaries took part in 100.0%" in sentence for sentence in audit.suspicions)


def test_noise_averaged_over_the_names_of_a_tensor_is_suspicious_where_the_bound_is_too_weak(site: AuditedSite) -> None:
    audit = audited(site, broken.noise_by_name)
    assert any("less than the promised" in sentence for sentence in audit.suspicions)


def test_the_trainer_is_itself_again_after_the_audit(site: AuditedSite) -> None:
    with audit_trainer(site, site.privacy(OPTIONS)) as trainer:
        forward, loss = trainer.network.forward, trainer.loss
        audit_gradients(trainer, CanaryOptions(canaries=10, steps=1), delta=DELTA)
        assert trainer.network.forward == forward
        assert trainer.loss is loss
        assert not trainer.optimizer._optimizer_step_pre_hooks


def test_the_site_s_own_ledger_and_results_stay_as_they_are(site: AuditedSite) -> None:
    audited(site, options=CanaryOptions(canaries=10, steps=1))
    assert not list(site.root.path.glob("fedharm*"))
    assert not list(site.root.results.iterdir())


def test_without_a_number_there_are_as_many_as_few_weights_have_room_for() -> None:
    judge = [nn.Parameter(torch.zeros(size)) for size in (24, 8)]
    assert Canaries(judge, 1.0, CanaryOptions()).count == 32
    assert len(Canaries(judge, 1.0, CanaryOptions()).places) == 32
    assert Canaries([nn.Parameter(torch.zeros(5000))], 1.0, CanaryOptions()).count == 1000
    with pytest.raises(PrivacyError, match="room for 4 canaries, not for 10"):
        Canaries([nn.Parameter(torch.zeros(4))], 1.0, CanaryOptions())


def test_more_canaries_than_weights_are_refused(site: AuditedSite) -> None:
    with pytest.raises(PrivacyError, match="room for"):
        audited(site, options=CanaryOptions(canaries=10**6, steps=1))


def test_a_site_without_a_claim_is_told_how_to_make_one(site: AuditedSite) -> None:
    with pytest.raises(PrivacyError, match="--epsilon"):
        site.privacy({})


def test_real_patients_as_canaries_say_how_little_six_of_them_can_show(site: AuditedSite) -> None:
    with audit_trainer(site, site.privacy(OPTIONS)) as trainer:
        audit = audit_patients(trainer, steps=2, delta=DELTA)
    assert len(audit.scores) == 6
    assert audit.found.most < 1
    assert not audit.refuted


def test_without_noise_the_gradients_give_real_patients_away(site: AuditedSite) -> None:
    with audit_trainer(site, site.privacy({**OPTIONS, "patients_per_step": 6.0})) as trainer:
        broken.no_noise(collector(trainer))
        loader = trainer.dataloader_train
        patches = {patient: loader._load(patient) for patient in loader.patients}  # known to the auditor, and fixed
        loader._load = patches.__getitem__
        audit = audit_patients(trainer, steps=2, delta=DELTA)
    inside = [score for score, included in audit.scores if included]
    outside = [score for score, included in audit.scores if not included]
    assert min(inside) > max(outside)
