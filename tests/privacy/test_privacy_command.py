"""The command `privacy`: what it prints is what accountants and ledger say."""

from __future__ import annotations

from pathlib import Path

import pytest

from nnunet_fedharm.cli import main
from nnunet_fedharm.privacy.accounting import Noise, epsilon_of
from nnunet_fedharm.privacy.ledger import Ledger
from nnunet_fedharm.privacy.releases import ANNOUNCED, GAUSSIAN, NONE, SUBSAMPLED, Release


def enter(root: Path, *, unbounded: bool) -> None:
    ledger = Ledger(root / "fedharm")
    ledger.record(Release(what="style bank", mechanism=GAUSSIAN, noise_multiplier=8.0))
    for number in (1, 2):
        ledger.record(
            Release(
                what=f"segmenter round {number}", mechanism=SUBSAMPLED, noise_multiplier=1.5, sample_rate=0.1, steps=10
            )
        )
    if unbounded:
        ledger.record(Release(what="validation Dice", mechanism=NONE))


def test_plan_prints_noise_that_keeps_the_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["privacy", "plan", "--epsilon", "3", "--delta", "1e-5", "--sample-rate", "0.1", "--steps", "100"]) == 0
    shown = capsys.readouterr().out
    noise = float(shown.split()[2])
    assert epsilon_of([Noise(noise * 1.001, 0.1, 100)], 1e-5) <= 3
    assert "factor of 20.1" in shown


def test_plan_counts_what_the_site_has_spent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    enter(tmp_path, unbounded=True)
    words = ["privacy", "plan", "--epsilon", "2", "--delta", "1e-5", "--steps", "5", "--site-root"]
    assert main([*words, str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    noise = float(shown.split("noise multiplier ")[1].split()[0])
    assert epsilon_of([Noise(8.0), Noise(1.5, 0.1, 20), Noise(noise * 1.001, steps=5)], 1e-5) <= 2
    assert "not counted, because released without noise: validation Dice" in shown
    assert main([*words[:3], "0.2", *words[4:], str(tmp_path)]) == 2
    assert "spent already; nothing is left of 0.2" in capsys.readouterr().err


def test_show_adds_rounds_up_and_says_what_epsilon_means(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    enter(tmp_path / "sites" / "A", unbounded=False)
    enter(tmp_path / "sites" / "B", unbounded=True)
    (tmp_path / "sites" / "C").mkdir()
    assert main(["privacy", "show", "--root", str(tmp_path)]) == 0
    first, second, third = capsys.readouterr().out.split("\n\n")
    epsilon = epsilon_of([Noise(8.0), Noise(1.5, 0.1, 20)], 1e-5)
    assert "20  segmenter round\n" in first
    assert f"Total: epsilon {epsilon:.3g} at delta 1e-05." in first
    assert "with or without one patient's data" in first
    assert "Total: unbounded. Without noise left this site: validation Dice." in second
    assert "Nothing has been entered yet." in third


def test_what_is_public_by_agreement_is_said_and_costs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    enter(tmp_path, unbounded=False)
    Ledger(tmp_path / "fedharm").record(Release(what="facts: numbers of cases", mechanism=ANNOUNCED))
    assert main(["privacy", "show", "--site-root", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "Public by agreement, not hidden by any noise: facts: numbers of cases." in shown
    epsilon = epsilon_of([Noise(8.0), Noise(1.5, 0.1, 20)], 1e-5)
    assert f"Total: epsilon {epsilon:.3g} at delta 1e-05." in shown


def test_show_lists_every_entry_on_demand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    enter(tmp_path, unbounded=False)
    assert main(["privacy", "show", "--site-root", str(tmp_path), "--all"]) == 0
    shown = capsys.readouterr().out
    assert "segmenter round 1" in shown
    assert "segmenter round 2" in shown


def test_a_folder_without_sites_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["privacy", "show", "--root", str(tmp_path)]) == 2
    assert "holds no site" in capsys.readouterr().err


def test_a_mistyped_site_is_no_site_that_has_spent_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "privacy",
        "plan",
        "--epsilon",
        "8",
        "--delta",
        "1e-5",
        "--sample-rate",
        "0.1",
        "--steps",
        "10",
        "--site-root",
    ]
    assert main([*words, str(tmp_path / "nowhere")]) == 2
    assert "what its site has spent is not known" in capsys.readouterr().err
    assert main([*words, str(tmp_path)]) == 0
    assert f"spent before: nothing in {tmp_path}" in capsys.readouterr().out
