"""How a daemon's owner is stopped, and what that must not do to the processes that it forks."""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from nnunet_fedharm.federation.daemon import flower_environment, terminate_as_interrupt


def test_sigterm_stops_the_owner_like_ctrl_c_and_the_former_handler_is_back_afterwards() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), terminate_as_interrupt():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_a_forked_worker_dies_of_sigterm_even_if_it_comes_before_the_worker_is_complete() -> None:
    context = multiprocessing.get_context("fork")
    with terminate_as_interrupt():
        for _ in range(5):
            worker = context.Process(target=time.sleep, args=(60,))
            worker.start()
            worker.terminate()  # at once: on a busy machine the child has not run a line yet
            worker.join(20)
            ended = worker.exitcode
            worker.kill()
            assert ended == -signal.SIGTERM


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_the_parent_is_still_interrupted_after_it_has_forked() -> None:
    context = multiprocessing.get_context("fork")
    with pytest.raises(KeyboardInterrupt), terminate_as_interrupt():
        _fork_and_raise(context.Process(target=time.sleep, args=(0,)))


def _fork_and_raise(child: BaseProcess) -> None:
    child.start()
    child.join(20)
    signal.raise_signal(signal.SIGTERM)


def test_rays_workers_are_told_to_be_no_less_urgent(tmp_path: Path) -> None:
    assert flower_environment(tmp_path, device="cpu", parallel_sites=1)["RAY_worker_niceness"] == "0"


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="no niceness")
def test_simulated_sites_are_as_urgent_as_whoever_started_them(tmp_path: Path) -> None:
    """Ray's own choice lets a simulation next to other work all but stand still."""
    asks = "import os, ray; ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)\n"
    asks += "print(ray.get(ray.remote(lambda: os.nice(0)).remote()), os.nice(0))"
    done = subprocess.run(
        [sys.executable, "-c", asks],
        env=flower_environment(tmp_path, device="cpu", parallel_sites=1),
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    site, starter = done.stdout.split()
    assert site == starter
