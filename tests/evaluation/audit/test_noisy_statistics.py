"""The two-sample audit of noisy statistics: silent on the real ones, loud without noise and without bounds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from nnunet_fedharm.evaluation.audit import noisy_statistics
from nnunet_fedharm.evaluation.audit.noisy_statistics import StatisticAudit, audit_fingerprint, audit_style
from nnunet_fedharm.planning import private_style, private_summary
from nnunet_fedharm.privacy.noise import SecureNoise

Audit = Callable[..., StatisticAudit]
AUDITS = pytest.mark.parametrize("audit", [audit_fingerprint, audit_style])


@AUDITS
def test_the_real_statistics_are_not_refuted_and_the_canary_moves_them_by_all_it_may(audit: Audit) -> None:
    found = audit(noise_multiplier=1.0, draws=400)
    assert not found.refuted
    assert found.share == pytest.approx(1.0, abs=1e-6)
    assert 0.2 < found.epsilon_low < found.claimed < found.most, "enough draws to see a wrong claim"


class Silent(SecureNoise):
    """No noise at all, or hardly any."""

    def wide(self, count: int) -> np.ndarray:
        return 1e-3 * super().wide(count)

    def _normal(self, count: int) -> np.ndarray:
        return 1e-3 * super()._normal(count)


@AUDITS
def test_without_noise_they_are_refuted(audit: Audit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noisy_statistics, "SecureNoise", Silent)
    found = audit(noise_multiplier=1.0, draws=400)
    assert found.epsilon_low > found.claimed
    assert found.refuted


def test_without_bounds_on_a_patient_they_are_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_summary, "_cut", lambda vector: vector)
    monkeypatch.setattr(private_style.np, "minimum", lambda first, second: np.ones_like(second))
    for audit in (audit_fingerprint, audit_style):
        found = audit(noise_multiplier=1.0, draws=400)
        assert found.share > 1
        assert found.refuted
