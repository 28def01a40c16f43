"""What the end of a harmonizer phase is told to the coordinator."""

from __future__ import annotations

import numpy as np

from nnunet_fedharm.federation.config import FederateConfig
from nnunet_fedharm.federation.phase_end import doubt_of
from nnunet_fedharm.harmonizers.style import QUANTILE_LEVELS, Style
from nnunet_fedharm.planning.section import FedHarmSection, Schedule, with_section


def test_undecided_sites_are_named_with_or_without_a_loss() -> None:
    config = FederateConfig(harmonizer="polarity", harmonizer_rounds=1)
    style = Style(np.linspace(-2, 2, len(QUANTILE_LEVELS))[None].repeat(2, 0), np.ones(2), 3)
    section = FedHarmSection(
        kind="polarity", reference="A", styles={"A": style, "north": style}, schedule=Schedule(harmonizer_epochs=1)
    )
    plans = with_section({"configurations": {config.configuration: {}}}, section, (config.configuration,))
    weights = {"harmonizer.bank_polarity": np.array([[1.0, 1.0], [0.9, -0.1]], dtype=np.float32)}
    for loss in (0.2, None):
        assert "not decided for north -0.10" in doubt_of(config, plans, loss, weights)
    weights["harmonizer.bank_polarity"][1, 1] = -0.9
    assert doubt_of(config, plans, None, weights) == ""
    assert "guesses" in doubt_of(config, plans, 0.69, {})
