"""A small two-class dataset, planned for private training and preprocessed once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nnunet_fedharm.evaluation.audit.site import AuditedSite
from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.planning.central import CentralOptions, plan_central
from nnunet_fedharm.planning.planner import PlanOptions
from nnunet_fedharm.planning.section import Schedule

NAME = "Dataset001_Blobs"
SCHEDULE = Schedule(
    harmonizer_epochs=0, segmenter_epochs=3, iterations_per_epoch=10, val_iterations_per_epoch=1, momentum=0.9
)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory, make_raw_dataset: Callable[..., Path]) -> AuditedSite:
    """Six labelled cases and a 2d network of some thousand weights; no privacy in the plans."""
    torch.set_num_threads(1)
    root = NnunetRoot(tmp_path_factory.mktemp("audit")).create()
    make_raw_dataset(root.raw, name=NAME, n_labelled=6)
    options = CentralOptions(
        configurations=("2d",),
        kind="none",
        schedule=SCHEDULE,
        plan=PlanOptions(base_features=8, max_features=16, batch_size=2, plans_name="plans_audit"),
    )
    plans = plan_central(root, "1", options)
    return AuditedSite(root=root, dataset_name=NAME, plans=plans, configuration="2d", fold="all")
