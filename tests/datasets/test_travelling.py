"""Travelling subjects are read in pairs and kept out of training."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest

from nnunet_fedharm.datasets.travelling import load_travelling, read_z_scored
from nnunet_fedharm.errors import DataError


def write(path: Path, seed: int, scale: float = 1.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    volume = scale * np.random.default_rng(seed).uniform(1, 2, (6, 5, 4)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), path)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    for site in "AB":
        for number in (1, 2):
            write(tmp_path / "imagesTr" / f"{site}_{number:03d}_0000.nii.gz", seed=number)
    write(tmp_path / "imagesTravelling" / "B_001_0000.nii.gz", seed=1, scale=7.0)
    return tmp_path


def test_a_traveller_meets_itself_at_home_and_leaves_the_training_of_every_site(dataset: Path) -> None:
    data = load_travelling(dataset, sites=("A", "B"), reference="A")
    assert {site: len(volumes) for site, volumes in data.train.items()} == {"A": 1, "B": 1}
    ((seen, truth),) = data.pairs["B"]
    np.testing.assert_allclose(seen, truth, atol=1e-4)  # z-scores do not see the scale
    assert data.pairs["A"][0][0] is data.pairs["A"][0][1]
    assert [style.n_cases for style in data.styles] == [1, 1]


def test_a_traveller_without_its_home_scan_is_named(dataset: Path) -> None:
    (dataset / "imagesTr" / "A_001_0000.nii.gz").unlink()
    with pytest.raises(DataError, match=r"A_001_0000\.nii\.gz is missing"):
        load_travelling(dataset, sites=("A", "B"), reference="A")


def test_no_traveller_at_all_is_refused(dataset: Path) -> None:
    (dataset / "imagesTravelling" / "B_001_0000.nii.gz").unlink()
    with pytest.raises(DataError, match="holds no image"):
        load_travelling(dataset, sites=("A", "B"), reference="A")


def test_a_constant_volume_is_refused_by_name(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(np.ones((3, 3, 3), np.float32), np.eye(4)), tmp_path / "flat.nii.gz")
    with pytest.raises(DataError, match=r"flat\.nii\.gz is constant"):
        read_z_scored(tmp_path / "flat.nii.gz")
