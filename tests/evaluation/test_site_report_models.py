"""The same volumes harmonized: by their own site, kept between runs, honest about sites that a model does not know."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from nnunet_fedharm.errors import DataError
from nnunet_fedharm.evaluation.site_report.models import HarmonizedCases, harmonize_cases, model_folders
from nnunet_fedharm.sites.files import CaseFiles
from tests.evaluation.conftest import write_case

SITES = {"scan0": "wide", "scan1": "narrow", "scan2": "unknown"}


@pytest.fixture(scope="module")
def model(results_folder: Callable[..., Path]) -> Path:
    """Quantile matching to the site `wide`, with the styles of `wide` and `narrow`."""
    return results_folder("nyul", "3d_fullres")


@pytest.fixture
def scans(tmp_path: Path) -> list[CaseFiles]:
    """A scan of each site of SITES."""
    for index, case in enumerate(SITES):
        write_case(tmp_path / "scans", case, 1, index)
    return [CaseFiles(case, (tmp_path / "scans" / f"{case}_0000.nii.gz",), None) for case in SITES]


def voxels(case: CaseFiles) -> np.ndarray:
    return np.asarray(nib.load(case.images[0]).dataobj)


def harmonize(model: Path, scans: list[CaseFiles], tmp_path: Path) -> HarmonizedCases:
    return harmonize_cases(str(model), scans, SITES, tmp_path / "harmonized")


def test_each_volume_is_mapped_from_its_own_site(model: Path, scans: list[CaseFiles], tmp_path: Path) -> None:
    found = harmonize(model, scans, tmp_path)
    assert found.name == "harmonized by nyul to wide"
    np.testing.assert_array_equal(voxels(found.cases[0]), voxels(scans[0]))  # the reference's images stay as they are
    assert not np.array_equal(voxels(found.cases[1]), voxels(scans[1]))
    assert found.failures == []
    assert len(found.notes) == 1
    assert "site unknown" in found.notes[0]


def test_volumes_are_kept_until_the_scan_changes(model: Path, scans: list[CaseFiles], tmp_path: Path) -> None:
    first = harmonize(model, scans, tmp_path)
    made = {case.case: case.images[0].stat().st_mtime_ns for case in first.cases}
    write_case(tmp_path / "scans", "scan1", 1, 99)
    again = harmonize(model, scans, tmp_path)
    assert [case.case for case in again.cases if case.images[0].stat().st_mtime_ns != made[case.case]] == ["scan1"]


def test_a_volume_that_cannot_be_read_is_a_failure_and_not_the_end(
    model: Path, scans: list[CaseFiles], tmp_path: Path
) -> None:
    scans[1].images[0].write_bytes(b"not an image")
    found = harmonize(model, scans, tmp_path)
    assert [case.case for case in found.cases] == ["scan0", "scan2"]
    assert [(failure.site, failure.case) for failure in found.failures] == [("narrow", "scan1")]


def test_sites_have_their_own_folders_or_share_one(tmp_path: Path) -> None:
    (tmp_path / "B" / "model").mkdir(parents=True)
    (tmp_path / "B" / "model" / "plans.json").write_text("{}")
    own = model_folders(f"{tmp_path}/{{site}}/model", ["A", "B"])
    assert own == dict.fromkeys(("A", "B"), tmp_path / "B" / "model")
    with pytest.raises(DataError, match=r"no plans\.json"):
        model_folders(f"{tmp_path}/{{site}}", ["A", "B"])
