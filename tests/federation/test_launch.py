"""How simulated sites share processors and GPUs, and whose end a follower takes for its run's."""

from __future__ import annotations

import argparse
import re
import subprocess
from pathlib import Path

import pytest
import torch

from nnunet_fedharm.commands import federate as command
from nnunet_fedharm.commands import server as server_command
from nnunet_fedharm.errors import CheckpointError
from nnunet_fedharm.federation import launch
from nnunet_fedharm.federation.config import FederateConfig
from nnunet_fedharm.federation.events import EventLog
from nnunet_fedharm.federation.launch import _follow, run_arguments


def resources(**options: object) -> dict[str, float]:
    config = FederateConfig(sites="A,B,C,D,E", **options)  # type: ignore[arg-type]
    return {key: float(value) for key, value in re.findall(r"(\S+)=(\S+)", run_arguments(config, Path("run.toml"))[-1])}


def test_on_a_cpu_as_many_sites_train_at_once_as_asked_for() -> None:
    found = resources(parallel_sites=3)
    assert found["num-supernodes"] == 5
    assert found["init-args-num-cpus"] / found["client-resources-num-cpus"] == 3
    assert "init-args-num-gpus" not in found


@pytest.mark.parametrize(
    ("gpus", "sites", "share"), [(1, 1, 1.0), (1, 4, 0.25), (4, 4, 1.0), (4, 8, 0.5), (4, 5, 0.5), (8, 2, 1.0)]
)
def test_sites_get_equal_shares_of_whole_gpus(gpus: int, sites: int, share: float) -> None:
    found = resources(device="cuda", parallel_sites=sites, gpus=gpus)
    assert found["client-resources-num-gpus"] == share
    assert found["init-args-num-gpus"] == gpus
    assert int(1 / share) * gpus >= sites, "all of them find a place at once"


class Waiting:
    """A process that ends when it is told so."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(["sleep", "60"])

    def __enter__(self) -> subprocess.Popen[bytes]:
        return self.process

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()


def test_who_follows_a_run_goes_on_when_another_one_is_turned_away(tmp_path: Path) -> None:
    log, shown = EventLog(tmp_path / "events.jsonl"), []
    log.write("failed", error="Another run is using the folder.", other_run=True)
    log.write("finished", results="model", sites_without_model=[])
    with Waiting() as process:
        last = _follow(log.path, 0, (process,), shown.append)
    assert last["event"] == "finished"
    assert shown[0] == "another run was turned away: Another run is using the folder."


def test_who_is_turned_away_says_why_once_its_own_processes_have_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_GRACE_S", 0.0)
    log = EventLog(tmp_path / "events.jsonl")
    log.write("failed", error="Another run is using the folder.", other_run=True)
    with Waiting() as process:
        process.kill()
        process.wait()
        last = _follow(log.path, 0, (process,), lambda line: None)
    assert last["error"] == "Another run is using the folder."


def test_a_site_that_was_ended_for_want_of_memory_is_told_apart_from_one_that_failed(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    assert list(launch.memory_reason(log)) == [], "Flower did not start"
    log.write_text("ERROR: something else\n")
    assert list(launch.memory_reason(log)) == []
    with log.open("a") as stream:  # as Ray 2.5x writes it
        stream.write(
            "ray.exceptions.OutOfMemoryError: 1 worker(s) were killed due to the node running low on memory. "
            "Memory on the node (IP: 127.0.0.1, ID: e59f) was 22.38GB / 23.54GB (0.950520), which exceeds the memory "
            "usage threshold of 0.950000; Object store memory usage: [- objects spillable: 0]\n"
        )
    (line,) = launch.memory_reason(log)
    assert "22.38GB of 23.54GB" in line
    assert "--parallel-sites" in line


@pytest.mark.parametrize(
    ("given", "seconds"), [([], 3 * 3600.0), (["--parallel-sites", "2"], 2 * 3600.0), (["--deadline-s", "5"], 5.0)]
)
def test_a_round_on_one_machine_waits_for_all_turns_of_its_sites(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], seconds: float
) -> None:
    for site in "ABC":
        (tmp_path / "sites" / site).mkdir(parents=True)
    started: list[FederateConfig] = []

    def federate(config: FederateConfig) -> Path:
        started.append(config)
        return tmp_path

    monkeypatch.setattr(launch, "federate", federate)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args(["--root", str(tmp_path), "-d", "1", *given])) == 0
    (config,) = started
    assert config.deadline_s == seconds
    assert config.device == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_start_is_found_from_where_the_command_is_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's processes work in other folders, and would look for it after the images were read."""
    (tmp_path / "MODEL" / "fold_all").mkdir(parents=True)
    (tmp_path / "MODEL" / "fold_all" / "checkpoint_final.pth").touch()
    (tmp_path / "ROOT" / "sites" / "A").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    config = FederateConfig(root="ROOT", dataset="1", start_from="MODEL")
    assert launch._checked(config).to_run_config()["start-from"] == str(tmp_path / "MODEL")
    parser = argparse.ArgumentParser()
    server_command.add_arguments(parser)
    given = ["run", "study", "-d", "1", "--start-from"]
    assert server_command._config(parser.parse_args([*given, "MODEL"])).start_from == str(tmp_path / "MODEL")
    for refused in (
        lambda: launch._checked(FederateConfig(root="ROOT", dataset="1", start_from="ROOT")),
        lambda: server_command._config(parser.parse_args([*given, "ROOT"])),
    ):
        with pytest.raises(CheckpointError, match=r"ROOT holds no checkpoint_final\.pth"):
            refused()
