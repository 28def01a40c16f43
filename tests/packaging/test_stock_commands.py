"""The plugin's promise, end to end: `plan`, then unmodified `nnUNetv2_train` and `nnUNetv2_predict`, in new processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest

from nnunet_fedharm.cli import main

TRAIN = "from nnunetv2.run.run_training import run_training_entry; run_training_entry()"
PREDICT = "from nnunetv2.inference.predict_from_raw_data import predict_entry_point; predict_entry_point()"
"""What nnU-Net's console scripts run; called this way they need no PATH."""


def run(entry: str, *words: object, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", entry, *map(str, words)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout


@pytest.fixture
def nnunet_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path


@pytest.mark.slow
def test_stock_commands_train_and_predict_with_a_harmonized_segmenter(
    nnunet_folders: Path, make_raw_dataset: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = nnunet_folders
    raw = make_raw_dataset(folder / "nnUNet_raw", n_labelled=6)
    trainer = ("-tr", "nnUNetTrainerFedHarmCurve", "-p", "nnUNetFedHarmPlans")
    sizes = "--base-features 4 --max-features 8 --batch-size 2"
    epochs = "--harmonizer-epochs 1 --segmenter-epochs 1 --iterations-per-epoch 2 --val-iterations-per-epoch 1"
    assert main(f"plan -d 1 -c 2d --harmonizer curve -np 1 {sizes} {epochs}".split()) == 0
    shown = capsys.readouterr().out
    program, *printed = next(line.split() for line in shown.splitlines() if "nnUNetv2_train" in line)
    assert program == "nnUNetv2_train"
    run(TRAIN, *printed, "-device", "cpu", cwd=folder, nnUNet_n_proc_DA="0")
    results = folder / "nnUNet_results" / raw.name / "nnUNetTrainerFedHarmCurve__nnUNetFedHarmPlans__2d" / "fold_0"
    assert (results / "checkpoint_final.pth").is_file()
    assert (results / "progress.png").is_file()
    output = folder / "predicted"
    chosen = ("-d", 1, "-c", "2d", "-f", 0, *trainer, "-i", raw / "imagesTr", "-o", output)
    # No worker processes: what they read and write has nothing of ours, and each starts for longer than it works here.
    run(PREDICT, *chosen, "-device", "cpu", "-npp", 0, "-nps", 0, "--disable_tta", cwd=folder)
    for label in sorted((raw / "labelsTr").iterdir()):
        predicted, reference = nibabel.load(output / label.name), nibabel.load(label)
        assert predicted.shape == reference.shape
        assert np.array_equal(predicted.affine, reference.affine)
