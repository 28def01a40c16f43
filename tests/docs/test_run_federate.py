"""One simulated federation as the README starts it, and what pages do with a federation and with its model."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

import pytest

from nnunet_fedharm.federation.daemon import free_port
from tests.conftest import BENCHMARK
from tests.docs.conftest import lay_out_some
from tests.docs.reading import Terminal, follow, images, lines_with, run, same, shell, terminals

pytestmark = pytest.mark.long

RESULTS = f"nnUNet_results/{BENCHMARK}/nnUNetTrainerFedHarmPolarity__nnUNetFedHarmPlans__3d_fullres"
TRAINING = (
    "nnunet-fedharm sites split -d 910 -o ROOT",
    "nnunet-fedharm federate --root ROOT -d 910 -c 3d_fullres --harmonizer polarity --reference A --harmonizer-rounds 20"
    " --segmenter-rounds 50",
)
WATCH = "docs/how-to/watch.md"
LOOK = (*lines_with(WATCH, "--watch"), *lines_with(WATCH, "mail -s"))
STAY = (
    "nnunet-fedharm watch --root ROOT",
    "nnunet-fedharm status --root ROOT --tensorboard BOARD",
    "tensorboard --logdir BOARD",
)
REPORT = lines_with("docs/how-to/site-report.md", "--findings")
SHARE = "docs/how-to/share-a-model.md"
EXPORT, INSTALL = lines_with(SHARE, "export -m"), lines_with(SHARE, "install_pretrained")
NEW_SITE = (
    'nnunet-fedharm adapt -m MODEL -i IMAGES -o NEW_MODEL --site E --scanner "1.5 T, T2"',
    "nnUNetv2_predict_from_modelfolder -i IMAGES -o PREDICTIONS -m NEW_MODEL -f all -device cpu",
    "nnunet-fedharm predict -m MODEL -i IMAGES -o PREDICTIONS --style volume",
)
AUDIT = tuple(line for line in lines_with("docs/how-to/audit.md", "audit membership") if "--non-members" in line)
LEARNED = tuple(lines_with("docs/how-to/federate.md", "diffusion"))
RUN = (*TRAINING, *LOOK, *STAY, *REPORT, *EXPORT, *INSTALL, *NEW_SITE, *AUDIT, *LEARNED)


@pytest.fixture(scope="module")
def root(data: Path, desk: Path) -> Path:
    """The consortium after its federation, and what pages call by other names."""
    said = follow(TRAINING)
    assert "segmenter round 1/1 done: loss" in said
    lay_out_some(data, desk)
    (desk / "MODEL").symlink_to(desk / "ROOT" / "sites" / "B" / RESULTS)
    (desk / "DIR").symlink_to(desk / "ROOT" / "server")
    return desk / "ROOT"


def test_server_and_sites_hold_the_results_folder(root: Path) -> None:
    for home in (root / "server", *(root / "sites").iterdir()):
        assert (home / RESULTS / "fold_all" / "checkpoint_final.pth").is_file()
        assert {path.name for path in home.iterdir()} >= {
            "nnUNet_raw",
            "nnUNet_preprocessed",
            "nnUNet_results",
            "fedharm",
        }
    assert not list((root / "server").rglob("*.nii.gz")), "the server's has no images"
    plans = root / "server" / "nnUNet_preprocessed" / BENCHMARK / "nnUNetFedHarmPlans_explained.md"
    assert plans.is_file()
    assert (root / "server" / RESULTS / "MODEL_CARD.md").is_file()
    assert "A_00" not in (root / "server" / "fedharm" / "events.jsonl").read_text(), (
        "names sites and rounds, never cases"
    )


def test_it_is_watched_in_the_terminal_and_a_monitor_writes_a_letter(root: Path, desk: Path) -> None:
    """`mail` is a program of the test that keeps what it gets."""
    (desk / "bin").mkdir()
    mail = desk / "bin" / "mail"
    mail.write_text(f'#!/bin/sh\necho "$@" >> {desk}/letters\ncat >> {desk}/letters\n')
    mail.chmod(0o755)
    said = follow(LOOK, instead={"if ": lambda text: shell(f'PATH="{desk}/bin:$PATH"\n{text}')})
    assert said.count("rounds, newest first") >= 3
    assert not (desk / "letters").exists()
    events = root / "server" / "fedharm" / "events.jsonl"
    whole = events.read_text()
    try:
        lines = whole.splitlines(keepends=True)
        events.write_text("".join(line for line in lines if json.loads(line)["event"] != "finished"))
        shell(f'PATH="{desk}/bin:$PATH"\n{LOOK[-1]}')
    finally:
        events.write_text(whole)
    letter = (desk / "letters").read_text()
    assert letter.startswith("-s federation me@hospital.example\n")
    assert "stopped" in letter


def page(address: str, terminal: Terminal) -> str:
    terminal.wait_for("http")
    with build_opener(ProxyHandler({})).open(address, timeout=30) as answer:
        return str(answer.read().decode())


def test_it_is_watched_in_a_browser_and_in_tensorboard(root: Path, desk: Path) -> None:
    """With ports that are free in the place of the default ones."""
    watch, export, board = STAY
    with terminals(desk) as open_terminal:
        port = free_port()
        shown = page(f"http://127.0.0.1:{port}/", open_terminal("watch", f"exec {watch} --port {port}"))
        assert "worst site" in shown
        assert "<script" not in shown
        run(export)
        assert list((desk / "BOARD").rglob("events.out.tfevents*"))
        port = free_port()
        tags = f"http://127.0.0.1:{port}/data/plugin/scalars/tags"
        shown = page(tags, open_terminal("board", f"exec {board} --port {port} --load_fast=false"))
    assert {"segmenter/dice/site A", "segmenter/dice/worst site", "segmenter/dice/mean"} <= {
        tag for one in json.loads(shown).values() for tag in one
    }


def test_its_sites_are_compared_from_sums_alone(root: Path, desk: Path) -> None:
    said = follow(REPORT[:1])
    assert "report" in said
    server = list((root / "server" / "fedharm" / "site-report").glob("*/report.json"))
    assert len(server) == 1
    assert "A_00" not in server[0].read_text()
    for site in "ABCD":
        assert list((root / "sites" / site / "fedharm" / "site-report").glob("*/report.json"))
    shutil.copy(server[0], desk / "report.json")
    follow(REPORT[1:])
    assert "<img" not in (desk / "page" / "report.html").read_text(), "such a page has no pictures"


def test_its_model_is_shared_and_predicts_the_same_elsewhere(
    root: Path, desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(root / "server" / RESULTS, desk / RESULTS)
    own = f"nnUNetv2_predict_from_modelfolder -i IMAGES -o PREDICTIONS -m {RESULTS} -f all"
    run(own)
    run("nnunet-fedharm evaluate -p PREDICTIONS -g LABELS --sites sites.json -o metrics.json")
    said = follow(EXPORT)
    assert INSTALL[1].removesuffix("-i IMAGES -o OUTPUT").strip() in " ".join(said.split())
    with zipfile.ZipFile("model.zip") as packed:
        names = {Path(name).name for name in packed.namelist()}
        card = next(name for name in packed.namelist() if name.endswith("model_card.json"))
        assert "CC-BY-4.0" in packed.read(card).decode()
    assert {"MODEL_CARD.md", "plans.json", "dataset.json", "checkpoint_final.pth"} <= names
    assert not names & {"dataset_fingerprint.json", "debug.json", "progress.png", "summary.json"}
    (desk / "elsewhere").mkdir()
    monkeypatch.setenv("nnUNet_results", str(desk / "elsewhere"))
    follow(INSTALL)
    assert same(images(desk / "PREDICTIONS"), images(desk / "OUTPUT"))


def test_a_new_hospital_adapts_the_model_and_predicts(root: Path, desk: Path) -> None:
    model = desk / "MODEL"
    before = sorted(path.stat().st_mtime_ns for path in model.rglob("*"))
    said = follow(NEW_SITE)
    assert "distance to the reference (sd)" in said
    assert NEW_SITE[1] in said, "its last line is the second command for this model"
    assert before == sorted(path.stat().st_mtime_ns for path in model.rglob("*")), "the model itself is not touched"
    assert "A_000" not in (desk / "NEW_MODEL" / "adaptation.json").read_text()
    assert (desk / "NEW_MODEL" / "adaptation.html").is_file()
    assert {*images(desk / "PREDICTIONS")} == {"A_000.nii.gz", "B_100.nii.gz"}


def test_an_audit_asks_whether_a_site_s_cases_were_in_the_training(root: Path, desk: Path) -> None:
    """Members and held-out cases of all sites lie in one folder for it."""
    for name in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (desk / "DATASET" / name).mkdir(parents=True)
        for path in (root / "sites").glob(f"*/nnUNet_raw/{BENCHMARK}/{name}/*"):
            shutil.copy(path, desk / "DATASET" / name)
    assert "AUC" in follow(AUDIT)
    assert {"report.html", "report.json"} <= {path.name for path in (desk / "audit" / "membership").iterdir()}


def test_learned_harmonizers_are_federated(root: Path) -> None:
    """The options of the page; the second one is the next run in the same folders."""
    follow(LEARNED)
    for home in (root / "server", root / "sites" / "D"):
        folder = home / RESULTS.replace("Polarity", "Diffusion")
        assert (folder / "fold_all" / "checkpoint_final.pth").is_file()
        plans = json.loads((folder / "plans.json").read_text())["configurations"]["3d_fullres"]["fedharm"]
        assert plans["harmonizer"]["width"] == 16
