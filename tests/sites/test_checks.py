"""Bad raw data is refused with site, case, file and what to do."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_fedharm.errors import DataError
from nnunet_fedharm.sites.checks import check_fold, check_raw_dataset
from tests.sites.raw import ENDING, write_case, write_description, write_volume


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "Dataset001_Small"
    write_description(folder, channels=("T1", "T2"), n_training=2)
    rng = np.random.default_rng(0)
    for case in ("a", "b"):
        write_case(folder, case, rng, n_channels=2)
    return folder


def refused(dataset: Path, *parts: str) -> None:
    with pytest.raises(DataError) as caught:
        check_raw_dataset(dataset, site="Hill")
    message = str(caught.value)
    assert "Hill" in message
    for part in parts:
        assert part in message


def read(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def test_good_data_passes(dataset: Path) -> None:
    check_raw_dataset(dataset, site="Hill")


def test_unlabelled_cases_pass_without_any_label(tmp_path: Path) -> None:
    folder = tmp_path / "Dataset001_Small"
    write_description(folder)
    write_case(folder, "a", np.random.default_rng(0), labelled=False)
    check_raw_dataset(folder, site="Hill")


def test_no_dataset_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "Dataset009_Nothing", "has no dataset", "Dataset009_Nothing", "sites split")


def test_no_description_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "dataset.json", "is missing")


def test_description_that_is_no_json_is_refused(dataset: Path) -> None:
    (dataset / "dataset.json").write_text("{")
    refused(dataset, "dataset.json", "cannot be read")


def test_empty_site_is_refused(tmp_path: Path) -> None:
    write_description(tmp_path / "Dataset001_Small")
    refused(tmp_path / "Dataset001_Small", "is empty", "imagesTr", "leave the site out")


def test_site_with_one_case_is_refused(dataset: Path) -> None:
    for file in [*(dataset / "imagesTr").glob("b_*"), dataset / "labelsTr" / f"b{ENDING}"]:
        file.unlink()
    refused(dataset, "one labelled case", "at least 2", "imagesUnlabelled")


def test_missing_channel_is_refused(dataset: Path) -> None:
    (dataset / "imagesTr" / f"b_0001{ENDING}").unlink()
    refused(dataset, "case b", "channel T2 is missing", f"b_0001{ENDING}")


def test_missing_label_is_refused(dataset: Path) -> None:
    (dataset / "labelsTr" / f"b{ENDING}").unlink()
    refused(dataset, "case b", "no label", f"b{ENDING}", "imagesUnlabelled")


def test_label_value_that_the_description_lacks_is_refused(dataset: Path) -> None:
    path = dataset / "labelsTr" / f"a{ENDING}"
    label = read(path)
    label[5, 5, 5] = 7
    write_volume(label, path)
    refused(dataset, "case a", "label value 7", f"a{ENDING}", "Relabel")


def test_gap_in_the_label_values_is_refused(dataset: Path) -> None:
    description = json.loads((dataset / "dataset.json").read_text())
    description["labels"] = {"background": 0, "core": 2}
    (dataset / "dataset.json").write_text(json.dumps(description))
    refused(dataset, "[0, 2]", "Renumber")


@pytest.mark.parametrize(
    ("shape", "spacing", "origin", "what"),
    [
        ((10, 14, 13), (1.0, 1.0, 1.0), 0.0, "shape"),
        ((10, 14, 12), (1.0, 1.0, 1.5), 0.0, "spacing"),
        ((10, 14, 12), (1.0, 1.0, 1.0), 3.0, "origin"),
    ],
)
def test_label_in_another_place_than_its_image_is_refused(
    dataset: Path, shape: tuple[int, ...], spacing: tuple[float, ...], origin: float, what: str
) -> None:
    path = dataset / "labelsTr" / f"b{ENDING}"
    write_volume(np.ones(shape, dtype=np.uint8), path, spacing=spacing, origin=origin)
    refused(dataset, "case b", f"another {what}", f"b_0000{ENDING}", f"b{ENDING}", "Resample")


def test_channels_of_different_size_are_refused(dataset: Path) -> None:
    write_volume(np.ones((4, 4, 4), dtype=np.float32), dataset / "imagesTr" / f"b_0001{ENDING}")
    refused(dataset, "case b", f"b_0000{ENDING}", "same size and spacing")


def test_a_file_that_was_cut_off_is_refused(dataset: Path) -> None:
    path = dataset / "imagesTr" / f"b_0001{ENDING}"
    write_volume(np.random.default_rng(0).integers(1, 1000, read(path).shape).astype(np.int16), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(dataset, "case b", f"b_0001{ENDING} is damaged", "Copy the file again")


@pytest.mark.parametrize("keep", [0.5, 0.02])
@pytest.mark.parametrize("name", ["imagesTr/a_0001", "labelsTr/a"])
def test_a_label_or_a_header_that_was_cut_off_is_refused(tmp_path: Path, name: str, keep: float) -> None:
    """Half a label reads as half a lesion; a lost header is no traceback."""
    folder = tmp_path / "Dataset001_Small"
    write_description(folder, channels=("T1", "T2"), n_training=2)
    rng = np.random.default_rng(0)
    for case in ("a", "b"):
        write_case(folder, case, rng, n_channels=2, shape=(20, 24, 22))
    file = folder / f"{name}{ENDING}"
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data))])
    refused(folder, "case a", str(file))


def test_a_sites_file_that_cannot_be_used_is_refused(dataset: Path) -> None:
    file = dataset / "sites.json"
    for text, words in (
        ("{", "sites.json"),
        ('{"sites": {"X": {}}, "cases": {"a": "Y"}}', "belongs to site Y"),
        ('{"sites": {"X": {}}, "cases": {"a": "X"}}', "case b: .* does not say which site"),
    ):
        file.write_text(text)
        with pytest.raises(DataError, match=words):
            check_raw_dataset(dataset, site="Hill")
    file.write_text('{"sites": {"X": {}}, "cases": {"a": "X", "b": "X"}}')
    check_raw_dataset(dataset, site="Hill")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinite_voxels_are_refused(dataset: Path, value: float) -> None:
    path = dataset / "imagesTr" / f"b_0001{ENDING}"
    image = read(path)
    image[3, 3, 3:5] = value
    write_volume(image, path)
    refused(dataset, "case b", "2 voxels that are NaN or infinity", f"b_0001{ENDING}")


def test_constant_image_is_refused(dataset: Path) -> None:
    path = dataset / "imagesTr" / f"b_0000{ENDING}"
    write_volume(np.full_like(read(path), 5), path)
    refused(dataset, "case b", "is constant", "every voxel is 5", f"b_0000{ENDING}")


def test_numbered_folds_need_five_cases() -> None:
    check_fold(5, 0, site="Hill")
    check_fold(4, "all", site="Hill")
    with pytest.raises(DataError, match=r"Site Hill has 4 labelled cases.*use fold all"):
        check_fold(4, 0, site="Hill")
    with pytest.raises(DataError, match="Fold 5 does not exist"):
        check_fold(50, 5, site="Hill")
