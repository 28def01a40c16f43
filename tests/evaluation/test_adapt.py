"""A new hospital gets its own results folder, and the stock predictor uses it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import Tensor

from nnunet_fedharm import cli
from nnunet_fedharm.errors import CheckpointError, DataError, PlanError
from nnunet_fedharm.evaluation.adapt_model import adapt_model
from nnunet_fedharm.evaluation.harmonize import load_harmonizer
from nnunet_fedharm.harmonizers.style import QUANTILE_LEVELS
from nnunet_fedharm.trainers.whole_volumes import harmonize_in_patches
from tests.evaluation.conftest import AFFINE, SHAPE, write_case

Results = Callable[..., Path]
NEAR_REFERENCE = (0.0, 1.65)
"""A second style so near to the reference that the skewed volumes below look like neither."""

CHECKPOINT = "checkpoint_final.pth"


def write_skewed(folder: Path, case: str, n_channels: int, seed: int, power: float = 4.0) -> None:
    """A box whose histogram leans to the dark, in a zero background."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for channel in range(n_channels):
        image = np.zeros(SHAPE, np.float32)
        image[5:20, 6:22, 4:16] = 100 + 800 * generator.random((15, 16, 12)) ** power
        nib.save(nib.Nifti1Image(image, AFFINE), folder / f"{case}_{channel:04d}.nii.gz")


def edit(model: Path, change: Callable[[dict[str, Tensor]], object], fold: str = "fold_all") -> None:
    """Change a fold's weights on disk."""
    path = model / fold / CHECKPOINT
    state = torch.load(path, weights_only=False)
    change(state["network_weights"])
    torch.save(state, path)


def shift_away(weights: dict[str, Tensor]) -> None:
    """Make the curve add three standard deviations to every voxel."""
    last = max(name for name in weights if name.startswith("harmonizer.tone") and name.endswith("bias"))
    weights[last][0] = 3.0


def judge_everything(weights: dict[str, Tensor], factor: float) -> None:
    """Let the judge's scores count `factor` times."""
    last = max(name for name in weights if name.startswith("harmonizer.polarity_judge.network.rest"))
    weights[last.replace("bias", "weight")].mul_(factor)


def add_folds(model: Path) -> Path:
    """Folds 0 and 1 in place of "all", with segmenters that differ."""
    for fold in ("fold_0", "fold_1"):
        shutil.copytree(model / "fold_all", model / fold)
    shutil.rmtree(model / "fold_all")
    generator = torch.Generator().manual_seed(1)

    def disturb(weights: dict[str, Tensor]) -> None:
        for name, value in weights.items():
            if name.startswith("segmenter") and value.dtype == torch.float32:
                value.add_(0.3 * torch.randn(value.shape, generator=generator))

    edit(model, disturb, "fold_1")
    return model


def stock(
    model: Path, images: Path, output: Path, *, folds: tuple[str, ...] = ("all",), mirror: bool = True
) -> dict[str, np.ndarray]:
    """Probabilities of the stock predictor."""
    predictor = nnUNetPredictor(use_mirroring=mirror, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), folds, CHECKPOINT)
    output.mkdir()
    predictor.predict_from_files_sequential(str(images), str(output), save_probabilities=True)
    return probabilities(output)


def probabilities(output: Path) -> dict[str, np.ndarray]:
    return {path.stem: np.load(path)["probabilities"] for path in output.glob("*.npz")}


def ours(model: Path, images: Path, output: Path, *words: str) -> dict[str, np.ndarray]:
    """Probabilities of `nnunet-fedharm predict`."""
    command = ["predict", "-m", str(model), "-i", str(images), "-o", str(output), "-npp", "0", "-nps", "0"]
    assert cli.main([*command, "--save_probabilities", "--disable_progress_bar", *words]) == 0
    return probabilities(output)


