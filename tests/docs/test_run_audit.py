"""The audits of private training and of statistics, at a hospital whose data are planned and in one place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nnunet_fedharm.privacy.ledger import LEDGER_FILE
from tests.docs.reading import follow, lines_with, run

pytestmark = pytest.mark.long

PAGE = "docs/how-to/audit.md"
STATISTICS, CANARIES, INVERSION = (
    tuple(lines_with(PAGE, f"audit {text}")) for text in ("statistics", "canaries", "inversion")
)
RUN = (*STATISTICS, *CANARIES, *INVERSION)
PLAN = "nnunet-fedharm plan -d 910 -c {} --harmonizer polarity --reference A{}"


@pytest.fixture(scope="module")
def planned(data: Path, desk: Path) -> Path:
    """The nnU-Net root of hospital A, planned for private training, and the same data in one place; ROOT/sites/A is /data/A."""
    run("nnunet-fedharm sites split -d 910 -o ROOT")
    home = desk / "ROOT" / "sites" / "A"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            patch.setenv(name, str(home / name))
        plan(" --epsilon 8 --delta 1e-5 --patients-per-step 2")
    plan("")
    return home


def plan(more: str) -> None:
    run(PLAN.format("2d 3d_fullres", more))


@pytest.fixture(scope="module")
def ledger(planned: Path) -> bytes:
    return entries(planned)


def entries(home: Path) -> bytes:
    file = home / "fedharm" / LEDGER_FILE
    return file.read_bytes() if file.exists() else b""


def at_hospital(command: str) -> str:
    return run(command.replace("/data/A", "ROOT/sites/A"))


def report(desk: Path, name: str) -> dict[str, object]:
    folder = desk / "audit" / name
    assert "<script" not in (folder / "report.html").read_text()
    return dict(json.loads((folder / "report.json").read_text()))


@pytest.mark.parametrize(
    ("commands", "names", "sentence"),
    [
        (STATISTICS, ["statistics"], "epsilon"),
        (CANARIES, ["canaries", "canaries-harmonizer"], "epsilon"),
        (INVERSION, ["inversion"], "one step"),
    ],
    ids=["statistics", "canaries", "inversion"],
)
def test_an_audit_writes_a_report_and_nothing_into_the_ledger(
    planned: Path, ledger: bytes, desk: Path, commands: tuple[str, ...], names: list[str], sentence: str
) -> None:
    said = follow(commands, instead={"nnunet-fedharm audit": at_hospital})
    assert said.count(sentence) >= len(commands)
    for name in names:
        assert report(desk, name)
    assert entries(planned) == ledger, "nothing leaves the site"
