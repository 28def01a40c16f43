"""A two-site dataset, planned small and preprocessed once for all trainer tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.planning.central import CentralOptions, plan_central
from nnunet_fedharm.planning.planner import PlanOptions
from nnunet_fedharm.planning.section import Schedule

NAME = "Dataset001_Blobs"
SCHEDULE = Schedule(
    harmonizer_epochs=2, segmenter_epochs=3, iterations_per_epoch=2, val_iterations_per_epoch=1, harmonizer_lr=1e-2
)


@dataclass(frozen=True)
class Planned:
    """A preprocessed dataset."""

    root: NnunetRoot
    plans: dict[str, dict[str, Any]]
    """By harmonizer kind."""

    @property
    def dataset_json(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.root.preprocessed / NAME / "dataset.json").read_text())
        return content

    @property
    def fingerprint(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.root.preprocessed / NAME / "dataset_fingerprint.json").read_text())
        return content


@pytest.fixture(scope="session")
def planned(tmp_path_factory: pytest.TempPathFactory, make_raw_dataset: Callable[..., Path]) -> Planned:
    root = NnunetRoot(tmp_path_factory.mktemp("trainers")).create()
    for site, gain in (("A", 1.0), ("B", 3.0)):
        folder = make_raw_dataset(
            root.raw, name=NAME, n_labelled=3, n_unlabelled=1, site=site, gain=gain, seed=ord(site)
        )
    description = json.loads((folder / "dataset.json").read_text())
    description["numTraining"] = 6
    (folder / "dataset.json").write_text(json.dumps(description))
    cases = [
        path.name[:-12] for sub in ("imagesTr", "imagesUnlabelled") for path in (folder / sub).glob("*_0000.nii.gz")
    ]
    (folder / "sites.json").write_text(
        json.dumps({"sites": {"A": {}, "B": {}}, "cases": {case: case[0] for case in cases}})
    )
    plans = {
        kind: plan_central(
            root,
            "1",
            CentralOptions(
                configurations=("2d", "3d_fullres"),
                kind=kind,
                reference="A",
                schedule=SCHEDULE,
                plan=PlanOptions(base_features=4, max_features=8, batch_size=2, plans_name=f"plans_{kind}"),
            ),
        )
        for kind in ("none", "augment", "nyul", "curve", "polarity", "cyclegan", "diffusion")
    }
    return Planned(root, plans)


@pytest.fixture
def active(planned: Planned, monkeypatch: pytest.MonkeyPatch) -> Iterator[Planned]:
    """The planned dataset with nnU-Net's environment pointing at it, single-threaded."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("nnUNet_compile", "f")
    torch.set_num_threads(1)
    with planned.root.activate():
        yield planned
