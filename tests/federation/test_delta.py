"""A delta that is too large for a site's patients is refused before anything is measured or trained."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nnunet_fedharm.cli import main
from nnunet_fedharm.errors import FedHarmError, PrivacyError
from nnunet_fedharm.federation.answers import answer
from nnunet_fedharm.federation.config import FederateConfig
from nnunet_fedharm.federation.messages import SUMMARIZE, pack
from nnunet_fedharm.federation.server_app import run_server
from nnunet_fedharm.federation.site import locate_site
from nnunet_fedharm.privacy.ledger import Ledger
from tests.federation.local_grid import LocalGrid
from tests.federation.test_in_process import real_sites, tiny
from tests.federation.test_own_privacy import RULES, keep_private
from tests.federation.test_private_rounds import SHARED_NOISE

RUN = "0123456789ab-012345"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, make_consortium: Callable[..., Path]) -> Path:
    return make_consortium(tmp_path_factory.mktemp("template"), {"A": (2, 0), "B": (2, 1), "C": (2, 0)})


@pytest.fixture
def root(tmp_path: Path, template: Path) -> Path:
    shutil.copytree(template, tmp_path / "consortium")
    return tmp_path / "consortium"


def refused(root: Path, **options: Any) -> str:
    """Why a run is refused; nothing was released or computed before."""
    config = tiny(root, **options)
    grid = LocalGrid(real_sites(config, 3))
    with pytest.raises(FedHarmError) as caught:
        run_server(grid, config)
    assert {kind for kind, _ in grid.sent} == {"query.preflight"}
    for site in "ABC":
        assert not [entry for entry in ledger(root, site).releases() if not entry.what.startswith("facts")]
        assert not list((root / "sites" / site / "nnUNet_preprocessed").glob("*"))
    return str(caught.value)


def ledger(root: Path, site: str) -> Ledger:
    return Ledger(root / "sites" / site / "fedharm")


def test_a_delta_of_the_run_that_is_too_large_for_one_site_is_refused_at_preflight(root: Path) -> None:
    why = refused(root, epsilon=6.0, delta=0.4)
    assert why == (
        "Site B: delta 0.4 is no guarantee for 3 patients, as publishing one of them at random would fulfil it. "
        "Start the run with --delta well below 0.33."
    )


def test_a_site_counts_its_patients_and_not_their_cases(root: Path) -> None:
    raw = root / "sites" / "B" / "nnUNet_raw" / "Dataset001_Blobs"
    cases = ["Bcase000", "Bcase001", "Bcase002"]
    told = {"sites": {"B": {}}, "cases": dict.fromkeys(cases, "B"), "patients": dict.fromkeys(cases, "one")}
    (raw / "sites.json").write_text(json.dumps(told))
    assert locate_site({"partition-id": 1}, {"root": str(root)}).patients_of("1") == 1
    config = tiny(root, epsilon=6.0, delta=0.4)
    content = pack(SUMMARIZE, statistics(delta=0.4))
    given = answer("query.summarize", content, {"partition-id": 1}, config.to_run_config())
    assert given.config_records["config"]["status"] == "ok"


@pytest.mark.slow
def test_a_delta_of_the_own_policy_is_refused_at_preflight_and_the_run_goes_on_once_it_is_mended(root: Path) -> None:
    keep_private(root, delta=0.4)
    assert re.fullmatch(
        r"Site B: delta 0\.4 is no guarantee for 3 patients, .* Set patients\.delta of its policy well below 0\.33\.",
        refused(root),
    )
    keep_private(root)
    config = tiny(root, segmenter_rounds=1)
    run_server(LocalGrid(real_sites(config, 3)), config)
    assert ledger(root, "B").spent(RULES["delta"]).epsilon <= RULES["private_epsilon"]


@pytest.mark.slow
def test_an_epsilon_that_left_no_room_can_be_raised_and_the_same_command_goes_on(root: Path) -> None:
    keep_private(root, private_epsilon=0.001, max_epsilon=0.0005)
    assert "Site B refuses by the rule patients.max_epsilon" in refused(root, segmenter_rounds=1)
    keep_private(root)
    config = tiny(root, segmenter_rounds=1)
    run_server(LocalGrid(real_sites(config, 3)), config)


def test_noise_of_all_sites_together_asks_for_a_delta_below_one_over_all_their_patients(root: Path) -> None:
    why = refused(root, **{**SHARED_NOISE, "delta": 0.2})
    assert re.fullmatch(r"All sites together: delta 0\.2 is no guarantee for 6 patients, .* well below 0\.17\.", why)


def statistics(**values: Any) -> dict[str, Any]:
    asked = {"run_id": RUN, "dataset_name": "Dataset001_Blobs", "noise": 5.0, "epsilon": 6.0, "delta": 1e-3}
    return {**asked, "summed_over": 0, "colluding": 1, **values}


def test_a_server_that_says_nothing_at_preflight_is_refused_at_the_first_statistics(root: Path) -> None:
    given = answer("query.summarize", pack(SUMMARIZE, statistics(delta=0.4)), {"partition-id": 1}, {"root": str(root)})
    assert "Site B: delta 0.4 is no guarantee for 3 patients" in str(given.config_records["config"]["text"])
    assert not ledger(root, "B").releases()


@pytest.mark.parametrize("mode", ["server", "local"])
def test_a_delta_of_site_dp_has_to_be_below_one_over_the_sites(mode: str) -> None:
    options: dict[str, Any] = {"sites": "A,B,C,D", "weighting": "sites", "site_dp": mode}
    FederateConfig(**options, delta=0.2)
    with pytest.raises(
        PrivacyError, match=rf"^site-dp {mode}: delta 0\.25 is no guarantee for 4 sites, .* below 0\.25"
    ):
        FederateConfig(**options, delta=0.25)


def test_plan_refuses_it_before_it_reads_an_image(
    tmp_path: Path,
    make_raw_dataset: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / f"nnUNet_{name}"))
    raw = make_raw_dataset(tmp_path / "nnUNet_raw", n_labelled=3, n_unlabelled=1)
    for image in raw.glob("images*/*.nii.gz"):
        image.write_bytes(b"no image")
    words = ("plan", "-d", "1", "-c", "2d", "--harmonizer", "none", "--epsilon", "6", "--delta", "0.25")
    assert main(words) == 2
    assert re.search(
        r"Dataset001_Blobs: delta 0\.25 is no guarantee for 4 patients, .* Give --delta well below 0\.25\.",
        capsys.readouterr().err,
    )
