"""Whole runs of the real server and client code in one process: plans, training, checkpoints, without Flower's runtime."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from flwr.app import Message

from nnunet_fedharm.errors import DataError, FederationError, SiteMismatchError
from nnunet_fedharm.evaluation.harmonize import load_harmonizer
from nnunet_fedharm.federation.client_app import app
from nnunet_fedharm.federation.codec import Weights
from nnunet_fedharm.federation.config import FederateConfig
from nnunet_fedharm.federation.events import read_events
from nnunet_fedharm.federation.ownership import GATE
from nnunet_fedharm.federation.registered import write_registered
from nnunet_fedharm.federation.server_app import run_server
from nnunet_fedharm.federation.state import find_run, load_state, save_state
from tests.federation.local_grid import Client, LocalGrid, app_client

pytestmark = pytest.mark.slow


class PowerCut(BaseException):
    """Ends the server's process in the middle of something, as far as one process can play it."""


def tiny(root: Path, **options: Any) -> FederateConfig:
    """A run that trains in a second."""
    small: dict[str, Any] = {
        "root": str(root),
        "dataset": "1",
        "segmenter_rounds": 2,
        "iterations_per_epoch": 1,
        "val_iterations": 1,
        "base_features": 4,
        "max_features": 8,
        "batch_size": 2,
        "patch_size": "24x24",
        "deadline_s": 60.0,
        "join_wait_s": 2.0,
    }
    return FederateConfig(**{**small, **options})


def real_sites(config: FederateConfig, count: int) -> dict[int, Client]:
    return {100 + index: app_client(app, {"partition-id": index}, config.to_run_config()) for index in range(count)}


def final_weights(config: FederateConfig) -> Weights:
    folder = find_run(Path(config.root) / "server" / "fedharm", full(config).fingerprint())
    assert folder is not None
    state, weights = load_state(folder)
    assert weights is not None
    assert state.rounds_done["segmenter"] == config.segmenter_rounds
    return weights


def shut_the_gate(config: FederateConfig) -> None:
    folder = find_run(Path(config.root) / "server" / "fedharm", full(config).fingerprint())
    assert folder is not None
    state, weights = load_state(folder)
    assert weights is not None
    save_state(folder, state, weights | {GATE: np.zeros_like(weights[GATE])})


def full(config: FederateConfig) -> FederateConfig:
    names = sorted(path.name for path in (Path(config.root) / "sites").iterdir())
    return replace(config, sites=",".join(names))


def cut_at(client: Client, phase_round: tuple[str, int]) -> Client:
    """The client, but the power goes when it is asked for this round."""

    def cutting(message: Message) -> Message | None:
        values = message.content.config_records["config"]
        if (values.get("phase"), values.get("round")) == phase_round:
            raise PowerCut
        return client(message)

    return cutting


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, make_consortium: Callable[..., Path]) -> Path:
    return make_consortium(tmp_path_factory.mktemp("template"), {"A": (2, 0), "B": (2, 0), "C": (0, 2)})


@pytest.fixture
def consortium(tmp_path: Path, template: Path) -> Path:
    shutil.copytree(template, tmp_path / "consortium")
    return tmp_path / "consortium"


def test_a_stopped_run_resumes_at_that_round_and_ends_with_the_very_same_weights(
    consortium: Path, tmp_path: Path
) -> None:
    shutil.copytree(consortium, tmp_path / "other")
    options: dict[str, Any] = {"harmonizer": "curve", "harmonizer_rounds": 1, "phases": "finetune"}
    whole = tiny(consortium, **options)
    results = run_server(LocalGrid(real_sites(whole, 3)), whole)
    assert {path.name for path in results.glob("*.pth")} == {
        f"checkpoint_{name}.pth" for name in ("latest", "best", "final")
    }

    broken = tiny(tmp_path / "other", **options)
    sites = real_sites(broken, 3)
    with pytest.raises(PowerCut):
        run_server(LocalGrid({**sites, 101: cut_at(sites[101], ("segmenter", 1))}), broken)
    grid = LocalGrid(sites)
    run_server(grid, broken)
    kinds = [kind for kind, _ in grid.sent]
    assert kinds.count("query.prepare") == kinds.count("query.summarize") == 0, "what is done is not done again"
    assert kinds.count("train") == 2, "two sites, round 2"
    expected, found = final_weights(whole), final_weights(broken)
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_a_stopped_run_resumes_at_once_without_a_site_that_was_removed(consortium: Path) -> None:
    config = tiny(consortium, quorum=1, join_wait_s=600.0)
    sites = real_sites(config, 3)
    with pytest.raises(PowerCut):
        run_server(LocalGrid({**sites, 100: cut_at(sites[100], ("segmenter", 1))}), config)
    fedharm = consortium / "server" / "fedharm"
    write_registered(fedharm, {100: "A", 102: "C"})  # what `server remove` leaves
    del sites[101]
    run_server(LocalGrid(sites), config)
    events, _ = read_events(fedharm / "events.jsonl")
    assert [event["sites"] for event in events if event["event"] == "round_end"] == [["A", "B"], ["A"]]
    assert [event["rounds_done"]["segmenter"] for event in events if event["event"] == "started"] == [0, 1]
    assert not [event for event in events if event["event"] == "waiting"]
    assert events[-1]["sites_without_model"] == ["B"]


