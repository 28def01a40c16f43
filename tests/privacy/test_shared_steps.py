"""Noise of private steps that sites add together: the central mechanism's price, and what is left of it alone."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from nnunet_fedharm.errors import PrivacyError
from nnunet_fedharm.privacy.accounting import Noise, epsilon_of
from nnunet_fedharm.privacy.fixed_point import Field, Layout, Share
from nnunet_fedharm.privacy.ledger import Ledger
from nnunet_fedharm.privacy.noise import SecureNoise
from nnunet_fedharm.privacy.options import PrivacyOptions
from nnunet_fedharm.privacy.releases import GAUSSIAN, Release
from nnunet_fedharm.privacy.shared_steps import SharedSteps, shared_steps, surplus
from nnunet_fedharm.privacy.site_level import REACH

OPTIONS = PrivacyOptions(epsilon=4.0, delta=1e-4, patients_per_step=16.0, style_noise=0.0, fingerprint_noise=0.0)
SHARED = SharedSteps(noise=2.0, sample_rate=0.25, rounds=20, delta=1e-4, least=4, colluding=1)


def test_the_noise_is_that_of_a_central_training_of_all_patients() -> None:
    shared = shared_steps(OPTIONS, styled=True, patients=160, rounds=20, least=4, colluding=1)
    assert shared.sample_rate == 0.1
    planned = epsilon_of([Noise(shared.noise, 0.1, shared.shares.releases)], 1e-4)
    assert 3.8 < planned <= 4.0
    alone = epsilon_of([Noise(shared.shares.share, 0.1, 20)], 1e-4)
    assert alone > planned, "one site's share hides less than all of them"
    assert surplus(shared, 4) == pytest.approx(math.sqrt(4 / 3)), "two would be noise at each of four sites"


def test_the_ledger_says_what_hides_from_the_server_and_what_from_everybody_together(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.record(Release(what="style of A", mechanism=GAUSSIAN, noise_multiplier=8.0))
    for _ in range(20):
        ledger.record(SHARED.release("segmenter training", steps=1, run_id="run"))
    spent = Ledger(tmp_path).spent(1e-4)
    assert spent.epsilon == pytest.approx(epsilon_of([Noise(8.0), Noise(2.0, 0.25, 20)], 1e-4))
    assert spent.alone == pytest.approx(epsilon_of([Noise(8.0), Noise(2.0 / math.sqrt(3), 0.25, 20)], 1e-4))
    assert spent.alone > spent.epsilon


@pytest.mark.parametrize("answered", [4, 5, 6])
def test_shares_of_those_that_answer_are_never_less_than_promised_without_the_colluding(answered: int) -> None:
    size, shares = 4000, SHARED.shares
    layout = Layout((Field("tensor:w", (size,), 10 + REACH * shares.share, weighted=False),), 6, 1, 5)
    shares.check_grid(size, 6, layout.step(layout.fields[0]))
    values = {"tensor:w": np.zeros(size)}
    vectors = [
        layout.encode(values, 1, Share(frozenset(["tensor:w"]), shares.share, SecureNoise().wide))
        for _ in range(answered)
    ]
    honest = layout.decode(np.sum(vectors[SHARED.colluding :], axis=0, dtype=np.uint64))
    assert honest.values["tensor:w"].std() >= 0.95 * SHARED.noise
    assert honest.values["tensor:w"].std() == pytest.approx(SHARED.noise * math.sqrt((answered - 1) / 3), rel=0.06)
    assert honest.clipped == 0, "how many entries were cut would tell something without noise"


def test_a_grid_that_epsilon_would_have_to_pay_for_is_refused() -> None:
    SHARED.shares.check_grid(350_000, 4, 1e-9)
    with pytest.raises(PrivacyError, match="Use more secure-bytes"):
        SHARED.shares.check_grid(350_000, 4, 1e-7)


def test_what_travels_comes_back_and_nonsense_is_refused() -> None:
    assert SharedSteps.from_dict(SHARED.to_dict()) == SHARED
    with pytest.raises(PrivacyError, match="cannot be read"):
        SharedSteps.from_dict({**SHARED.to_dict(), "noise": "much"})
    with pytest.raises(PrivacyError, match="no noise that anybody can rely on"):
        SharedSteps.from_dict({**SHARED.to_dict(), "colluding": 4})
    with pytest.raises(PrivacyError, match="All sites together: delta"):
        shared_steps(OPTIONS, styled=True, patients=20_000, rounds=20, least=4, colluding=1)
