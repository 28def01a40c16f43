"""Privacy of whole sites and a trained model as the start: a federation for each place of the noise, one through real Flower."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nnunet_fedharm.federation.launch import federate
from nnunet_fedharm.federation.server_app import run_server
from nnunet_fedharm.privacy.ledger import Ledger
from nnunet_fedharm.privacy.options import PRIVACY_FILE
from tests.federation.local_grid import LocalGrid
from tests.federation.test_in_process import real_sites, tiny

pytestmark = [pytest.mark.slow, pytest.mark.long]

PLACES: dict[str, dict[str, Any]] = {
    "server": {"weighting": "sites"},
    "distributed": {"secure_aggregation": "all"},
    "local": {"weighting": "sites"},
}


def weights_of(fold: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(fold / "checkpoint_final.pth", map_location="cpu", weights_only=False)
    weights: dict[str, torch.Tensor] = checkpoint["network_weights"]
    return weights


def test_noise_of_each_place_starts_from_a_trained_model_and_says_what_it_promises(
    tmp_path: Path, make_consortium: Callable[..., Path]
) -> None:
    root = make_consortium(tmp_path / "consortium", {"A": (2, 0), "B": (2, 0), "C": (2, 0)})
    start = ""
    for mode, options in PLACES.items():
        config = tiny(
            root,
            segmenter_rounds=1,
            start_from=start,
            site_dp=mode,
            site_clip=1e-4,
            site_noise=0.5,
            delta=1e-3,
            join_wait_s=120.0,
            deadline_s=600.0,
            **options,
        )
        real = mode == "distributed"  # secure sums: most messages; the other two differ from it in no message
        fold = federate(config, show=lambda _: None) if real else run_server(LocalGrid(real_sites(config, 3)), config)
        said = json.loads((fold / PRIVACY_FILE).read_text())["site_level"]
        assert (said["mode"], said["unit"], said["delta"]) == (mode, "site", 1e-3)
        for site in "ABC":
            (own,) = (root / "sites" / site / "nnUNet_results").rglob(PRIVACY_FILE)
            assert json.loads(own.read_text())["site_level"] == said
            entries = [e for e in Ledger(root / "sites" / site / "fedharm").releases() if e.what.startswith("weights")]
            bounded = [e.bounded for e in entries]
            assert bounded == [False, True, True][: len(entries)], "the server's noise is not the site's own"
        for model in (fold.parent, own.parents[1]):
            section = json.loads((model / "plans.json").read_text())["configurations"]["2d"]["fedharm"]
            assert len(section.get("starts", [])) == bool(start), "who has the model can say what it started from"
        if start:
            before, after = weights_of(Path(start) / "fold_all"), weights_of(fold)
            moved = [float((before[name].float() - after[name].float()).abs().max()) for name in before]
            assert 0 < max(moved) < 5e-4, "clipped updates and noise of 1e-4 about the start"
        else:
            shutil.copytree(fold.parent, tmp_path / "model")
            start = str(tmp_path / "model")