@pytest.mark.parametrize("lost", ["nnUNet_preprocessed", "nnUNet_preprocessed fedharm"])
def test_a_site_that_lost_its_preprocessed_cases_makes_them_again_and_takes_part(consortium: Path, lost: str) -> None:
    config = tiny(consortium, segmenter_rounds=3, quorum=1)
    sites = real_sites(config, 3)
    home, asked = consortium / "sites" / "B", sites[101]

    def losing(message: Message) -> Message | None:
        values = message.content.config_records.get("config", {})
        if message.metadata.message_type == "train" and values.get("round") == 1:
            for folder in lost.split():
                shutil.rmtree(home / folder, ignore_errors=True)
        return asked(message)

    run_server(LocalGrid({**sites, 101: losing}), config)
    events = read_events(consortium / "server" / "fedharm" / "events.jsonl")[0]
    assert [event["sites"] for event in events if event["event"] == "round_end"] == [["A", "B"], ["A"], ["A", "B"]]
    assert list((home / "nnUNet_preprocessed" / "Dataset001_Blobs").glob("*_2d/*.b2nd"))


def test_a_finished_run_is_not_trained_again_and_a_late_site_gets_the_model(consortium: Path) -> None:
    config = tiny(consortium, segmenter_rounds=1)
    sites = real_sites(config, 3)

    def away_at_the_end(message: Message) -> Message | None:
        return None if message.metadata.message_type == "query.finish" else sites[102](message)

    results = run_server(LocalGrid({**sites, 102: away_at_the_end}), replace(config, deadline_s=3.0))
    pattern = "sites/*/nnUNet_results/*/*/fold_all/checkpoint_final.pth"
    assert sorted(path.relative_to(consortium).parts[1] for path in consortium.glob(pattern)) == ["A", "B"]
    for name in ("best", "latest"):
        (results / f"checkpoint_{name}.pth").unlink()  # as by a server that was killed before it wrote them
    grid = LocalGrid(sites)
    run_server(grid, config)
    assert [kind for kind, _ in grid.sent if kind != "query.preflight"] == ["query.finish"]
    assert len(list(consortium.glob(pattern))) == 3
    assert {path.stem for path in results.glob("*.pth")} == {f"checkpoint_{n}" for n in ("best", "final", "latest")}


def test_restart_trains_anew_and_touches_no_former_state(consortium: Path) -> None:
    config = tiny(consortium, segmenter_rounds=1, harmonizer="nyul", fp16=True)
    run_server(LocalGrid(real_sites(config, 3)), config)
    run_server(LocalGrid(real_sites(config, 3)), replace(config, restart=True))
    assert len(list((consortium / "server" / "fedharm").glob(f"{full(config).fingerprint()}-*"))) == 2


