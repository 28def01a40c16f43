"""`nnunet-fedharm predict`: what it adds to the stock predictor, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from nnunet_fedharm import cli
from nnunet_fedharm.errors import CheckpointError, PlanError
from nnunet_fedharm.harmonizers import build_harmonizer
from nnunet_fedharm.harmonizers.adaptation import known_gate, measure_source, volume_source
from nnunet_fedharm.harmonizers.style import QUANTILE_LEVELS, Style
from nnunet_fedharm.trainers.predictor import FedHarmPredictor
from tests.evaluation.conftest import style, write_case
from tests.evaluation.test_adapt import CHECKPOINT, NEAR_REFERENCE, equal, ours, stock, write_skewed

Results = Callable[..., Path]


def test_each_volume_is_mapped_by_its_own_style(results_folder: Results, tmp_path: Path) -> None:
    model = results_folder("nyul", "2d", narrow=NEAR_REFERENCE)
    for case, power in (("a", 4.0), ("b", 2.5)):
        write_skewed(tmp_path / "both", case, 1, seed=1, power=power)
        write_skewed(tmp_path / case, case, 1, seed=1, power=power)
    both = ours(model, tmp_path / "both", tmp_path / "out")
    for case in ("a", "b"):
        alone = ours(model, tmp_path / case, tmp_path / f"out_{case}")
        assert np.array_equal(both[case], alone[case])


def test_a_volume_like_the_reference_is_segmented_as_it_is(results_folder: Results, tmp_path: Path) -> None:
    model, plain = results_folder("nyul", "2d"), results_folder("none", "2d")  # the same segmenter
    write_case(tmp_path / "in", "x", 1, seed=5)
    own = ours(model, tmp_path / "in", tmp_path / "out")
    assert equal(own, stock(plain, tmp_path / "in", tmp_path / "out_plain"))
    assert not equal(own, ours(model, tmp_path / "in", tmp_path / "out_narrow", "--style", "narrow"))


def test_with_a_stored_style_the_default_is_stock_prediction(results_folder: Results, tmp_path: Path) -> None:
    model = results_folder("nyul", "3d_fullres", source="narrow")
    write_skewed(tmp_path / "in", "x", 1, seed=5)
    expected = stock(model, tmp_path / "in", tmp_path / "out_stock")
    assert equal(expected, ours(model, tmp_path / "in", tmp_path / "out"))
    assert equal(expected, ours(model, tmp_path / "in", tmp_path / "out_site", "--style", "narrow"))
    assert not equal(expected, ours(model, tmp_path / "in", tmp_path / "out_volume", "--style", "volume"))


def test_the_stored_source_holds_again_after_a_volume(results_folder: Results) -> None:
    model = results_folder("nyul", "2d", source="narrow")
    predictor = FedHarmPredictor(style="volume", device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), ("all",))
    before = predictor.harmonizer.source_quantiles.clone()
    predictor.predict_logits_from_preprocessed_data(torch.randn(1, 3, 32, 32) ** 3)
    assert torch.equal(predictor.harmonizer.source_quantiles, before)


def test_background_processes_give_the_same_and_a_data_set_can_be_named(
    results_folder: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = results_folder("nyul", "2d", narrow=NEAR_REFERENCE)
    write_skewed(tmp_path / "in", "x", 1, seed=5)
    expected = ours(model, tmp_path / "in", tmp_path / "out")
    trainer, plans, configuration = model.name.split("__")
    for name, folder in zip(("raw", "preprocessed", "results"), ("r", "p", model.parents[1]), strict=True):
        monkeypatch.setenv(f"nnUNet_{name}", str(folder))
    words = ["-i", str(tmp_path / "in"), "-o", str(tmp_path / "out_d"), "-d", "1", "-tr", trainer, "-p", plans]
    command = ["predict", *words, "-c", configuration, "-npp", "1", "-nps", "1", "--save_probabilities"]
    assert cli.main(command) == 0
    assert "style: volume" in capsys.readouterr().out
    assert np.array_equal(np.load(tmp_path / "out_d" / "x.npz")["probabilities"], expected["x"])


def test_what_cannot_be_predicted_is_refused_in_one_sentence(
    results_folder: Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = results_folder("nyul", "2d")
    write_skewed(tmp_path / "in", "x", 1, seed=5)
    words = ["predict", "-m", str(model), "-i", str(tmp_path / "in"), "-o", str(tmp_path / "out")]
    cases = (
        ([*words, "--style", "moon"], "no style of site 'moon'. They have: wide, narrow"),
        ([*words, "--style", "stored"], "stores no style"),
        ([*words, "-f", "3"], "fold_3/checkpoint_final.pth"),
        ([*words, "-d", "1"], "either as a folder"),
        ([*words, "-step_size", "2"], "must lie in"),
        ([*words, "--device", "abacus"], "Unknown device"),
        ([*words[:4], str(tmp_path), *words[5:]], "holds no image"),
        (["predict", "-d", "1", *words[3:]], "give the trainer"),
    )
    for command, message in cases:
        capsys.readouterr()
        assert cli.main(command) == cli.EXIT_ERROR, message
        shown = capsys.readouterr().err
        assert message in shown
        assert shown.count("\n") == 1


def test_a_stock_model_and_weights_of_another_network_are_refused(results_folder: Results) -> None:
    model = results_folder("nyul", "2d")
    path = model / "fold_all" / CHECKPOINT
    state = torch.load(path, weights_only=False)
    predictor = FedHarmPredictor(device=torch.device("cpu"), allow_tqdm=False)
    torch.save({**state, "network_weights": {}}, path)
    with pytest.raises(CheckpointError, match="do not fit the network"):
        predictor.initialize_from_trained_model_folder(str(model), ("all",))
    weights = {name.removeprefix("segmenter."): value for name, value in state["network_weights"].items()}
    weights = {name: value for name, value in weights.items() if not name.startswith("harmonizer")}
    torch.save({**state, "trainer_name": "nnUNetTrainer", "network_weights": weights}, path)
    with pytest.raises(CheckpointError, match="trained by nnUNetTrainer, not by nnunet_fedharm"):
        predictor.initialize_from_trained_model_folder(str(model), ("all",))


def _bank(**polarity: float) -> tuple[list[str], object]:
    scales = {"reference": 1.7, "near": 1.5, "far": 1.0}
    styles = [style(0.0, scale, 1) for scale in scales.values()]
    harmonizer = build_harmonizer("nyul", {}, num_channels=1, spatial_dims=2, styles=styles, reference=styles[0])
    names = list(scales)
    for name, value in polarity.items():
        harmonizer.bank_polarity[names.index(name)] = value
    return names, harmonizer


@pytest.mark.parametrize(
    ("scale", "seen", "gate"),
    [
        (1.68, 1.0, 0.0),  # the reference's own
        (1.52, 1.0, 1.0),  # a known site's
        (2.3, 1.0, 1.0),  # nearest to the reference, but like no site
        (1.68, -1.0, 1.0),  # the reference's histogram, upside down: no such site is known
    ],
)
def test_only_what_cannot_be_told_from_the_reference_keeps_its_images(scale: float, seen: float, gate: float) -> None:
    _, harmonizer = _bank()
    assert known_gate(harmonizer, style(0.0, scale, 1), [seen]) == gate  # type: ignore[arg-type]


def test_a_volume_like_a_site_whose_gate_is_shut_keeps_its_images() -> None:
    names, harmonizer = _bank(far=-1.0)
    harmonizer.bank_gate[names.index("far")] = 0.0  # type: ignore[attr-defined]
    assert known_gate(harmonizer, style(0.0, 1.02, 1), [-1.0]) == 0.0  # type: ignore[arg-type]
    assert known_gate(harmonizer, style(0.0, 1.02, 1), [1.0]) == 1.0  # type: ignore[arg-type]


def test_the_judge_of_a_large_volume_sees_its_centre(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = style(0.0, 1.7, 1)
    harmonizer = build_harmonizer(
        "cyclegan", {}, num_channels=1, spatial_dims=3, styles=[reference], reference=reference
    )
    volume = torch.randn(1, 24, 16, 16)
    own, whole = measure_source(harmonizer, volume)
    monkeypatch.setattr("nnunet_fedharm.harmonizers.adaptation.MAX_JUDGED_VOXELS", volume.numel() // 8)
    same, centre = measure_source(harmonizer, volume)
    quantiles = torch.tensor(own.quantiles, dtype=torch.float32)[None]
    expected = harmonizer.votes(volume[None, :, 6:18, 4:12, 4:12], quantiles)  # type: ignore[operator]
    assert centre == expected[0].tolist() != whole
    np.testing.assert_array_equal(same.quantiles, own.quantiles)  # the style is the whole volume's


def test_a_stored_gate_counts_more_than_the_banks() -> None:
    _, harmonizer = _bank()
    image = torch.linspace(-1.7, 1.7, 400).reshape(1, 20, 20)[:, None]  # like the reference
    harmonizer.open_gate()  # type: ignore[attr-defined]
    with volume_source(harmonizer, image):  # type: ignore[arg-type]
        assert float(harmonizer.source_gate) == 0.0  # type: ignore[attr-defined]
    harmonizer.set_source(Style(np.zeros((1, len(QUANTILE_LEVELS))), np.zeros(1), 1))  # type: ignore[attr-defined]
    with volume_source(harmonizer, image):  # type: ignore[arg-type]
        assert float(harmonizer.source_gate) == 1.0  # type: ignore[attr-defined]


def test_an_unknown_site_names_the_known_ones(results_folder: Results) -> None:
    predictor = FedHarmPredictor(style="E", device=torch.device("cpu"), allow_tqdm=False)
    with pytest.raises(PlanError, match="wide, narrow; or use 'volume' or 'stored'"):
        predictor.initialize_from_trained_model_folder(str(results_folder("nyul", "2d")), ("all",))
