"""One site's rounds: durable, repeatable, and equal to training without a break."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_fedharm.errors import CheckpointError, DataError, FederationError
from nnunet_fedharm.trainers.fedharm_trainer import nnUNetTrainerFedHarm
from nnunet_fedharm.trainers.local_training import LocalResult, LocalTraining
from nnunet_fedharm.trainers.results import initial_weights, write_results_folder
from nnunet_fedharm.trainers.weights import Weights
from tests.trainers.conftest import NAME, Planned
from tests.trainers.test_trainer import TRAINERS


def site(planned: Planned, state_folder: Path, kind: str = "curve", name: str = "A") -> LocalTraining:
    return LocalTraining(
        root=planned.root,
        dataset_name=NAME,
        plans=planned.plans[kind],
        dataset_json=planned.dataset_json,
        configuration="2d",
        fold="all",
        site=name,
        trainer_name=TRAINERS[kind],
        state_folder=state_folder,
        seed=11,
        device="cpu",
    )


def start(planned: Planned, kind: str = "curve") -> Weights:
    return initial_weights(planned.plans[kind], planned.dataset_json, "2d", TRAINERS[kind], 11)


def equal(one: LocalResult, other: LocalResult) -> bool:
    return all(np.array_equal(one.weights[name], other.weights[name]) for name in one.weights)


def test_a_repeated_round_gives_the_same_weights(active: Planned, tmp_path: Path) -> None:
    weights = start(active)
    first = site(active, tmp_path).run(phase="segmenter", round_index=0, first_epoch=0, epochs=1, weights=weights)
    second = site(active, tmp_path).run(
        phase="segmenter", round_index=1, first_epoch=1, epochs=1, weights=first.weights
    )
    # The answer of round 1 was lost: the server asks again, and the state of round 1 must not be used twice.
    again = site(active, tmp_path).run(phase="segmenter", round_index=1, first_epoch=1, epochs=1, weights=first.weights)
    assert equal(second, again)
    assert not equal(first, second)
    assert second.n_steps == 2
    assert second.n_cases == 6
    assert set(second.metrics) == {"train_loss", "val_loss", "dice", "seconds"}


def test_the_optimizer_lives_on_between_rounds(active: Planned, tmp_path: Path) -> None:
    weights = start(active)
    first = site(active, tmp_path / "kept").run(
        phase="segmenter", round_index=0, first_epoch=0, epochs=1, weights=weights
    )
    arguments = {"phase": "segmenter", "round_index": 1, "first_epoch": 1, "epochs": 1, "weights": first.weights}
    kept = site(active, tmp_path / "kept").run(**arguments)
    fresh = site(active, tmp_path / "fresh").run(**arguments)
    assert not equal(kept, fresh)


def test_a_round_that_gave_nan_is_refused_and_spoils_no_later_one(
    active: Planned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = start(active)
    arguments = {"phase": "segmenter", "epochs": 1, "weights": weights}
    site(active, tmp_path).run(round_index=0, first_epoch=0, **arguments)
    trained = nnUNetTrainerFedHarm.run_epochs

    def one_bad_case(trainer: nnUNetTrainerFedHarm, first: int, count: int) -> None:
        trained(trainer, first, count)
        next(iter(trainer.optimizer.state.values()))["momentum_buffer"].fill_(torch.nan)

    with monkeypatch.context() as patch:
        patch.setattr(nnUNetTrainerFedHarm, "run_epochs", one_bad_case)
        with pytest.raises(DataError, match="Site A: training gave NaN or infinity"):
            site(active, tmp_path).run(round_index=1, first_epoch=1, **arguments)
    after = site(active, tmp_path).run(round_index=1, first_epoch=1, **arguments)
    assert all(np.isfinite(value).all() for value in after.weights.values())


def test_a_round_that_was_missed_is_no_obstacle(active: Planned, tmp_path: Path) -> None:
    result = site(active, tmp_path).run(
        phase="segmenter", round_index=0, first_epoch=0, epochs=1, weights=start(active)
    )
    late = site(active, tmp_path).run(phase="segmenter", round_index=2, first_epoch=2, epochs=1, weights=result.weights)
    assert np.isfinite(late.metrics["train_loss"])


def test_harmonizer_rounds_change_only_the_harmonizer(active: Planned, tmp_path: Path) -> None:
    weights = start(active)
    result = site(active, tmp_path).run(phase="harmonizer", round_index=0, first_epoch=0, epochs=2, weights=weights)
    changed = {name for name in weights if not np.array_equal(weights[name], result.weights[name])}
    assert changed
    assert all(name.startswith("harmonizer.") for name in changed)
    assert result.n_cases == 8  # unlabelled images take part


def test_without_a_judge_such_a_site_sits_the_rounds_out(active: Planned, tmp_path: Path) -> None:
    options = active.plans["diffusion"]["configurations"]["2d"]["fedharm"]["harmonizer"]
    options["polarity"] = False
    try:
        weights = start(active, "diffusion")
        arguments = {"phase": "harmonizer", "round_index": 0, "first_epoch": 0, "epochs": 1, "weights": weights}
        away = site(active, tmp_path / "B", "diffusion", "B").run(**arguments)
        reference = site(active, tmp_path / "A", "diffusion").run(**arguments)
    finally:
        del options["polarity"]
    assert (away.n_steps, away.n_cases) == (0, 0)
    assert all(np.array_equal(weights[name], away.weights[name]) for name in weights)
    assert reference.n_steps > 0
    assert reference.n_cases == 4  # the reference's own, out of the eight of this pooled dataset
    assert not equal(away, reference)


def test_only_the_last_two_states_are_kept(active: Planned, tmp_path: Path) -> None:
    weights = start(active)
    for index in range(4):
        site(active, tmp_path).run(phase="harmonizer", round_index=index, first_epoch=0, epochs=1, weights=weights)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "harmonizer_round_00002.pt",
        "harmonizer_round_00003.pt",
    ]


def test_a_damaged_state_is_named_and_not_ignored(active: Planned, tmp_path: Path) -> None:
    (tmp_path / "segmenter_round_00000.pt").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"Site A cannot read its training state .*Delete that file"):
        site(active, tmp_path).run(phase="segmenter", round_index=1, first_epoch=1, epochs=1, weights=start(active))


def test_an_unknown_phase_is_refused(active: Planned, tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="Unknown phase 'warmup'"):
        site(active, tmp_path).run(phase="warmup", round_index=0, first_epoch=0, epochs=1, weights=start(active))  # type: ignore[arg-type]


def test_the_sites_results_folder_is_loaded_by_the_stock_predictor_with_its_own_style(
    active: Planned, tmp_path: Path
) -> None:
    weights = start(active, "nyul")
    folder = site(active, tmp_path, "nyul").finish(weights, active.fingerprint, epoch=2)
    assert {"checkpoint_final.pth", "checkpoint_best.pth", "checkpoint_latest.pth"} <= {
        p.name for p in folder.iterdir()
    }
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder.parent), ("all",))
    assert predictor.network.harmonizer._source_known


@pytest.mark.pictures
def test_the_servers_folder_keeps_curves_and_serves_every_site(active: Planned, tmp_path: Path) -> None:
    from nnunet_fedharm.nnunet_root import NnunetRoot

    history = {"train_losses": [0.5, 0.2], "val_losses": [0.6, 0.3], "mean_fg_dice": [0.4, 0.7]}
    folder = write_results_folder(
        NnunetRoot(tmp_path),
        NAME,
        active.plans["curve"],
        active.dataset_json,
        active.fingerprint,
        "2d",
        0,
        "nnUNetTrainerFedHarmCurve",
        start(active),
        epoch=1,
        history=history,
        which=("final", "best"),
    )
    assert (folder / "progress.png").is_file()
    checkpoint = torch.load(folder / "checkpoint_final.pth", weights_only=False)
    assert checkpoint["logging"]["mean_fg_dice"] == [0.4, 0.7]
    assert checkpoint["current_epoch"] == 2
    assert not bool(checkpoint["network_weights"]["harmonizer.source_known"])
