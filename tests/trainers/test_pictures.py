"""progress.png of a site's rounds: there, never old, and not drawn for every epoch."""

from __future__ import annotations

import copy
import os
import time
from pathlib import Path

import pytest

from nnunet_fedharm.trainers.pictures import EVERY_S
from tests.trainers.conftest import Planned
from tests.trainers.test_local_training import site, start


@pytest.mark.pictures
def test_a_site_draws_its_first_round_what_has_become_old_and_its_last_round(active: Planned, tmp_path: Path) -> None:
    training = site(active, tmp_path)
    training.plans = copy.deepcopy(training.plans)
    training.plans["configurations"]["2d"]["fedharm"]["schedule"]["segmenter_epochs"] = 4
    for left in active.root.results.rglob("progress.png"):
        left.unlink()
    drawn, weights = [], start(active)
    for number, age in enumerate((0.0, EVERY_S / 2, EVERY_S + 60, EVERY_S / 2)):
        pictures = list(active.root.results.rglob("progress.png"))
        before = time.time() - age
        for path in pictures:
            os.utime(path, (before, before))
        weights = training.run(
            phase="segmenter", round_index=number, first_epoch=number, epochs=1, weights=weights
        ).weights
        (picture,) = active.root.results.rglob("progress.png")
        drawn.append(not pictures or picture.stat().st_mtime > before + 1)
    assert drawn == [True, False, True, True]
