"""The whole dataset: who is whose, the cache by content, going on after a kill, processes, and failures by name."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest

from nnunet_fedharm.errors import DataError
from nnunet_fedharm.sites.features import extraction
from nnunet_fedharm.sites.features.extraction import FeatureOptions, measure_dataset
from nnunet_fedharm.sites.features.table import Failure, FeatureTable
from nnunet_fedharm.sites.registry import SitesFile
from tests.sites.raw import write_case, write_description, write_multi_site, write_volume

pytest.importorskip("radiomics", reason="pyradiomics is not installed")
SHAPE = (12, 16, 14)
NAME = "Dataset001_Sites"
Measured = tuple[FeatureTable, list[Failure]]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Measured]:
    """A folder with a dataset of two cases at each of two sites, a subject of A that travelled to B, and a cache of them all."""
    folder = tmp_path_factory.mktemp("measured")
    dataset = folder / NAME
    rng = np.random.default_rng(0)
    for case in ("A_001", "A_002", "B_007", "B_008"):
        write_case(dataset, case, rng, shape=SHAPE)
    write_case(folder / "away", "B_001", rng, shape=SHAPE, gain=2)
    shutil.move(folder / "away" / "imagesTr", dataset / "imagesTravelling")
    shutil.move(folder / "away" / "labelsTr", dataset / "labelsTravelling")
    write_description(dataset, n_training=4)
    owners = {"A_001": "A", "A_002": "A", "B_007": "B", "B_008": "B"}
    (dataset / "sites.json").write_text(json.dumps({"sites": {"A": {}, "B": {}}, "cases": owners}))
    return folder, measure(dataset, folder / "cache")


@pytest.fixture
def dataset(measured: tuple[Path, Measured], tmp_path: Path) -> Path:
    """A copy of the dataset; the copied cache beside it knows all its cases."""
    shutil.copytree(measured[0] / NAME, tmp_path / NAME)
    shutil.copytree(measured[0] / "cache", tmp_path / "cache")
    return tmp_path / NAME


def measure(dataset: Path, cache: Path, **more: object) -> Measured:
    settings = {"registry": None, "options": FeatureOptions(min_voxels=8), "num_processes": 1} | more
    return measure_dataset(dataset, cache=cache, **settings)


def same(first: FeatureTable, second: FeatureTable) -> bool:
    return (
        first.rows == second.rows
        and first.names == second.names
        and np.array_equal(first.values, second.values, equal_nan=True)
    )


@pytest.fixture
def never_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every result has to come from the cache."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a case was measured again")

    monkeypatch.setattr(extraction, "measure_volumes", refuse)


def test_a_travelling_subject_has_the_patient_of_its_case_at_home(measured: tuple[Path, Measured]) -> None:
    table, failures = measured[1]
    assert not failures
    seen = {(row.case, row.site, row.patient, row.travelling) for row in table.rows}
    assert seen == {
        ("A_001", "A", "A_001", False),
        ("A_002", "A", "A_002", False),
        ("B_007", "B", "B_007", False),
        ("B_008", "B", "B_008", False),
        ("B_001", "B", "A_001", True),
    }
    assert table.sites == ("A", "B")
    assert set(table.parts) == {
        ("MR", region, scale) for region in ("label core", "label rim", "foreground") for scale in ("z-score", "raw")
    } | {("MR", "image", "raw")}
    assert table.names[0].startswith("firstorder_")
    assert table.names[-1].startswith("quality_")
    assert list(table.names) == sorted(table.names, key=extraction.feature_order)
    at_home = table.part("MR", "foreground", "raw", case="A_001")
    assert np.isfinite(at_home.only([name for name in table.names if not name.startswith("quality")]).values).all()


def test_patients_of_sites_json_hold_for_home_and_away(dataset: Path, tmp_path: Path) -> None:
    content = json.loads((dataset / "sites.json").read_text())
    content["patients"] = {"A_001": "anna", "B_007": "anna"}
    (dataset / "sites.json").write_text(json.dumps(content))
    table, _ = measure(dataset, tmp_path / "cache")
    patients = {row.case: row.patient for row in table.rows}
    assert patients == {"A_001": "anna", "A_002": "A_002", "B_007": "anna", "B_008": "B_008", "B_001": "anna"}


def test_a_case_is_measured_once_whatever_its_files_are_called(
    measured: tuple[Path, Measured], dataset: Path, tmp_path: Path, never_measured: None
) -> None:
    first, _ = measured[1]
    assert len(list((tmp_path / "cache").iterdir())) == 5
    assert not any("A_0" in path.read_text() for path in (tmp_path / "cache").iterdir())
    moved = dataset.rename(tmp_path / "Dataset002_Moved")
    for old in (moved / "imagesTr" / "B_008_0000.nii.gz", moved / "labelsTr" / "B_008.nii.gz"):
        os.utime(old)
        old.rename(old.with_name(old.name.replace("B_008", "B_009")))
    content = (moved / "sites.json").read_text()
    (moved / "sites.json").write_text(content.replace("B_008", "B_009"))
    second, failures = measure(moved, tmp_path / "cache")
    assert not failures
    assert [row.case for row in second.part("MR", "image", "raw").rows] == ["A_001", "A_002", "B_007", "B_009", "B_001"]
    assert np.array_equal(first.values, second.values, equal_nan=True)


@pytest.mark.parametrize("what", ["image", "label", "options", "name of a label"])
def test_whatever_changes_numbers_is_measured_again(dataset: Path, tmp_path: Path, what: str) -> None:
    cache = tmp_path / "cache"
    options = FeatureOptions(min_voxels=8)
    expected = 1
    if what == "options":
        options, expected = FeatureOptions(min_voxels=8, bin_count=16), 5
    elif what == "name of a label":
        description = (dataset / "dataset.json").read_text()
        (dataset / "dataset.json").write_text(description.replace("rim", "edge"))
        expected = 5
    else:
        path = dataset / {"image": "imagesTr/A_001_0000.nii.gz", "label": "labelsTr/A_001.nii.gz"}[what]
        old = nibabel.load(path)
        values = np.asarray(old.dataobj).copy()
        values[1, 1, 1] = 2 if what == "label" else 77
        nibabel.save(nibabel.Nifti1Image(values, old.affine), path)
    measure(dataset, cache, options=options)
    assert len(list(cache.iterdir())) == 5 + expected


def test_a_damaged_cache_file_is_measured_again(measured: tuple[Path, Measured], dataset: Path, tmp_path: Path) -> None:
    damaged = min((tmp_path / "cache").iterdir())
    whole = damaged.read_text()
    damaged.write_text(whole[:50])
    assert same(measured[1][0], measure(dataset, tmp_path / "cache")[0])
    assert damaged.read_text() == whole


def test_two_processes_measure_what_one_does(measured: tuple[Path, Measured], dataset: Path, tmp_path: Path) -> None:
    two = measure(dataset, tmp_path / "another", num_processes=2)
    assert same(measured[1][0], two[0])
    assert two[1] == []


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    dataset = write_multi_site(tmp_path / "Dataset003_Long", {"A": 4, "B": 4})
    cache = tmp_path / "cache"
    script = (
        "import sys; from pathlib import Path; from nnunet_fedharm.sites.features.extraction import *\n"
        "measure_dataset(Path(sys.argv[1]), registry=None, options=FeatureOptions(min_voxels=8), cache=Path(sys.argv[2]), "
        "num_processes=1)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(dataset), str(cache)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(cache.glob("*.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in cache.glob("*.json")}
    assert 1 <= len(before) < 8
    table, failures = measure(dataset, cache)
    assert not failures
    assert len(table.part("MR", "foreground", "raw").rows) == 8
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_failing_cases_are_named_and_the_others_measured(dataset: Path, tmp_path: Path) -> None:
    damaged = dataset / "imagesTr" / "A_001_0000.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:200])
    values = np.full(SHAPE, 5, np.float32)
    values[3, 3, 3] = np.nan
    write_volume(values, dataset / "imagesTr" / "A_002_0000.nii.gz")
    write_volume(np.zeros(SHAPE, np.uint8), dataset / "labelsTr" / "B_007.nii.gz")
    (dataset / "labelsTravelling" / "B_001.nii.gz").unlink()
    content = json.loads((dataset / "sites.json").read_text())
    content["cases"]["B_099"] = "B"
    (dataset / "sites.json").write_text(json.dumps(content))
    table, failures = measure(dataset, tmp_path / "cache")
    assert {row.case for row in table.rows} == {"B_007", "B_008"}
    assert {row.region for row in table.rows if row.case == "B_007"} == {"image"}
    told = {(item.site, item.case): item.reason for item in failures if item.case != "B_007"}
    assert told["B", "B_099"] == "sites.json lists it, but it has no image."
    assert "cannot be read" in told["A", "A_001"] or "damaged" in told["A", "A_001"]
    assert "1 voxels that are NaN" in told["A", "A_002"]
    assert "there is no label" in told["B", "B_001"]
    assert not any("Site " in reason or "\n" in reason for reason in told.values())
    regions = [item.reason for item in failures if item.case == "B_007"]
    assert regions == [f"Region {name} is empty in this case." for name in ("label core", "label rim", "foreground")]
    assert measure(dataset, tmp_path / "cache")[1] == failures


def test_a_missing_channel_is_a_failure(tmp_path: Path) -> None:
    dataset = write_multi_site(tmp_path / "Dataset004_Channels", {"A": 1, "B": 1}, channels=("T1", "T2"))
    (dataset / "imagesTr" / "B_000_0001.nii.gz").unlink()
    table, failures = measure(dataset, tmp_path / "cache")
    assert [(item.case, item.reason[:27]) for item in failures] == [("B_000", "channel T2 is missing, ther")]
    assert {row.channel for row in table.rows} == {"T1", "T2"}


def test_one_unlabelled_case_brings_the_body_of_all(dataset: Path, tmp_path: Path) -> None:
    write_case(dataset, "C_005", np.random.default_rng(3), shape=SHAPE, labelled=False)
    registry = SitesFile.load(dataset / "sites.json")
    registry = SitesFile({**registry.sites, "C": registry.sites["A"]}, {**registry.cases, "C_005": "C"})
    table, failures = measure(dataset, tmp_path / "cache", registry=registry)
    assert not failures
    assert {row.region for row in table.rows if row.site == "C"} == {"image"}
    body = table.part("MR", "image", "z-score")
    assert len(body.rows) == 6
    assert np.isfinite(body.column("glcm_Contrast")).all()


def test_harmonized_volumes_are_measured_in_the_regions_of_the_scanned_ones(dataset: Path, tmp_path: Path) -> None:
    files = {}
    for case in ("A_001", "B_007"):
        image = nibabel.load(dataset / "imagesTr" / f"{case}_0000.nii.gz")
        values = (np.asarray(image.dataobj) - 90.0) / 20
        files[case] = [tmp_path / f"{case}_new.nii.gz"]
        nibabel.save(nibabel.Nifti1Image(values, image.affine), files[case][0])
    before, _ = measure(dataset, tmp_path / "cache")
    after, failures = measure(dataset, tmp_path / "cache", images=files)
    assert not failures
    assert {row.case for row in after.rows} == set(files)
    old, new = (table.part("MR", "foreground", "raw", case="A_001") for table in (before, after))
    assert new.column("shape_MeshVolume") == old.column("shape_MeshVolume")
    assert new.column("firstorder_Mean") == pytest.approx((old.column("firstorder_Mean") - 90) / 20, rel=1e-4)
    nibabel.save(nibabel.Nifti1Image(np.random.default_rng(0).normal(size=(4, 5, 6)), np.eye(4)), files["A_001"][0])
    _, failures = measure(dataset, tmp_path / "cache", images=files)
    assert [item.case for item in failures] == ["A_001"]
    assert "have the shape" in failures[0].reason
    with pytest.raises(DataError, match="the case X"):
        measure(dataset, tmp_path / "cache", images={"X": files["B_007"]})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "sites.json").unlink(), "is missing"),
        (
            lambda d: shutil.copytree(d / "imagesTr", d / "imagesTravelling", dirs_exist_ok=True),
            "two cases of this name",
        ),
        (lambda d: write_volume(np.ones(SHAPE), d / "imagesTravelling" / "X_1_0000.nii.gz"), "no travelling subject"),
        (lambda d: write_volume(np.ones(SHAPE), d / "imagesTr" / "A_9_0000.nii.gz"), "which site case A_9 comes from"),
        (lambda d: [shutil.rmtree(d / name) for name in ("imagesTr", "imagesTravelling")], "no case to measure"),
    ],
)
def test_datasets_that_cannot_be_told_apart_by_site_are_refused(
    dataset: Path, tmp_path: Path, spoil: object, message: str
) -> None:
    spoil(dataset)
    with pytest.raises(DataError, match=message):
        measure(dataset, tmp_path / "cache")


def test_a_subject_of_two_possible_patients_has_to_be_told(dataset: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    write_case(dataset, "C_001", rng, shape=SHAPE)
    registry = SitesFile.load(dataset / "sites.json")
    more = ({**registry.sites, "C": registry.sites["A"]}, {**registry.cases, "C_001": "C"})
    with pytest.raises(DataError, match=r"could be the same person \(A_001, C_001\)"):
        measure(dataset, tmp_path / "cache", registry=SitesFile(*more))
    table, _ = measure(dataset, tmp_path / "cache", registry=SitesFile(*more, {"B_001": "C_001"}))
    assert {row.patient for row in table.rows if row.travelling} == {"C_001"}


def test_an_unknown_channel_is_refused_by_name(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no channel T9\. Its channels: MR"):
        measure(dataset, tmp_path / "cache", options=FeatureOptions(channels=("T9",)))
