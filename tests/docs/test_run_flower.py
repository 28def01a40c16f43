"""Flower's own commands as the page on deployment gives them: a terminal for each block, on loopback, with free ports."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nnunet_fedharm.federation.daemon import descendants, free_port, is_answering
from nnunet_fedharm.federation.events import EVENTS_FILE, read_events
from tests.docs.reading import Terminal, lines_with, run, shell, terminals

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(sys.platform != "linux", reason="looks for a process that stays by its command line"),
]

PAGE = "docs/how-to/deployment.md"
ENVIRONMENT, SUPERLINK, NODE_A, NODE_B, TRAIN, REPORT, LOCAL = (
    tuple(lines_with(PAGE, text))
    for text in (
        "FLWR_DISABLE",
        "flower-superlink",
        'site=\\"A\\"',
        'site=\\"B\\"',
        'flwr run $APP hospital --stream -c "server-root',
        "site-report",
        "flwr run $APP local",
    )
)
RUN = (*ENVIRONMENT, *SUPERLINK, *NODE_A, *NODE_B, *TRAIN, *REPORT, *LOCAL)
RESULTS = "nnUNet_results/Dataset001_Blobs/nnUNetTrainerFedHarm{}__nnUNetFedHarmPlans__2d"


@pytest.fixture
def consortium(folder: Path, monkeypatch: pytest.MonkeyPatch, make_raw_dataset: Callable[..., Path]) -> Path:
    """$HOME/consortium with two sites in it."""
    monkeypatch.setenv("HOME", str(folder))
    for index, site in enumerate("AB"):
        raw = folder / "consortium" / "sites" / site / "nnUNet_raw"
        make_raw_dataset(raw, n_labelled=5, site=f"{site}_", gain=1.0 + index, seed=index, shape=(12, 24, 24))
    return folder / "consortium"


def check_results(consortium: Path, harmonizer: str) -> None:
    for home in (consortium / "server", *(consortium / "sites").iterdir()):
        assert (home / RESULTS.format(harmonizer) / "fold_all" / "checkpoint_final.pth").is_file()


def wait_until_answering(superlink: Terminal, port: str) -> None:
    end = time.monotonic() + 120
    while not is_answering(port):
        assert superlink.process.poll() is None, superlink.text
        assert time.monotonic() < end, superlink.text
        time.sleep(0.2)


def test_a_training_and_a_site_report_by_flower_s_own_commands(consortium: Path) -> None:
    ports = {usual: str(free_port()) for usual in ("8000", "9101", "9102")}

    def here(*commands: str) -> str:
        """Lines of one terminal, which begins with the environment of the page."""
        text = "\n".join((*ENVIRONMENT, *commands))
        for usual, free in ports.items():
            text = text.replace(usual, free)
        return text

    server = consortium / "server"
    with terminals(consortium) as open_terminal:
        wait_until_answering(open_terminal("superlink", here(*SUPERLINK)), ports["8000"])
        for name, lines in (("A", NODE_A), ("B", NODE_B)):
            open_terminal(name, here(*lines))
        shell(here(*TRAIN))
        check_results(consortium, "Curve")
        events = read_events(server / "fedharm" / EVENTS_FILE)[0]
        trained = sorted((event["phase"], event["site"]) for event in events if event["event"] == "site_trained")
        assert trained == [(phase, site) for phase in ("harmonizer", "segmenter") for site in "AB"]
        assert "case0" not in (server / "fedharm" / EVENTS_FILE).read_text()

        shell(here(*TRAIN[:-1], TRAIN[-1][: TRAIN[-1].index("flwr run")], *REPORT))  # in the terminal of the run
    (report,) = (server / "fedharm" / "site-report").glob("*/report.json")
    sites = json.loads(report.read_text())["sites"]
    assert [(site["site"], site["n_patients"]) for site in sites] == [("A", 5), ("B", 5)]
    said = run(f"nnunet-fedharm sites report --findings {report} -o page")
    assert "too small" not in said
    assert (Path("page") / "report.html").is_file()
    assert len(Path("page", "differences.csv").read_text().splitlines()) > 1, "the sites are compared"
    for site in "AB":
        assert list((consortium / "sites" / site / "fedharm" / "site-report").glob("*/report.json"))


def local_superlink(consortium: Path) -> list[int]:
    """The SuperLink that Flower started and left, found as the page says."""
    listed = subprocess.run(["ps", "-ww", "-A", "-o", "pid=,command="], capture_output=True, text=True, check=True)
    log = consortium / "flower" / "local" / "local-superlink" / "superlink.log"
    return [
        int(line.split()[0]) for line in listed.stdout.splitlines() if "flower-superlink" in line and str(log) in line
    ]


def test_the_same_app_in_simulation(consortium: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """APP is that of the block before; the SuperLink stays, as the page says, and is ended here."""
    monkeypatch.setenv("FLWR_LOCAL_SUPERLINK_HTTP_API_PORT", str(free_port()))
    (app,) = [line for line in TRAIN[-1].splitlines() if line.startswith("APP=")]
    stays: list[int] = []
    try:
        shell("\n".join((*ENVIRONMENT, app, *LOCAL)))
        stays = local_superlink(consortium)
        check_results(consortium, "None")
        assert len(stays) == 1
    finally:
        for parent in stays or local_superlink(consortium):
            for pid in (parent, *descendants(parent)):
                subprocess.run(["kill", str(pid)], check=False, capture_output=True)
