"""Harmonized volumes against a numpy oracle, and what must not change."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from nnunet_fedharm.commands import harmonize
from nnunet_fedharm.errors import CheckpointError, DataError, PlanError
from nnunet_fedharm.evaluation.harmonize_folder import harmonize_folder
from nnunet_fedharm.harmonizers.style import QUANTILE_LEVELS
from nnunet_fedharm.harmonizers.tone import MIN_STEP, TONE_RANGE
from tests.evaluation.conftest import AFFINE, style, write_case

Results = Callable[..., Path]


def read(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def expected_nyul(raw: np.ndarray, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """z-score over the nonzero voxels, landmarks of the source onto the target's, tails shifted, back to raw units."""
    inside = raw != 0
    mean, sigma = raw[inside].mean(), raw[inside].std()
    z = (raw[inside] - mean) / sigma
    knots = np.linspace(-TONE_RANGE, TONE_RANGE, 257)  # quantile_map's grid and smallest step
    ramp = MIN_STEP * np.arange(len(source))
    displacement = np.interp(z, knots, np.interp(knots, source + ramp, target - source))
    out = raw.astype(np.float64)
    out[inside] += sigma * displacement
    return out


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_landmarks_are_mapped_in_raw_units_and_geometry_stays(
    results_folder: Results, tmp_path: Path, configuration: str
) -> None:
    write_case(tmp_path / "in", "x", 2, seed=5)
    model = results_folder("nyul", configuration, n_channels=2)
    assert harmonize_folder(model, tmp_path / "in", tmp_path / "out", site="narrow", progress=False) == 1
    for channel in range(2):
        before, after = (tmp_path / side / f"x_{channel:04d}.nii.gz" for side in ("in", "out"))
        source, target = (style(*values, 2).quantiles[channel] for values in ((0.5, 0.6), (0.0, 1.7)))
        np.testing.assert_allclose(read(after), expected_nyul(read(before), source, target), atol=0.01)
        assert np.abs(read(after) - read(before)).max() > 50
        np.testing.assert_array_equal(read(after)[read(before) == 0], 0)
        np.testing.assert_array_equal(nib.load(after).affine, AFFINE)
        assert nib.load(after).header["descrip"] == nib.load(before).header["descrip"]


def test_the_identity_gives_the_input_back_even_where_nnunet_resamples(results_folder: Results, tmp_path: Path) -> None:
    write_case(tmp_path / "in", "x", 1, seed=5, affine=np.diag([2.5, 1.0, 2.0, 1.0]))
    for kind in ("none", "curve"):
        harmonize_folder(results_folder(kind, "3d_fullres"), tmp_path / "in", tmp_path / kind, progress=False)
        np.testing.assert_array_equal(read(tmp_path / kind / "x_0000.nii.gz"), read(tmp_path / "in" / "x_0000.nii.gz"))


def test_a_resampled_case_is_mapped_on_its_own_grid(results_folder: Results, tmp_path: Path) -> None:
    affine = np.diag([2.5, 1.0, 2.0, 1.0])
    write_case(tmp_path / "in", "x", 1, seed=5, affine=affine)
    harmonize_folder(
        results_folder("nyul", "3d_fullres"), tmp_path / "in", tmp_path / "out", site="narrow", progress=False
    )
    before, after = read(tmp_path / "in" / "x_0000.nii.gz"), read(tmp_path / "out" / "x_0000.nii.gz")
    assert after.shape == before.shape
    np.testing.assert_array_equal(nib.load(tmp_path / "out" / "x_0000.nii.gz").affine, affine)
    assert np.corrcoef(after[before > 0], before[before > 0])[0, 1] > 0.9
    np.testing.assert_array_equal(after[before == 0], 0)