@pytest.mark.parametrize(("kind", "rounds"), [("nyul", 0), ("polarity", 1)])
def test_every_finished_model_harmonizes(consortium: Path, kind: str, rounds: int) -> None:
    config = tiny(consortium, segmenter_rounds=1, harmonizer=kind, harmonizer_rounds=rounds, reference="A")
    results = run_server(LocalGrid(real_sites(config, 3)), config)
    pattern = "sites/*/nnUNet_results/*/*/fold_all/checkpoint_final.pth"
    files = [results / "checkpoint_final.pth", results / "checkpoint_best.pth", *sorted(consortium.glob(pattern))]
    assert len(files) == 5
    for file in files:
        harmonizer = load_harmonizer(file.parents[1], fold="all", checkpoint=file.name, device="cpu").harmonizer
        assert harmonizer.gate == 1, file
    if kind == "nyul":
        shut_the_gate(config)  # as former releases left it
        for file in files[2:]:
            file.unlink()
        grid = LocalGrid(real_sites(config, 3))
        run_server(grid, config)
        assert [sent for sent, _ in grid.sent if sent == "train"] == [], "nothing is trained again"
        assert all(file.exists() for file in files)
        assert final_weights(config)[GATE] == 1
    image = torch.randn(1, 1, 24, 24, generator=torch.Generator().manual_seed(0))
    harmonizer.bank_gate.fill_(1.0)
    harmonizer.serve(2)
    assert not torch.equal(harmonizer(image), image)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        ("no dataset", "Site B has no dataset"),
        ("nan", "Site B.*NaN"),
        ("one case", "Site B.*one"),
        ("empty", "Site B.*empty|Site B.*no case"),
        ("other labels", "Site B disagrees on labels"),
        ("two channels", "Site B"),
    ],
)
def test_bad_data_is_refused_by_site_before_anything_runs(consortium: Path, harm: str, words: str) -> None:
    spoil(consortium / "sites" / "B" / "nnUNet_raw" / "Dataset001_Blobs", harm)
    config = tiny(consortium)
    with pytest.raises((FederationError, SiteMismatchError, DataError), match=words):
        run_server(LocalGrid(real_sites(config, 3)), config)
    log = consortium / "server" / "fedharm" / "events.jsonl"
    assert read_events(log)[0][-1]["event"] == "failed"
    assert "Bcase" not in log.read_text(), "case identifiers stay at the site"
    assert not list(consortium.glob("sites/*/nnUNet_preprocessed/*"))


def spoil(dataset: Path, harm: str) -> None:
    image = dataset / "imagesTr" / "Bcase000_0000.nii.gz"
    description = dataset / "dataset.json"
    if harm == "no dataset":
        shutil.rmtree(dataset)
    elif harm == "nan":
        volume = nibabel.load(image)
        values = np.array(volume.get_fdata(), dtype=np.float32)
        values[0, 0, 0] = np.nan
        nibabel.save(nibabel.Nifti1Image(values, volume.affine), image)
    elif harm == "one case":
        image.unlink()
        (dataset / "labelsTr" / "Bcase000.nii.gz").unlink()
    elif harm == "empty":
        for path in [*dataset.glob("imagesTr/*"), *dataset.glob("labelsTr/*")]:
            path.unlink()
    elif harm == "other labels":
        description.write_text(description.read_text().replace('"ball"', '"lesion"'))
    else:
        description.write_text(description.read_text().replace('{"0": "MR0"}', '{"0": "MR0", "1": "MR1"}'))


def test_a_missing_site_is_named_before_training(consortium: Path) -> None:
    config = tiny(consortium)
    with pytest.raises(FederationError, match="did not connect within 2 s: C"):
        run_server(LocalGrid(real_sites(config, 2)), config)


def test_a_private_run_has_the_network_of_its_start_whatever_its_noisy_fingerprint_would_lead_to(
    consortium: Path,
) -> None:
    small = tiny(consortium, segmenter_rounds=1)
    fold = run_server(LocalGrid(real_sites(small, 3)), small)
    start = shutil.copytree(fold.parent, consortium / "start")
    usual = {"base_features": 32, "max_features": 0, "patch_size": "", "plans_name": "Started"}
    config = tiny(
        consortium, segmenter_rounds=1, epsilon=8.0, delta=1e-3, patients_per_step=1.0, start_from=str(start), **usual
    )
    later = run_server(LocalGrid(real_sites(config, 3)), config)
    before, after = (
        json.loads((folder / "plans.json").read_text())["configurations"]["2d"] for folder in (start, later.parent)
    )
    for key in ("architecture", "patch_size", "spacing"):
        assert after[key] == before[key]
    model = "/".join(fold.parent.parts[-2:])
    assert after["fedharm"]["starts"] == [{"model": model, "epsilon": None, "delta": None}]