def equal(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> bool:
    assert set(first) == set(second)
    assert first
    return all(np.array_equal(first[case], second[case]) for case in first)


@pytest.mark.parametrize(
    ("kind", "configuration", "n_channels"),
    [("nyul", "2d", 4), ("nyul", "3d_fullres", 1), ("cyclegan", "3d_fullres", 2)],
)
def test_stock_prediction_with_the_adapted_folder_is_prediction_by_the_volumes_own_style(
    results_folder: Results, tmp_path: Path, kind: str, configuration: str, n_channels: int
) -> None:
    model = results_folder(kind, configuration, n_channels=n_channels, narrow=NEAR_REFERENCE)
    if kind == "cyclegan":  # before training nothing but the turn of an inverted channel would be seen
        edit(model, lambda weights: judge_everything(weights, -1e4))
        edit(model, lambda weights: weights["harmonizer.generator.tail.weight"].fill_(0.1))
    write_skewed(tmp_path / "in", "x", n_channels, seed=5)
    found = adapt_model(model, tmp_path / "in", tmp_path / "new", site="E", progress=False)
    assert found.folds["fold_all"].gate == 1
    adapted = stock(tmp_path / "new", tmp_path / "in", tmp_path / "out_stock")
    assert equal(adapted, ours(model, tmp_path / "in", tmp_path / "out_ours", "--style", "volume"))
    assert not equal(adapted, ours(model, tmp_path / "in", tmp_path / "out_wide", "--style", "wide"))


def test_every_fold_of_an_ensemble_serves_the_new_site(results_folder: Results, tmp_path: Path) -> None:
    model = add_folds(results_folder("cyclegan", "2d", narrow=NEAR_REFERENCE))
    edit(model, lambda weights: judge_everything(weights, 1e4), "fold_0")
    edit(model, lambda weights: judge_everything(weights, -1e4), "fold_1")
    write_skewed(tmp_path / "in", "x", 1, seed=5)
    found = adapt_model(model, tmp_path / "in", tmp_path / "new", site="E", progress=False)
    assert list(found.folds) == ["fold_0", "fold_1"]
    votes = [found.folds[fold].votes for fold in found.folds]
    assert votes[0] is not None
    assert votes[1] is not None
    assert votes[0][0] == pytest.approx(-votes[1][0])  # one judge is the other's opposite
    for fold in found.folds:
        weights = torch.load(tmp_path / "new" / fold / CHECKPOINT, weights_only=False)["network_weights"]
        np.testing.assert_allclose(weights["harmonizer.source_quantiles"], found.style.quantiles, rtol=1e-6)
        assert weights["harmonizer.source_polarity"].tolist() == pytest.approx(found.folds[fold].votes)
    adapted = stock(tmp_path / "new", tmp_path / "in", tmp_path / "out_stock", folds=("0", "1"))
    assert equal(adapted, ours(model, tmp_path / "in", tmp_path / "out_ours", "--style", "volume"))
    # Without --style the stored one is taken.
    assert equal(adapted, ours(tmp_path / "new", tmp_path / "in", tmp_path / "out_stored"))


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_an_inverted_site_is_turned_when_the_judge_says_so(
    results_folder: Results, tmp_path: Path, configuration: str
) -> None:
    model = results_folder("cyclegan", configuration)
    for seed in range(3):
        write_skewed(tmp_path / "in", f"x{seed}", 1, seed=seed)
    edit(model, lambda weights: judge_everything(weights, 1e4))
    first = adapt_model(model, tmp_path / "in", tmp_path / "one", site="E", progress=False).folds["fold_all"]
    edit(model, lambda weights: judge_everything(weights, -1))
    second = adapt_model(model, tmp_path / "in", tmp_path / "two", site="E", progress=False).folds["fold_all"]
    assert {first.inverted, second.inverted} == {(True,), (False,)}
    folder = tmp_path / ("one" if first.inverted[0] else "two")
    harmonizer = load_harmonizer(folder).harmonizer
    assert bool(harmonizer.source_known)
    assert float(harmonizer.source_polarity[0]) < -0.25
    image = torch.randn(1, 1, *([16] * harmonizer.spatial_dims))
    changed = harmonizer(image)
    assert torch.corrcoef(torch.stack([image.flatten(), changed.flatten()]))[0, 1] < -0.8


def test_a_map_that_leads_away_shuts_the_gate_and_leaves_the_plain_segmenter(
    results_folder: Results, tmp_path: Path
) -> None:
    model, plain = results_folder("curve", "2d"), results_folder("none", "2d")  # the same segmenter
    edit(model, shift_away)
    write_skewed(tmp_path / "in", "x", 1, seed=5)
    found = adapt_model(model, tmp_path / "in", tmp_path / "new", site="E", progress=False).folds["fold_all"]
    assert found.gate == 0
    assert found.distance_after > found.distance_before + 1
    as_it_is = stock(plain, tmp_path / "in", tmp_path / "out_plain")
    assert equal(as_it_is, stock(tmp_path / "new", tmp_path / "in", tmp_path / "out"))
    assert not equal(as_it_is, ours(model, tmp_path / "in", tmp_path / "out_narrow", "--style", "narrow"))


@pytest.mark.parametrize("wanted", [0.0, 1.0])
def test_with_labels_the_dice_judges_the_gate(results_folder: Results, tmp_path: Path, wanted: float) -> None:
    model = results_folder("curve", "2d")
    edit(model, shift_away)
    images = tmp_path / "in"
    for seed in range(2):
        write_skewed(images, f"x{seed}", 1, seed=seed)
    adapt_model(model, images, tmp_path / "first", site="E", progress=False)
    edit(tmp_path / "first", lambda weights: weights["harmonizer.source_gate"].fill_(wanted))
    stock(tmp_path / "first", images, tmp_path / "labels", mirror=False)
    (tmp_path / "labels" / "x1.nii.gz").unlink()  # only some volumes have labels
    found = adapt_model(model, images, tmp_path / "new", site="E", labels=tmp_path / "labels", progress=False)
    fold = found.folds["fold_all"]
    assert found.n_labelled == 1
    assert fold.gate == wanted
    assert (fold.dice_open if wanted else fold.dice_shut) == pytest.approx(1.0)
    assert fold.dice_open != fold.dice_shut
    weights = torch.load(tmp_path / "new" / "fold_all" / CHECKPOINT, weights_only=False)["network_weights"]
    assert float(weights["harmonizer.source_gate"]) == wanted


def test_nothing_but_the_source_differs_from_the_model_and_the_model_stays(
    results_folder: Results, tmp_path: Path
) -> None:
    model = results_folder("nyul", "2d", n_channels=2)
    before = {path: path.read_bytes() for path in model.rglob("*") if path.is_file()}
    for seed in range(3):
        write_skewed(tmp_path / "in", f"patient{seed}", 2, seed=seed)
    found = adapt_model(
        model, tmp_path / "in", tmp_path / "new", site="E", scanner="Maker 1.5 T", num_processes=2, progress=False
    )
    assert {path: path.read_bytes() for path in model.rglob("*") if path.is_file()} == before
    old, new = (
        torch.load(folder / "fold_all" / CHECKPOINT, weights_only=False) for folder in (model, tmp_path / "new")
    )
    assert set(old) == set(new)
    changed = {
        name for name, value in old["network_weights"].items() if not torch.equal(value, new["network_weights"][name])
    }
    assert changed == {f"harmonizer.source_{name}" for name in ("quantiles", "offset", "known")}
    for name in ("plans.json", "dataset.json", "dataset_fingerprint.json"):
        assert (tmp_path / "new" / name).read_bytes() == (model / name).read_bytes()
    facts = json.loads((tmp_path / "new" / "adaptation.json").read_text())
    assert (facts["site"], facts["scanner"]) == ("E", "Maker 1.5 T")
    assert facts["n_volumes"] == 3
    assert facts["folds"]["fold_all"]["votes"] is None  # nyul has no judge
    assert np.shape(facts["style"]["quantiles"]) == (2, len(QUANTILE_LEVELS))
    assert found.folds["fold_all"].distance_after < found.folds["fold_all"].distance_before
    page = (tmp_path / "new" / "adaptation.html").read_text()
    assert page.count("data:image/png") == 3 * 2 * 3
    assert "MR1" in page
    assert "patient" not in page.replace("images of patients", "")
    assert "patient0" not in json.dumps(facts)


def test_a_volume_in_patches_is_harmonized_as_a_whole_one(results_folder: Results) -> None:
    harmonizer = load_harmonizer(results_folder("nyul", "3d_fullres")).harmonizer
    harmonizer.serve(1)
    volume = torch.randn(1, 21, 17, 9)
    assert torch.equal(harmonize_in_patches(harmonizer, volume, (8, 8, 12)), harmonizer(volume[None])[0])
    flat = load_harmonizer(results_folder("nyul", "2d")).harmonizer
    flat.serve(1)
    assert torch.equal(harmonize_in_patches(flat, volume, (8, 12)), harmonizer(volume[None])[0])


def test_an_interrupted_write_leaves_nothing_half(
    results_folder: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = results_folder("nyul", "2d")
    write_skewed(tmp_path / "in", "x", 1, seed=5)
    home = tmp_path / "home"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("nnunet_fedharm.trainers.adapted_folder.torch.save", full)
        with pytest.raises(CheckpointError, match="No space left"):
            adapt_model(model, tmp_path / "in", home / "new", site="E", progress=False)
        assert list(home.iterdir()) == []
    adapt_model(model, tmp_path / "in", home / "new", site="E", progress=False)
    before = (home / "new" / "adaptation.json").read_text()
    with pytest.raises(DataError, match="exists"):
        adapt_model(model, tmp_path / "in", home / "new", site="F", progress=False)
    with monkeypatch.context() as patch:
        patch.setattr("nnunet_fedharm.trainers.adapted_folder.torch.save", stop)
        with pytest.raises(KeyboardInterrupt):
            adapt_model(model, tmp_path / "in", home / "new", site="F", overwrite=True, progress=False)
    assert (home / "new" / "adaptation.json").read_text() == before
    adapt_model(model, tmp_path / "in", home / "new", site="F", overwrite=True, progress=False)
    assert json.loads((home / "new" / "adaptation.json").read_text())["site"] == "F"
    assert [path.name for path in home.iterdir()] == ["new"]


def test_bad_input_is_refused_in_one_sentence(results_folder: Results, tmp_path: Path) -> None:
    model, images, new = results_folder("nyul", "2d", n_channels=2), tmp_path / "in", tmp_path / "new"

    def refused(error: type[Exception], match: str, **options: object) -> None:
        with pytest.raises(error, match=match):
            adapt_model(model, images, new, **{"site": "E", "progress": False, **options})  # type: ignore[arg-type]
        assert not new.exists()

    refused(DataError, "holds no image named CASE_0000.nii.gz")
    write_skewed(images, "x", 3, seed=0)
    refused(DataError, r"does not know the channel .*x_0002.*_0001 \(MR1\)")
    (images / "x_0002.nii.gz").unlink()
    good = (images / "x_0001.nii.gz").read_bytes()
    (images / "x_0001.nii.gz").unlink()
    refused(DataError, r"The channel .*x_0001.nii.gz is missing")
    (images / "x_0001.nii.gz").write_bytes(b"no image")
    refused(DataError, r"Site E, case x: .*x_0000.nii.gz cannot be read")
    (images / "x_0001.nii.gz").write_bytes(good[: len(good) // 2])  # ITK reads it, with zeros at the end
    refused(DataError, r"x_0001.nii.gz is damaged")
    for value, match in ((np.nan, "NaN or infinity"), (7.0, r"x_0001.nii.gz is constant")):
        nib.save(nib.Nifti1Image(np.full(SHAPE, value, np.float32), AFFINE), images / "x_0001.nii.gz")
        refused(DataError, match)
    mask = np.zeros(SHAPE, np.float32)
    mask[5:20, 6:22, 4:16] = 7
    nib.save(nib.Nifti1Image(mask, AFFINE), images / "x_0001.nii.gz")
    refused(DataError, "is 7 wherever it is not zero")
    (images / "x_0001.nii.gz").write_bytes(good)
    refused(DataError, "holds no label of the images, such as x.nii.gz", labels=tmp_path)
    refused(CheckpointError, "fold_3/checkpoint_final.pth", folds=["3"])
    refused(DataError, "--site is empty", site=" ")
    with pytest.raises(DataError, match="lie in one another"):
        adapt_model(model, images, model / "new", site="E", progress=False)
    new.mkdir()
    (new / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="did not write it"):
        adapt_model(model, images, new, site="E", overwrite=True, progress=False)
    assert (new / "thesis.txt").exists()
    with pytest.raises(PlanError, match="'none', which changes nothing"):
        adapt_model(results_folder("none", "2d"), images, tmp_path / "other", site="E", progress=False)
    state = torch.load(model / "fold_all" / CHECKPOINT, weights_only=False)
    torch.save({**state, "trainer_name": "nnUNetTrainer"}, model / "fold_all" / CHECKPOINT)
    with pytest.raises(CheckpointError, match="not trained by nnunet_fedharm"):
        adapt_model(model, images, tmp_path / "other", site="E", progress=False)


def test_the_command_prints_what_it_found_and_how_to_predict(
    results_folder: Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_case(tmp_path / "in", "x", 1, seed=5)
    words = ["-m", str(results_folder("nyul", "2d")), "-i", str(tmp_path / "in"), "-o", str(tmp_path / "new")]
    assert cli.main(["adapt", *words, "--site", "E"]) == 0
    shown = capsys.readouterr().out
    assert "distance to the reference" in shown
    assert "no judge" in shown
    assert (
        f"nnUNetv2_predict_from_modelfolder -i IMAGES -o PREDICTIONS -m {tmp_path / 'new'} -f all -device cpu" in shown
    )
    assert cli.main(["adapt", *words, "--site", "E"]) == cli.EXIT_ERROR
    assert capsys.readouterr().err.count("\n") == 1
