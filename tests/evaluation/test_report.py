"""From folders to the page's content."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from nnunet_fedharm.errors import DataError
from nnunet_fedharm.evaluation.report import (
    SiteFolders,
    before_and_after,
    histograms,
    labels_and_errors,
    traffic,
    training_lines,
)

ROUNDS = [
    {"event": "round_end", "phase": "harmonizer", "round": 1, "train_loss": 0.5, "bytes_down": 10, "bytes_up": 20},
    {
        "event": "round_end",
        "phase": "segmenter",
        "round": 1,
        "train_loss": 0.9,
        "dice": None,
        "bytes_down": 1,
        "bytes_up": 2,
    },
    {
        "event": "round_end",
        "phase": "segmenter",
        "round": 2,
        "train_loss": 0.7,
        "dice": 0.6,
        "bytes_down": 1,
        "bytes_up": 2,
    },
]


@pytest.fixture
def site(tmp_path: Path) -> SiteFolders:
    """Two cases of a cube in which the harmonizer added half a standard deviation and the prediction is half right."""
    generator = np.random.default_rng(0)
    for case in ("a", "b"):
        image, label = np.zeros((12, 10, 8)), np.zeros((12, 10, 8))
        image[2:8, 2:8, 2:6] = generator.normal(100, 10, (6, 6, 4))
        label[2:8, 2:8, 2:6] = 1
        inside = image != 0
        shifted = image + 0.5 * inside * image[inside].std()
        prediction = np.where(np.arange(12)[:, None, None] < 5, label, 0)
        for folder, name, array in (
            ("images", f"{case}_0000", image),
            ("harmonized", f"{case}_0000", shifted),
            ("labels", case, label),
            ("predictions", case, prediction),
        ):
            (tmp_path / folder).mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(array.astype(np.float32), np.eye(4)), tmp_path / folder / f"{name}.nii.gz")
    folders = [tmp_path / name for name in ("images", "harmonized", "labels")]
    return SiteFolders("A", "3 T", *folders, predictions={"none": tmp_path / "predictions"})


def test_pictures_are_named_by_what_they_show(site: SiteFolders) -> None:
    assert [caption for caption, _ in before_and_after([site])[0].columns] == ["as scanned", "harmonized"]
    columns = labels_and_errors([site])[0].columns
    assert [caption for caption, _ in columns] == ["true label", "prediction, none", "wrong voxels, none"]
    assert len({address for _, address in columns}) == 3


def test_histograms_before_and_after_share_the_scans_scale(site: SiteFolders) -> None:
    found = histograms([site])
    means = [sum(x * y for x, y in found[name]["A"]) / sum(y for _, y in found[name]["A"]) for name in found]
    assert means == pytest.approx([0.0, 0.5], abs=0.1)


def test_training_lines_follow_one_phase_and_leave_out_what_is_missing() -> None:
    lines = training_lines({"none": ROUNDS, "curve": []}, "segmenter", "dice")
    assert [(line.name, list(line.points)) for line in lines] == [("none", [(2.0, 0.6)])]


def test_traffic_is_the_sum_over_rounds() -> None:
    assert traffic(ROUNDS) == (12, 24)


def test_a_missing_picture_is_named(site: SiteFolders) -> None:
    (site.harmonized / "a_0000.nii.gz").unlink()
    with pytest.raises(DataError, match=r"harmonized/a_0000"):
        before_and_after([site])