def test_the_style_is_the_named_sites_then_the_checkpoints_then_the_volumes(
    results_folder: Results, tmp_path: Path
) -> None:
    write_case(tmp_path / "in", "x", 1, seed=5)
    raw = read(tmp_path / "in" / "x_0000.nii.gz")
    narrow, wide = style(0.5, 0.6, 1).quantiles[0], style(0.0, 1.7, 1).quantiles[0]
    inside = raw[raw != 0]
    own = np.quantile((inside - inside.mean()) / inside.std(), QUANTILE_LEVELS)
    at_site = results_folder("nyul", "2d", source="narrow")
    at_server = results_folder("nyul", "2d", narrow=(0.0, 1.695))  # the volume looks like neither style
    for model, site, source in ((at_site, None, narrow), (at_site, "wide", wide), (at_server, None, own)):
        harmonize_folder(model, tmp_path / "in", tmp_path / "out", site=site, progress=False)
        expected = expected_nyul(raw, source, wide)
        np.testing.assert_allclose(read(tmp_path / "out" / "x_0000.nii.gz"), expected, atol=0.01)


def test_a_volume_like_the_reference_is_given_back_where_no_style_is_stored(
    results_folder: Results, tmp_path: Path
) -> None:
    write_case(tmp_path / "in", "x", 1, seed=5)
    harmonize_folder(results_folder("nyul", "2d"), tmp_path / "in", tmp_path / "out", progress=False)
    np.testing.assert_array_equal(read(tmp_path / "out" / "x_0000.nii.gz"), read(tmp_path / "in" / "x_0000.nii.gz"))


def test_a_second_case_does_not_inherit_the_first_ones_style(results_folder: Results, tmp_path: Path) -> None:
    write_case(tmp_path / "one", "b", 1, seed=2)
    write_case(tmp_path / "two", "a", 1, seed=1)
    write_case(tmp_path / "two", "b", 1, seed=2)
    model = results_folder("nyul", "2d")
    for folder in ("one", "two"):
        harmonize_folder(model, tmp_path / folder, tmp_path / f"{folder}_out", progress=False)
    alone, after_another = (read(tmp_path / f"{folder}_out" / "b_0000.nii.gz") for folder in ("one", "two"))
    np.testing.assert_array_equal(alone, after_another)


def test_the_command_says_where_it_wrote(
    results_folder: Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_case(tmp_path / "in", "x", 1, seed=5)
    parser = ArgumentParser()
    harmonize.add_arguments(parser)
    words = ["-m", str(results_folder("none", "2d")), "-i", str(tmp_path / "in"), "-o", str(tmp_path / "out")]
    assert harmonize.run(parser.parse_args(words)) == 0
    assert f"1 cases written to {tmp_path / 'out'}" in capsys.readouterr().out


def test_bad_input_is_refused_in_one_sentence(results_folder: Results, tmp_path: Path) -> None:
    model, images, out = results_folder("nyul", "2d", n_channels=2), tmp_path / "in", tmp_path / "out"
    write_case(images, "x", 2, seed=5)
    with pytest.raises(PlanError, match=r"no style of site 'moon'. They have: wide, narrow"):
        harmonize_folder(model, images, out, site="moon", progress=False)
    with pytest.raises(DataError, match="originals would be lost"):
        harmonize_folder(model, images, images, progress=False)
    with pytest.raises(DataError, match="holds no image"):
        harmonize_folder(model, tmp_path / "nowhere", out, progress=False)
    with pytest.raises(CheckpointError, match="fold_3/checkpoint_final"):
        harmonize_folder(model, images, out, fold="3", progress=False)
    (images / "x_0001.nii.gz").unlink()
    with pytest.raises(DataError, match=r"x_0001\.nii\.gz is missing"):
        harmonize_folder(model, images, out, progress=False)
    checkpoint = model / "fold_all" / "checkpoint_final.pth"
    content = torch.load(checkpoint, weights_only=False)
    torch.save({**content, "trainer_name": "nnUNetTrainer"}, checkpoint)
    with pytest.raises(CheckpointError, match="not trained by nnunet_fedharm"):
        harmonize_folder(model, images, out, progress=False)
