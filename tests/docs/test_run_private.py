"""Private trainings and secure sums: the federations of their pages, each in a consortium of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from nnunet_fedharm.federation.events import EVENTS_FILE, read_events
from nnunet_fedharm.privacy.options import PRIVACY_FILE
from tests.conftest import BENCHMARK
from tests.docs.reading import follow, lines_with, run

pytestmark = pytest.mark.long

PRIVACY, SECURE = "docs/how-to/privacy.md", "docs/how-to/secure-aggregation.md"
SPLIT = "nnunet-fedharm sites split -d 910 -o ROOT"
SPENT = tuple(lines_with(PRIVACY, "privacy show"))
*CENTRAL, ACROSS = lines_with(PRIVACY, "nnUNetv2_train 910")
(PUBLIC,) = lines_with(PRIVACY, "--start-from PUBLIC_MODEL")
(SUMS,), (SHARED,), (SITES,) = (
    lines_with(SECURE, text) for text in ("--secure-aggregation segmenter", "--patient-noise", "--site-dp")
)
RUN = (*SPENT, *CENTRAL, ACROSS, PUBLIC, SUMS, SHARED, SITES)
RESULTS = f"nnUNet_results/{BENCHMARK}/nnUNetTrainerFedHarm{{}}__nnUNetFedHarmPlans__{{}}"


@pytest.fixture(autouse=True)
def consortium(data: Path, desk: Path) -> Path:
    """Another consortium of the same hospitals: a ledger lasts as long as its folder."""
    shutil.rmtree("ROOT", ignore_errors=True)
    run(SPLIT)
    return desk / "ROOT"


@pytest.fixture(scope="module")
def model(data: Path, desk: Path) -> Path:
    """What the page on privacy trains in one place, which later commands call PUBLIC_MODEL and MODEL."""
    follow(CENTRAL)
    made = desk / RESULTS.format("Polarity", "3d_fullres")
    for name in ("PUBLIC_MODEL", "MODEL"):
        (desk / name).symlink_to(made)
    return made


def privacy_of(home: Path, *, harmonizer: str = "Polarity", configuration: str = "3d_fullres") -> dict[str, Any]:
    """What stands beside the checkpoints of the server or of a site."""
    fold = home / RESULTS.format(harmonizer, configuration) / "fold_all"
    assert (fold / "checkpoint_final.pth").is_file()
    return dict(json.loads((fold / PRIVACY_FILE).read_text()))


def of_patients(home: Path, **named: str) -> dict[str, Any]:
    """The same, of patients alone."""
    return dict(privacy_of(home, **named)["patient_level"])


def events(consortium: Path, name: str) -> list[dict[str, Any]]:
    written = read_events(consortium / "server" / "fedharm" / EVENTS_FILE)[0]
    return [event for event in written if event["event"] == name]


def test_a_private_training_in_one_place(model: Path, desk: Path) -> None:
    said = privacy_of(desk)
    assert said["unit"] == "patient"
    assert said["delta"] == 1e-5
    assert 0 < said["epsilon"] <= 8
    assert said["without_noise"] == ["fingerprint in the plans"], "plan takes nnU-Net's own, and says so"


def test_a_private_training_across_sites_and_what_it_has_spent(consortium: Path) -> None:
    """ROOT/sites/A is /data/A."""
    follow([ACROSS])
    promised = of_patients(consortium / "server")
    assert (promised["epsilon"], promised["delta"]) == (8, 1e-5)
    assert all(event["metrics"].keys() == {"epsilon"} for event in events(consortium, "site_trained"))
    one, every = (run(line.replace("/data/A", "ROOT/sites/A")) for line in SPENT)
    assert one in every
    for site in "ABCD":
        spent = of_patients(consortium / "sites" / site)
        assert 0 < spent["epsilon"] <= 8
        assert spent["without_noise"] == []
        assert every.count(f"Total: epsilon {spent['epsilon']:.3g} at delta 1e-05") >= 1
    assert every.count("Total: epsilon") == 4


def test_a_start_from_a_public_model(model: Path, consortium: Path) -> None:
    follow([PUBLIC])
    for site in "ABCD":
        spent = of_patients(consortium / "sites" / site)
        assert 0 < spent["epsilon"] <= 8
        assert spent["delta"] == 1e-3
    card = (consortium / "server" / RESULTS.format("Polarity", "3d_fullres") / "MODEL_CARD.md").read_text()
    assert f"{BENCHMARK}/nnUNetTrainerFedHarmPolarity" in card, "the model that it started from"


def test_the_server_gets_sums_of_updates_alone(consortium: Path) -> None:
    follow([SUMS])
    (made,) = events(consortium, "secure_sum")
    assert made["sites"] == ["A", "B", "C", "D"]
    replies = events(consortium, "site_trained")
    assert [event["metrics"] for event in replies] == [{}] * 4
    assert sum(event["bytes_up"] for event in replies) < 100 < made["bytes_up"], "each update is kept at its site"
    assert events(consortium, "round_end")[0]["dice"] >= 0, "of all sites together"
    said = run("nnunet-fedharm privacy show --root ROOT")
    assert said.count("weights and metrics, segmenter round (inside a secure sum of at most 4 sites)") == 4


def test_one_noise_of_all_sites_hides_patients(model: Path, consortium: Path) -> None:
    follow([SHARED])
    for site in "ABCD":
        spent = of_patients(consortium / "sites" / site, harmonizer="None")
        assert 0 < spent["epsilon"] <= 8
        assert spent["epsilon"] < spent["epsilon_alone"], "if all others side with the server"
        assert f"epsilon {spent['epsilon_alone']:.3g}" in run(
            f"nnunet-fedharm privacy show --site-root ROOT/sites/{site} --delta 1e-4"
        )


def test_whole_sites_are_hidden(consortium: Path) -> None:
    """With the quorum of these four sites."""
    follow([SITES])
    said = privacy_of(consortium / "server", harmonizer="None", configuration="2d")["site_level"]
    assert (said["unit"], said["mode"], said["least_sites"]) == ("site", "distributed", 4)
    assert 0 < said["epsilon"] < 2
    assert [event["sites"] for event in events(consortium, "secure_sum")] == [["A", "B", "C", "D"]]
