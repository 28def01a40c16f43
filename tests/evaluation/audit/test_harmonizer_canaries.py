"""The one-run audit on the harmonizer's own private steps: silent on the real ones, loud on broken ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from nnunet_fedharm.errors import PrivacyError
from nnunet_fedharm.evaluation.audit.gradient_canaries import CanaryOptions, GradientAudit
from nnunet_fedharm.evaluation.audit.harmonizer_canaries import audit_harmonizer
from nnunet_fedharm.evaluation.audit.site import AuditedSite, audit_trainer
from nnunet_fedharm.planning.section import read_section, with_section
from nnunet_fedharm.privacy.patient_gradients import PatientGradients
from tests.evaluation.audit.broken import no_clipping, no_noise

DELTA = 1e-5
OPTIONS = {"epsilon": 2.0, "delta": DELTA, "patients_per_step": 3.0, "patches_per_patient": 1}
AUDIT = CanaryOptions(canaries=300, steps=10)

Break = Callable[[PatientGradients], None]


@pytest.fixture
def curve(site: AuditedSite) -> AuditedSite:
    """The site's plans with a harmonizer that learns, on the same preprocessed cases."""
    section = read_section(site.plans["configurations"]["2d"])
    learned = replace(section, kind="curve", harmonizer={}, schedule=replace(section.schedule, harmonizer_epochs=2))
    return replace(site, plans=with_section(dict(site.plans), learned, ("2d",)))


def audited(site: AuditedSite, breaking: Break | None = None) -> GradientAudit:
    with audit_trainer(site, site.privacy(OPTIONS)) as trainer:
        private = trainer.private
        assert private is not None
        honest = private.gradients

        def collector(what: str, parameters: object) -> PatientGradients:
            gradients = honest(what, parameters)
            if breaking is not None:
                breaking(gradients)
            return gradients

        private.gradients = collector  # type: ignore[method-assign]
        return audit_harmonizer(trainer, AUDIT, delta=DELTA)


def test_the_real_steps_are_not_refuted_and_nothing_is_suspicious(curve: AuditedSite) -> None:
    audit = audited(curve)
    assert 0.3 < audit.claimed < audit.found.most
    assert not audit.refuted
    assert audit.suspicions == []
    assert audit.measured.noise == pytest.approx(audit.noise_multiplier, rel=0.1)
    assert audit.measured.participation == pytest.approx(0.5, abs=0.05)
    assert audit.patients == 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("breaking", "word"), [(no_noise, "The noise is 0"), (no_clipping, "clipping promises at most 1")]
)
def test_broken_steps_are_refuted_and_their_cause_named(curve: AuditedSite, breaking: Break, word: str) -> None:
    audit = audited(curve, breaking)
    assert audit.refuted
    assert any(word in sentence for sentence in audit.suspicions)


def test_a_harmonizer_that_learns_nothing_has_nothing_to_audit(site: AuditedSite) -> None:
    with (
        audit_trainer(site, site.privacy(OPTIONS)) as trainer,
        pytest.raises(PrivacyError, match="'none' learns nothing"),
    ):
        audit_harmonizer(trainer, AUDIT, delta=DELTA)
