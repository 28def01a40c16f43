"""Dice and HD95 against a brute-force oracle, known shapes, and files."""

from __future__ import annotations

import errno
import itertools
import json
import math
from argparse import ArgumentParser
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_fedharm.commands import evaluate
from nnunet_fedharm.errors import DataError, SetupError, ShapeError
from nnunet_fedharm.evaluation.distances import dice, hausdorff_distance_95, image_diagonal
from nnunet_fedharm.evaluation.labels import Targets
from nnunet_fedharm.evaluation.segmentation import format_table, score_case, score_folder, write_metrics
from nnunet_fedharm.evaluation.statistics import bootstrap_mean

LABELS = {"background": 0, "a": 1, "b": 2}
DATASET_JSON = {"labels": LABELS, "file_ending": ".nii.gz", "channel_names": {"0": "MR"}}


def brute_force_hd95(reference: np.ndarray, prediction: np.ndarray, spacing: tuple[float, ...]) -> float:
    """All pairwise distances between surface voxels found by looking at every face neighbour in Python."""

    def surface(mask: np.ndarray) -> list[tuple[int, ...]]:
        found = []
        for voxel in itertools.product(*(range(n) for n in mask.shape)):
            if not mask[voxel]:
                continue
            for axis, step in itertools.product(range(mask.ndim), (-1, 1)):
                other = list(voxel)
                other[axis] += step
                if not 0 <= other[axis] < mask.shape[axis] or not mask[tuple(other)]:
                    found.append(voxel)
                    break
        return found

    sides = [np.array(surface(mask)) * np.array(spacing) for mask in (reference, prediction)]
    table = np.sqrt(((sides[0][:, None] - sides[1][None]) ** 2).sum(-1))
    return float(max(np.percentile(table.min(1), 95), np.percentile(table.min(0), 95)))


def cube(shape: tuple[int, ...], start: tuple[int, ...], size: int) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[tuple(slice(s, s + size) for s in start)] = True
    return mask


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), density=st.floats(0.05, 0.9), flat=st.booleans())
def test_hd95_equals_all_pairwise_surface_distances(seed: int, density: float, flat: bool) -> None:
    generator = np.random.default_rng(seed)
    shape, spacing = ((5, 6), (2.0, 0.7)) if flat else ((4, 5, 3), (3.0, 1.0, 0.5))
    reference, prediction = (generator.random(shape) < density for _ in range(2))
    reference[0, 0] = prediction[-1, -1] = True
    expected = brute_force_hd95(reference, prediction, spacing)
    assert hausdorff_distance_95(reference, prediction, spacing) == pytest.approx(expected)
    assert hausdorff_distance_95(prediction, reference, spacing) == pytest.approx(expected)


@pytest.mark.parametrize(("axis", "spacing_mm"), [(0, 3.0), (1, 2.0), (2, 0.5)])
def test_a_translated_cube_is_as_far_as_its_translation_in_mm(axis: int, spacing_mm: float) -> None:
    shape, spacing = (14, 14, 14), (3.0, 2.0, 0.5)
    start = [2, 2, 2]
    start[axis] += 3
    reference, prediction = cube(shape, (2, 2, 2), 6), cube(shape, tuple(start), 6)
    assert hausdorff_distance_95(reference, prediction, spacing) == pytest.approx(3 * spacing_mm)
    assert dice(reference, prediction) == pytest.approx(0.5)


def test_equal_masks_have_dice_one_and_distance_zero() -> None:
    mask = cube((8, 8), (0, 0), 8)
    assert dice(mask, mask) == 1.0
    assert hausdorff_distance_95(mask, mask, (1.0, 2.0)) == 0.0


def test_empty_masks_follow_the_stated_convention() -> None:
    empty, mask = np.zeros((4, 5), bool), cube((4, 5), (1, 1), 2)
    assert math.isnan(dice(empty, empty))
    assert math.isnan(hausdorff_distance_95(empty, empty, (1, 1)))
    for pair in ((empty, mask), (mask, empty)):
        assert dice(*pair) == 0.0
        assert hausdorff_distance_95(*pair, (2.0, 3.0)) == image_diagonal((4, 5), (2.0, 3.0)) == math.hypot(6, 12)


