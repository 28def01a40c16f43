"""A results folder of a harmonizer whose effect is known, written by the code that writes real ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from nnunet_fedharm.harmonizers.style import QUANTILE_LEVELS, Style
from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.planning.merge import merge_summaries
from nnunet_fedharm.planning.planner import PlanOptions, plan_federation
from nnunet_fedharm.planning.section import FedHarmSection, Schedule, with_section
from nnunet_fedharm.planning.summary import summarize_site
from nnunet_fedharm.trainers.names import trainer_name_for
from nnunet_fedharm.trainers.results import initial_weights, write_results_folder

SHAPE = (24, 28, 20)
AFFINE = np.array([[0.0, -1.5, 0.0, 7.0], [1.5, 0.0, 0.0, -3.0], [0.0, 0.0, 3.0, 11.0], [0.0, 0.0, 0.0, 1.0]])


def style(shift: float, scale: float, n_channels: int) -> Style:
    """Quantiles of a uniform histogram on shift +- scale; the second channel is twice as wide."""
    levels = 2 * np.array(QUANTILE_LEVELS) - 1
    quantiles = np.stack([shift + scale * (1 + channel) * levels for channel in range(n_channels)])
    return Style(quantiles, np.full(n_channels, 3.0), 4)


def write_case(folder: Path, case: str, n_channels: int, seed: int, affine: np.ndarray = AFFINE) -> None:
    """A box of uniform signal in a zero background, int16."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for channel in range(n_channels):
        image = np.zeros(SHAPE, np.int16)
        image[5:20, 6:22, 4:16] = generator.integers(100, 900, (15, 16, 12))
        target = nib.Nifti1Image(image, affine)
        target.header["descrip"] = b"kept"
        nib.save(target, folder / f"{case}_{channel:04d}.nii.gz")


@pytest.fixture(scope="session")
def results_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Function (kind, configuration, n_channels=1, source=None, narrow=(0.5, 0.6)) -> results folder.

    Styles are wide (the reference) and narrow; narrow's shift and scale can be given.
    """

    def make(
        kind: str,
        configuration: str,
        *,
        n_channels: int = 1,
        source: str | None = None,
        narrow: tuple[float, float] = (0.5, 0.6),
    ) -> Path:
        root = NnunetRoot(tmp_path_factory.mktemp("site")).create()
        raw = root.raw / "Dataset001_Boxes"
        for index in range(2):
            write_case(raw / "imagesTr", f"case{index}", n_channels, index)
            label = np.zeros(SHAPE, np.uint8)
            label[8:15, 8:15, 8:12] = 1
            (raw / "labelsTr").mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(label, AFFINE), raw / "labelsTr" / f"case{index}.nii.gz")
        dataset_json = {
            "channel_names": {str(channel): f"MR{channel}" for channel in range(n_channels)},
            "labels": {"background": 0, "box": 1},
            "numTraining": 2,
            "file_ending": ".nii.gz",
        }
        (raw / "dataset.json").write_text(json.dumps(dataset_json))
        fingerprint = merge_summaries([summarize_site(raw, site="wide")])
        plans = plan_federation(
            fingerprint,
            dataset_json,
            dataset_name=raw.name,
            reader="SimpleITKIO",
            root=root,
            options=PlanOptions(base_features=2, max_features=4, batch_size=2),
        )
        styles = {"wide": style(0.0, 1.7, n_channels), "narrow": style(*narrow, n_channels)}
        section = FedHarmSection(kind=kind, styles=styles, reference="wide", schedule=Schedule(segmenter_epochs=1))
        plans = with_section(plans, section, (configuration,))
        trainer = trainer_name_for(kind)
        weights = initial_weights(plans, dataset_json, configuration, trainer, 0)
        if kind == "nyul":
            weights["harmonizer.gate"] = np.ones_like(weights["harmonizer.gate"])  # as after training
        fold = write_results_folder(
            root,
            raw.name,
            plans,
            dataset_json,
            fingerprint,
            configuration,
            "all",
            trainer,
            weights,
            epoch=1,
            which=("final",),
            site=source,
        )
        return fold.parent

    return make
