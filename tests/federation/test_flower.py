"""The real thing: `flwr run` in simulation, and a SuperLink with SuperNodes as processes on loopback."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nnunet_fedharm.federation.config import FederateConfig
from nnunet_fedharm.federation.daemon import descendants, stop_process
from nnunet_fedharm.federation.events import read_events
from nnunet_fedharm.federation.launch import federate
from nnunet_fedharm.federation.server_app import run_server
from tests.federation.deployment import Deployment
from tests.federation.local_grid import LocalGrid
from tests.federation.test_in_process import PowerCut, cut_at, real_sites, tiny

pytestmark = pytest.mark.slow

RESULTS = "nnUNet_results/Dataset001_Blobs/nnUNetTrainerFedHarmCurve__nnUNetFedHarmPlans__2d"
FILES = {"plans.json", "dataset.json", "dataset_fingerprint.json"}
CHECKPOINTS = {"checkpoint_latest.pth", "checkpoint_best.pth", "checkpoint_final.pth"}


def is_event(name: str, **details: Any) -> Callable[[dict[str, Any]], bool]:
    wanted = {"event": name, **details}
    return lambda event: all(event.get(key) == value for key, value in wanted.items())


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    started = Deployment(tmp_path)
    yield started
    started.stop()


def command(config: FederateConfig) -> list[str]:
    """The command line of a run; every value is said, so the options are read as well."""
    words = [sys.executable, "-m", "nnunet_fedharm.cli", "federate"]
    defaults = FederateConfig()
    for name, value in vars(config).items():
        if value != getattr(defaults, name):
            words += [f"--{name.replace('_', '-')}"] + ([] if isinstance(value, bool) else [str(value)])
    return words


def check_results(folder: Path) -> None:
    assert {path.name for path in folder.glob("*.json")} >= FILES
    assert {path.name for path in (folder / "fold_all").glob("*.pth")} >= CHECKPOINTS


def predict(folder: Path, images: Path, output: Path) -> int:
    """Number of cases that the stock predictor segments with this folder."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    output.mkdir()
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False, perform_everything_on_device=False)
    predictor.initialize_from_trained_model_folder(
        str(folder), use_folds=("all",), checkpoint_name="checkpoint_final.pth"
    )
    predictor.predict_from_files_sequential(str(images), str(output))
    return len(list(output.glob("*.nii.gz")))


def test_a_simulation_ends_with_standard_results_at_the_server_and_every_site(
    tmp_path: Path, make_consortium: Callable[..., Path]
) -> None:
    root = make_consortium(tmp_path, {"A": (2, 0), "B": (2, 0), "C": (0, 2)})
    config = tiny(
        root, harmonizer="curve", harmonizer_rounds=1, segmenter_rounds=1
    )  # more rounds, more sites at once: long ones
    lines: list[str] = []
    results = federate(config, show=lines.append)
    assert results == root / "server" / RESULTS / "fold_all"
    for home in (root / "server", *(root / "sites").iterdir()):
        check_results(home / RESULTS)
    assert (
        predict(
            root / "sites" / "C" / RESULTS,
            root / "sites/C/nnUNet_raw/Dataset001_Blobs/imagesUnlabelled",
            tmp_path / "o",
        )
        == 2
    )
    text = "\n".join(lines)
    assert "harmonizer round 1/1 done: loss" in text
    assert "segmenter round 1/1 done: loss" in text
    log = root / "server" / "fedharm" / "events.jsonl"
    assert "case0" not in log.read_text(), "no case identifier leaves a site"
    trained = [(event["phase"], event["site"]) for event in read_events(log)[0] if event["event"] == "site_trained"]
    assert sorted(trained) == sorted([("harmonizer", site) for site in "ABC"] + [("segmenter", site) for site in "AB"])
    assert not (root / "flower" / "daemon.json").exists()


@pytest.mark.long
def test_a_stopped_run_goes_on_in_a_deployment_where_a_killed_site_comes_back(
    deployment: Deployment, make_consortium: Callable[..., Path]
) -> None:
    root = make_consortium(deployment.root, {"A": (2, 0), "B": (2, 0), "C": (0, 2)})
    options: dict[str, Any] = {"harmonizer": "curve", "phases": "finetune", "segmenter_rounds": 3, "quorum": 1}
    config = tiny(root, sites="A,B,C", **options)
    sites = real_sites(config, 3)
    with pytest.raises(PowerCut):  # in one process: everything up to round 2, which costs a minute in a deployment
        run_server(LocalGrid({**sites, 100: cut_at(sites[100], ("segmenter", 1))}), config)

    deployment.start_superlink()
    for site in "ABC":
        deployment.start_site(site)
    before = len(deployment.events())
    deployment.run(replace(config, join_wait_s=90.0))
    started = deployment.wait_for(is_event("started"), after=before)
    assert started["resumed"]
    assert started["rounds_done"] == {"harmonizer": 0, "segmenter": 1}
    deployment.wait_for(is_event("round_start", round=2), after=before)
    deployment.kill("B")
    deployment.start_site("B")
    assert deployment.wait_for(is_event("round_end", round=2), after=before)["sites"] == ["A"]
    assert deployment.wait_for(is_event("round_end", round=3), after=before)["sites"] == ["A", "B"]
    deployment.wait_for(is_event("finished", sites_without_model=[]), after=before)
    for home in (root / "server", *(root / "sites").iterdir()):
        check_results(home / RESULTS)


def alive(pid: int) -> bool:
    shown = subprocess.run(["ps", "-p", str(pid), "-o", "stat="], capture_output=True, text=True, check=False)
    return shown.stdout.strip() not in ("", "Z")


def test_ctrl_c_stops_the_daemon_too(tmp_path: Path, make_consortium: Callable[..., Path]) -> None:
    root = make_consortium(tmp_path, {"A": (2, 0), "B": (2, 0)})
    run = subprocess.Popen(
        command(tiny(root)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A background shell ignores Ctrl-C for its children; a terminal, which this test stands for, does not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        end = time.monotonic() + 60
        while not (root / "flower" / "run.log").exists() and time.monotonic() < end:
            time.sleep(0.1)
        family = descendants(run.pid)
        run.send_signal(signal.SIGINT)
        output, _ = run.communicate(timeout=60)
    finally:
        stop_process(run)
    assert run.returncode == 130, output
    assert family
    assert not [pid for pid in family if alive(pid)]
    assert not (root / "flower" / "daemon.json").exists()