def test_masks_of_different_shapes_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"\(4, 4\).*\(4, 5\)"):
        dice(np.zeros((4, 4), bool), np.zeros((4, 5), bool))
    with pytest.raises(ShapeError, match="Spacing"):
        hausdorff_distance_95(np.ones((4, 4), bool), np.ones((4, 4), bool), (1.0,))
    with pytest.raises(ShapeError, match="different shapes"):
        score_case(np.zeros((4, 4), int), np.zeros((4, 5), int), (1, 1), Targets({"a": (1,)}))


def test_regions_are_unions_of_their_labels() -> None:
    targets = Targets.from_dataset_json({"labels": {"background": 0, "whole tumour": [1, 2, 3], "core": [2, 3]}})
    reference = np.array([[0, 1, 2, 3]])
    prediction = np.array([[0, 3, 1, 0]])
    scores = score_case(reference, prediction, (1.0, 1.0), targets)
    assert list(scores) == ["whole tumour", "core"]
    assert scores["whole tumour"].dice == pytest.approx(0.8)
    assert scores["core"].dice == pytest.approx(0.0)


def test_ignored_voxels_of_the_reference_count_for_nothing() -> None:
    targets = Targets.from_dataset_json({"labels": {**LABELS, "ignore": 3}})
    assert "ignore" not in targets.regions
    reference = np.array([[1, 1, 3, 3, 0]])
    assert score_case(reference, np.array([[1, 1, 1, 2, 0]]), (1.0, 1.0), targets)["a"].dice == 1.0
    assert math.isnan(score_case(reference, np.array([[1, 1, 1, 2, 0]]), (1.0, 1.0), targets)["b"].dice)


def test_dice_agrees_with_nnunet_on_regions_and_ignore(tmp_path: Path) -> None:
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics
    from nnunetv2.imageio.nibabel_reader_writer import NibabelIO

    generator = np.random.default_rng(0)
    for name in ("ref", "pred"):
        write(tmp_path / f"{name}.nii.gz", generator.integers(0, 5, (5, 6, 4)))
    stock = compute_metrics(
        str(tmp_path / "ref.nii.gz"), str(tmp_path / "pred.nii.gz"), NibabelIO(), [(1, 2, 3), (2,)], ignore_label=4
    )
    arrays = [np.asarray(nib.load(tmp_path / f"{name}.nii.gz").dataobj) for name in ("ref", "pred")]
    scores = score_case(*arrays, (1, 1, 1), Targets({"whole": (1, 2, 3), "core": (2,)}, ignore=4))
    assert scores["whole"].dice == pytest.approx(stock["metrics"][(1, 2, 3)]["Dice"])
    assert scores["core"].dice == pytest.approx(stock["metrics"][(2,)]["Dice"])


def test_a_dataset_without_foreground_is_refused() -> None:
    with pytest.raises(DataError, match="no label besides the background"):
        Targets.from_dataset_json({"labels": {"background": 0}})


def test_the_bootstrap_interval_is_seeded_holds_the_mean_and_skips_nan() -> None:
    values = [0.51, 0.73, math.nan, 0.94, 0.87, 0.62]
    first = bootstrap_mean(values, seed=3, stream="x")
    assert first == bootstrap_mean(values, seed=3, stream="x") != bootstrap_mean(values, seed=4, stream="x")
    assert first.n == 5
    assert first.mean == pytest.approx(0.734)
    assert first.low < first.mean < first.high
    assert bootstrap_mean([math.nan], seed=0).to_dict() == {"mean": None, "low": None, "high": None, "n": 0}
    assert math.isnan(bootstrap_mean([0.5], seed=0).low)


def test_the_bootstrap_interval_of_many_cases_approaches_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(size=400)
    interval = bootstrap_mean(list(values), seed=1)
    half = 1.96 * values.std() / math.sqrt(400)
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.1)


