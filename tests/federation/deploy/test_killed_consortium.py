"""The deployed server, and all of the consortium, under SIGKILL, as in a power cut, over TLS and in the middle of a run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nnunet_fedharm.federation.events import EVENTS_FILE, read_events
from tests.federation.deploy.real import TINY, RealConsortium
from tests.federation.test_flower import check_results

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(sys.platform != "linux", reason="children end with their parent by a call of Linux"),
]

SITES = ("north", "south")
RESULTS = "nnUNet_results/Dataset001_Blobs/nnUNetTrainerFedHarmNone__nnUNetFedHarmPlans__2d"


@pytest.fixture
def real(tmp_path: Path, make_raw_dataset: Callable[..., Path]) -> Iterator[RealConsortium]:
    for index, site in enumerate(SITES):
        make_raw_dataset(tmp_path / site / "nnUNet_raw", n_labelled=2, site=site, seed=index, shape=(12, 24, 24))
    made = RealConsortium(tmp_path, SITES, recorded=False)
    try:
        for site in SITES:
            made.admit(site, processes=None if site == SITES[0] else 1)
        made.open(SITES)
        yield made
    finally:
        made.close()


def words(real: RealConsortium) -> tuple[str, ...]:
    return ("server", "run", str(real.server.path), "-d", "1", *TINY, "--segmenter-rounds", "3")


def kill(real: RealConsortium, name: str) -> None:
    """The command alone is killed: what it has started has to end by itself."""
    process = real.processes.pop(name)
    process.kill()
    process.wait()


def events(real: RealConsortium, name: str) -> list[dict[str, Any]]:
    return [event for event in read_events(real.server.results / "fedharm" / EVENTS_FILE)[0] if event["event"] == name]


def test_a_run_goes_on_after_the_server_was_killed(real: RealConsortium) -> None:
    real.start("run", *words(real))
    real.wait_for("run", "segmenter round 1/3 done", seconds=600)
    kill(real, "server")
    assert real.processes.pop("run").wait(300) != 0, "who watched it is told"
    real.start("server", "server", "start", str(real.server.path))
    real.wait_for_count(real.root / "server.out", "sites may connect", 2, seconds=180)

    status, text = real.command(*words(real), seconds=900)
    assert status == 0, text
    started = events(real, "started")[-1]
    assert started["resumed"]
    assert started["rounds_done"]["segmenter"] >= 1
    rounds = [event["round"] for event in events(real, "round_end")]
    assert rounds == [1, 2, 3], "none is lost, none is trained twice"
    for home in (real.server.results, *(real.root / site for site in SITES)):
        check_results(home / RESULTS)


def test_a_kept_run_goes_on_after_a_power_cut_and_nobody_types_a_word(real: RealConsortium) -> None:
    status, text = real.command(*words(real), "--keep", "--detach", seconds=200)
    assert status == 0, text
    wait_for(real, "round_end")
    real.cut_the_power()
    real.boot(SITES)
    wait_for(real, "finished")
    assert events(real, "started")[-1]["resumed"]
    assert [event["round"] for event in events(real, "round_end")] == [1, 2, 3], "none is lost, none is trained twice"
    real.wait_for("server", "The kept run has ended", seconds=60)
    real.wait_for("server", "The model card", seconds=60)
    assert not real.server.kept_run.exists()
    for home in (real.server.results, *(real.root / site for site in SITES)):
        check_results(home / RESULTS)


def wait_for(real: RealConsortium, name: str, *, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not events(real, name):
        assert time.monotonic() < end, (name, real.output("server"))
        time.sleep(0.2)
