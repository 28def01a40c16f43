"""Two hospitals over the internet: the page from top to bottom, on loopback."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nnunet_fedharm.federation.daemon import free_port
from nnunet_fedharm.federation.deploy.site_folder import SiteFolder
from tests.conftest import BENCHMARK
from tests.docs.reading import at_hand, finish, follow, lines_with, program, run, shell, terminals, toml_blocks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="children end with their parent by a call of Linux")

PAGE = "docs/how-to/two-hospitals.md"
INIT, JOIN, POLICY, ENTER, SITE, TRAIN, KEPT, PREDICT, SHOW = (
    tuple(lines_with(PAGE, text))
    for text in (
        "server init",
        "site join",
        "site policy",
        "server register",
        "site check",
        "server sites",
        "--keep",
        "nnUNetv2_predict",
        "privacy show",
    )
)
RUN = (*INIT, *JOIN, *POLICY, *ENTER, *SITE, *TRAIN, *KEPT, *PREDICT, *SHOW)
RESULTS = f"nnUNet_results/{BENCHMARK}/nnUNetTrainerFedHarmCurve__nnUNetFedHarmPlans__3d_fullres/fold_all"


def before_the_start(folder: Path, make_raw_dataset: Callable[..., Path]) -> None:
    """Steps 1 to 4 but for the start of the server: the consortium, two hospitals with the policy of the page, let in."""
    for index, site in enumerate(("north", "south")):
        raw = folder / site / "nnUNet_raw"
        made = make_raw_dataset(
            raw, name=BENCHMARK, n_labelled=20, site=f"{site}_", gain=1.0 + index, seed=index, shape=(16, 16, 16)
        )
        shutil.copy(made / "imagesTr" / f"{site}_case000_0000.nii.gz", folder)
    said = run(f"{INIT[0].replace('fed.example.org', '127.0.0.1')} --port {free_port()} --bind 127.0.0.1")
    shutil.copy(folder / "study" / "consortium.toml", folder)
    fingerprint = re.search(r"(?:[0-9a-f]{4}-){3,}[0-9a-f]{4}", said)
    assert fingerprint
    policy = toml_blocks(PAGE)[0]
    for site in ("north", "south"):
        said = follow(line.replace("north", site) for line in JOIN)
        assert fingerprint.group() in said, "the same one as the coordinator's"
        key = folder / site / "fedharm" / "consortium" / "node.pub"
        assert key.read_text().split()[1] in said, "the line that is sent"
        shutil.copy(key, f"{site}.pub")
        (folder / site / "fedharm" / "policy.toml").write_text(policy)
        said = follow(line.replace("north", site) for line in POLICY)
        assert "none, curve" in said
    follow(ENTER[:2])


def test_they_meet(folder: Path, make_raw_dataset: Callable[..., Path]) -> None:
    """Up to the start; what the page writes into the site's settings is read by those who read them."""
    before_the_start(folder, make_raw_dataset)
    settings = folder / "north" / "fedharm" / "consortium" / "site.toml"
    text, once = re.subn(r"^proxy = .*$", toml_blocks(PAGE)[1], settings.read_text(), flags=re.M)
    assert once == 1
    settings.write_text(text)
    assert SiteFolder(folder / "north").settings()["proxy"] == "http://proxy.north.example:3128"


@pytest.mark.long
def test_they_train_from_top_to_bottom(folder: Path, make_raw_dataset: Callable[..., Path]) -> None:
    """The run of the page is stopped when it has plans; with `--keep` it goes on, and is let go at its end."""
    before_the_start(folder, make_raw_dataset)
    with terminals(folder) as open_terminal:
        server = open_terminal("server", f"exec {ENTER[2]}")
        server.wait_for("sites may connect")
        for site in ("north", "south"):
            check, start = (line.replace("north", site) for line in SITE)
            assert "The site is ready, and the consortium's server answers." in run(check)
            open_terminal(site, f"exec {start}")
        wait_until_connected()
        first = open_terminal("run", f"exec {at_hand(TRAIN[1])}")
        first.wait_for("planned")
        run("nnunet-fedharm server stop study")
        assert first.process.wait(120) != 0, "who watched it is told"
        said = finish([program("bash"), "-c", at_hand(KEPT[0])])
        assert "segmenter round 1/1 done" in said
        server.wait_for("The kept run has ended")
        assert not (folder / "study" / "kept-run.json").exists()
        for home in ("north", "south", "study/server"):
            assert (folder / home / RESULTS / "checkpoint_final.pth").is_file()
        (folder / "new_patients").mkdir()
        for path in folder.glob("*_case000_0000.nii.gz"):
            shutil.copy(path, folder / "new_patients")
        shell("\n".join(PREDICT))
        assert len(list((folder / "segmented").glob("*.nii.gz"))) == 2
        said = follow(SHOW)
        assert "weights and metrics, segmenter round" in said
    events = (folder / "study" / "server" / "fedharm" / "events.jsonl").read_text()
    assert "case0" not in events
    told = [json.loads(line) for line in events.splitlines()]
    assert [event["resumed"] for event in told if event["event"] == "started"] == [False, True]
    assert len([event for event in told if event["event"] == "planned"]) == 1, "what was done is not done again"
    assert told[-1]["event"] == "finished"


def wait_until_connected() -> None:
    """Ask for the sites until both are there."""
    end = time.monotonic() + 300
    while (said := run(TRAIN[0])).count("online") < 2:
        assert time.monotonic() < end, said
        time.sleep(0.5)