def write(path: Path, array: np.ndarray, zooms: tuple[float, ...] = (1.0, 2.0, 3.0), shift: float = 0.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([*zooms, 1.0])
    affine[0, 3] = shift
    nib.save(nib.Nifti1Image(array.astype(np.uint8), affine), path)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Three cases; axis 0 of the file has 1 mm, axis 2 has 3 mm, so the array's order is seen in HD95."""
    for index, case in enumerate(("A_1", "A_2", "B_1")):
        reference, prediction = np.zeros((10, 10, 10)), np.zeros((10, 10, 10))
        reference[2:6, 2:6, 2:6] = 1
        prediction[2:6, 2:6, 2 + index : 6 + index] = 1
        reference[8, 8, 8] = prediction[8, 8, 8] = 2
        write(tmp_path / "labels" / f"{case}.nii.gz", reference)
        write(tmp_path / "predictions" / f"{case}.nii.gz", prediction)
    return tmp_path / "predictions", tmp_path / "labels"


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_folder_is_scored_per_site_label_and_case_in_mm(folders: tuple[Path, Path], num_processes: int) -> None:
    sites = {"A_1": "A", "A_2": "A", "B_1": "B"}
    metrics = score_folder(*folders, DATASET_JSON, sites=sites, num_processes=num_processes, progress=False)
    assert [metrics["cases"][case]["labels"]["a"]["hd95_mm"] for case in sites] == pytest.approx([0.0, 3.0, 6.0])
    assert metrics["sites"]["A"]["labels"]["a"]["dice"]["mean"] == pytest.approx((1 + 0.75) / 2)
    assert metrics["sites"]["B"]["labels"]["mean"]["dice"]["mean"] == pytest.approx(0.75)
    assert metrics["sites"]["all"]["n_cases"] == 3
    json.dumps(metrics, allow_nan=False)
    assert "all" in format_table(metrics)


def test_images_on_another_grid_are_refused_by_file_name(folders: tuple[Path, Path]) -> None:
    write(folders[0] / "A_2.nii.gz", np.zeros((10, 10, 10)), shift=5.0)
    with pytest.raises(DataError, match=r"predictions/A_2\.nii\.gz has another position or direction"):
        score_folder(*folders, DATASET_JSON, progress=False)
    write(folders[0] / "A_2.nii.gz", np.zeros((10, 10, 9)))
    with pytest.raises(DataError, match=r"A_2\.nii\.gz has another shape .*\(9, 10, 10\)"):
        score_folder(*folders, DATASET_JSON, progress=False)


def test_missing_predictions_sites_and_files_are_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no site for case B_1"):
        score_folder(*folders, DATASET_JSON, sites={"A_1": "A", "A_2": "A"}, progress=False)
    (folders[0] / "B_1.nii.gz").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"B_1\.nii\.gz"):
        score_folder(*folders, DATASET_JSON, progress=False)
    (folders[0] / "B_1.nii.gz").unlink()
    with pytest.raises(DataError, match=r"1 of 3 cases have no prediction .*B_1\.nii\.gz"):
        score_folder(*folders, DATASET_JSON, progress=False)
    with pytest.raises(DataError, match="does not exist"):
        score_folder(tmp_path / "nowhere", folders[1], DATASET_JSON, progress=False)


def test_the_command_writes_json_and_prints_the_table(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folders[0] / "dataset.json").write_text(json.dumps(DATASET_JSON))
    sites = tmp_path / "sites.json"
    sites.write_text(json.dumps({"sites": {"A": {}, "B": {}}, "cases": {"A_1": "A", "A_2": "A", "B_1": "B"}}))
    parser = ArgumentParser()
    evaluate.add_arguments(parser)
    output = tmp_path / "out" / "metrics.json"
    arguments = f"-p {folders[0]} -g {folders[1]} --sites {sites} -o {output} --num-processes 1".split()
    assert evaluate.run(parser.parse_args(arguments)) == 0
    assert json.loads(output.read_text())["sites"]["B"]["n_cases"] == 1
    assert "HD95 mm" in capsys.readouterr().out


def test_metrics_are_never_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """metrics.json marks a finished cell of a study."""
    file = tmp_path / "metrics.json"
    write_metrics({"cases": {}}, file)
    before = file.read_text()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(SetupError, match=r"Cannot write .*metrics\.json: No space left on device"):
        write_metrics({"cases": {"more": 1}}, file)
    assert file.read_text() == before
    assert list(tmp_path.iterdir()) == [file]
