"""What a client knows about its site, and what of its errors leaves it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nnunet_fedharm.errors import DataError, FederationError, SetupError
from nnunet_fedharm.federation.daemon import descendants, refuse_stale_daemon, stop_process
from nnunet_fedharm.federation.progress import describe, human_bytes
from nnunet_fedharm.federation.site import SITE_LOG, Site, case_identifiers, describe_error, locate_site, redact
from nnunet_fedharm.nnunet_root import NnunetRoot


@pytest.fixture
def consortium(tmp_path: Path, make_consortium: Callable[..., Path]) -> Path:
    return make_consortium(tmp_path, {"A": (2, 0), "B": (0, 2)})


def test_a_supernode_knows_its_site_by_its_node_config(consortium: Path) -> None:
    folder = consortium / "sites" / "B"
    site = locate_site(
        {"site": "h1", "site-root": str(folder), "device": "cuda"}, {"device": "cpu", "num-processes": 3}
    )
    assert (site.name, site.root.path, site.device, site.num_processes) == ("h1", folder, "cuda", 3)


def test_a_simulated_node_is_the_site_of_its_partition(consortium: Path) -> None:
    run_config = {"root": str(consortium)}
    assert locate_site({"partition-id": 1}, run_config).name == "B"
    assert locate_site({"partition-id": 0}, {**run_config, "sites": "B"}).name == "B"
    with pytest.raises(FederationError, match="node 2 has no site: there are 2"):
        locate_site({"partition-id": 2}, run_config)


@pytest.mark.parametrize("node_config", [{}, {"site": "A"}, {"partition-id": 0}])
def test_a_node_without_a_site_says_how_to_start_it(node_config: dict[str, Any]) -> None:
    with pytest.raises(FederationError, match="--node-config"):
        locate_site(node_config, {})


def test_a_missing_site_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FederationError, match=r"Site A: the folder .* does not exist"):
        locate_site({"site": "A", "site-root": str(tmp_path / "no")}, {})


def test_a_dataset_is_found_by_number_or_name(consortium: Path) -> None:
    site = locate_site({"partition-id": 0}, {"root": str(consortium)})
    assert site.raw_dataset("1").name == "Dataset001_Blobs"
    assert site.raw_dataset("Dataset001_Blobs").name == "Dataset001_Blobs"
    with pytest.raises(DataError, match=r"Site A has no dataset Dataset007_\*"):
        site.raw_dataset("7")


def test_case_identifiers_and_paths_stay_at_the_site(consortium: Path) -> None:
    site = locate_site({"partition-id": 0}, {"root": str(consortium)})
    identifiers = case_identifiers(site.root.raw)
    assert "Acase000" in identifiers
    error = DataError(
        f"Site A, case Acase001: {site.root.raw}/Dataset001_Blobs/imagesTr/Acase001_0000.nii.gz holds NaN."
    )
    kind, text = describe_error(site, error)
    assert kind == "DataError"
    assert text == "Site A, case <case>: <path> holds NaN."
    assert "Acase001_0000.nii.gz holds NaN" in (site.folder / "site.log").read_text()


def test_an_unforeseen_error_leaves_only_its_kind(consortium: Path) -> None:
    site = locate_site({"partition-id": 0}, {"root": str(consortium)})
    kind, text = describe_error(site, KeyError("patient Smith"))
    assert kind == "KeyError"
    assert "Smith" not in text
    assert "Smith" in (site.folder / "site.log").read_text()


def test_redacting_keeps_words_that_only_contain_an_identifier() -> None:
    assert redact("the case and cases of 1case", ["case"]) == "the <case> and cases of 1case"
    assert redact("ratio 3/4, see <path>", []) == "ratio 3/4, see <path>"


def test_a_running_daemon_of_an_earlier_run_is_refused_with_the_line_that_stops_it(tmp_path: Path) -> None:
    pretend = tmp_path / "flower-superlink"
    pretend.write_text("import time; time.sleep(60)")
    process = subprocess.Popen([sys.executable, str(pretend)])
    try:
        (tmp_path / "daemon.json").write_text(f'{{"pid": {process.pid}, "port": 1}}')
        with pytest.raises(SetupError, match=f"kill {process.pid}"):
            refuse_stale_daemon(tmp_path)
    finally:
        stop_process(process)
    refuse_stale_daemon(tmp_path)
    assert not (tmp_path / "daemon.json").exists()


def test_stopping_a_process_stops_its_grandchildren_in_other_sessions() -> None:
    inner = "import time; time.sleep(60)"
    outer = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {inner!r}], start_new_session=True)\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    family = descendants(process.pid)
    assert len(family) == 1
    stop_process(process)
    process.stdout.close()
    assert not set(family) & set(descendants(1))


def test_every_event_has_a_line() -> None:
    event = {
        "event": "site_trained",
        "site": "A",
        "phase": "segmenter",
        "round": 1,
        "seconds": 2.0,
        "bytes_down": 2048,
        "bytes_up": 100,
        "metrics": {"train_loss": 0.5, "dice": 0.25},
    }
    assert describe(event) == "  A: loss 0.500  Dice 0.250  2.0 s  down 2.0 KiB, up 100 B"
    assert describe({"event": "unknown"}) is None
    assert human_bytes(3 * 2**30) == "3.00 GiB"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_keeps_no_error_from_the_server(tmp_path: Path) -> None:
    site = Site(name="B", root=NnunetRoot(tmp_path), device="cpu", num_processes=1)
    site.folder.mkdir(parents=True)
    (site.folder / SITE_LOG).symlink_to("/dev/full")
    assert describe_error(site, DataError("Site B: the disk is full.")) == ("DataError", "Site B: the disk is full.")
