"""Slices of the site report: what is up stays up, typical volumes are in the middle of their site, one window for all."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from nnunet_fedharm.evaluation.site_report.slices import (
    CLASSIFIED_SIZE,
    CentralSlice,
    central_slices,
    of_one_size,
    small_slices,
    typical_cases,
    typical_slices,
)
from nnunet_fedharm.sites.features.table import FeatureTable, Row
from nnunet_fedharm.sites.files import CaseFiles

DESCRIPTION = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "spot": 1}, "file_ending": ".nii.gz"}
SHAPE = (14, 16, 18)


def write_scan(folder: Path, axes: str, zooms: tuple[float, float, float] = (1, 1, 1)) -> CaseFiles:
    """Noise with a bright spot at the patient's right, front and top, stored along `axes`; the label is in the upper third."""
    values = np.random.default_rng(0).normal(100, 1, SHAPE).astype(np.float32)
    values[11:, 12:, 13:] = 200  # axes run to the right, the front and the top here
    label = np.zeros(SHAPE, np.uint8)
    label[10:13, 11:14, 13:16] = 1
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(tuple(axes))
    )
    paths = folder / "case_0000.nii.gz", folder / "case.nii.gz"
    for path, array in zip(paths, (values, label), strict=True):
        image = nib.Nifti1Image(array, np.diag([*zooms, 1.0]))
        nib.save(image.as_reoriented(turn), path)
    return CaseFiles("case", (paths[0],), paths[1])


def brightest_quadrant(image: np.ndarray) -> str:
    middle = image.shape[0] // 2, image.shape[1] // 2
    quadrants = {
        "upper left": image[: middle[0], : middle[1]],
        "upper right": image[: middle[0], middle[1] :],
        "lower left": image[middle[0] :, : middle[1]],
        "lower right": image[middle[0] :, middle[1] :],
    }
    return max(quadrants, key=lambda name: float(quadrants[name].mean()))


@pytest.mark.parametrize("axes", ["RAS", "LPS", "LAI", "RPI"])
@pytest.mark.parametrize(
    ("zooms", "place"),
    [
        ((1, 1, 3), "upper left"),  # axial: front up, the patient's right on the left
        ((1, 3, 1), "upper left"),  # coronal: head up, the patient's right on the left
        ((3, 1, 1), "upper left"),  # sagittal: head up, front on the left
    ],
)
def test_slices_stand_as_radiologists_look_at_them(
    tmp_path: Path, axes: str, zooms: tuple[float, float, float], place: str
) -> None:
    scan = write_scan(tmp_path, axes, zooms)
    piece = central_slices([scan], DESCRIPTION, num_processes=1)["case", "T1"]
    assert brightest_quadrant(piece.image) == place
    assert piece.spacing_mm == (1, 1)


def test_the_slice_goes_through_the_middle_of_the_label(tmp_path: Path) -> None:
    scan = write_scan(tmp_path, "RAS", (1, 1, 3))
    with_label = central_slices([scan], DESCRIPTION, num_processes=1)["case", "T1"].image
    without = central_slices([CaseFiles("case", scan.images, None)], DESCRIPTION, num_processes=1)["case", "T1"].image
    assert with_label.max() > 2
    assert without.max() < 2  # the middle of the volume does not reach the spot


def test_a_case_that_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    scan = write_scan(tmp_path, "RAS")
    broken = CaseFiles("broken", (tmp_path / "absent_0000.nii.gz",), None)
    whole = central_slices([broken, scan], DESCRIPTION, num_processes=1)
    assert set(whole) == {("case", "T1")}
    small = small_slices([broken, scan], DESCRIPTION, num_processes=1)
    assert set(small) == set(whole)
    np.testing.assert_array_equal(small["case", "T1"], of_one_size(whole["case", "T1"].image))


def test_typical_volumes_are_in_the_middle_of_their_site() -> None:
    places = [0.0, 10.0, 4.9, 5.0, 5.2, 7.0, 5.01]
    rows = [Row(f"case{index}", "A", f"case{index}", "T1", "foreground", "z-score") for index in range(6)]
    rows.append(Row("away", "A", "case0", "T1", "foreground", "z-score", travelling=True))
    values = np.array([[place, 2 * place, 1.0, np.nan if index == 2 else 0.0] for index, place in enumerate(places)])
    table = FeatureTable(tuple(rows), ("a", "b", "constant", "missing"), values)
    assert typical_cases(table, "A") == ["case3", "case4", "case2"]
    assert typical_cases(table, "B") == []


def test_all_sites_and_variants_share_one_window() -> None:
    flat = {("a", "T1"): np.full((4, 4), -1.0), ("b", "T1"): np.full((4, 4), 3.0)}
    cut = {place: CentralSlice(image.astype(np.float32), (1.0, 1.0)) for place, image in flat.items()}
    shown = typical_slices("T1", {"A": ["a"], "B": ["b"], "C": ["absent"]}, {"as scanned": cut, "harmonized": cut})
    assert shown.window == pytest.approx((-1.0, 3.0))
    assert shown.pictures["as scanned"]["A"] == shown.pictures["harmonized"]["A"]
    assert shown.pictures["as scanned"]["A"] != shown.pictures["as scanned"]["B"]
    assert shown.pictures["as scanned"]["C"] == []


def test_classified_slices_have_one_size_and_keep_their_intensities() -> None:
    image = of_one_size(np.full((5, 90), 1.5, np.float32))
    assert image.shape == (CLASSIFIED_SIZE, CLASSIFIED_SIZE)
    np.testing.assert_allclose(image, 1.5)
