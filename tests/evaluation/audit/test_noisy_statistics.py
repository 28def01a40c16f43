"""The two-sample audit of noisy statistics: silent on the real ones, loud without noise, with too little, and without bounds."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import norm

from nnunet_fedharm import cli
from nnunet_fedharm.errors import PrivacyError
from nnunet_fedharm.evaluation.audit.noisy_statistics import (
    Mechanism,
    StatisticAudit,
    StatisticOptions,
    audit_statistic,
    fingerprint_mechanism,
    style_mechanism,
    votes_mechanism,
)
from nnunet_fedharm.evaluation.audit.site import AuditedSite
from nnunet_fedharm.evaluation.audit.site_statistics import audit_statistics
from nnunet_fedharm.harmonizers.style import QUANTILE_LEVELS
from nnunet_fedharm.nnunet_root import NnunetRoot
from nnunet_fedharm.planning.central import CentralOptions, plan_central
from nnunet_fedharm.planning.histogram import INTENSITY
from nnunet_fedharm.planning.planner import PlanOptions
from nnunet_fedharm.planning.summary import CaseSummary
from nnunet_fedharm.sites.registry import SITES_FILE, SiteInfo, SitesFile
from tests.evaluation.audit import broken
from tests.evaluation.audit.conftest import NAME, SCHEDULE

_generator = np.random.default_rng(0)
_QUANTILES = norm.ppf(QUANTILE_LEVELS) * _generator.uniform(0.9, 1.1, size=(40, 2, 1))
_OFFSETS = _generator.uniform(1.8, 2.6, size=(40, 2))
_CASES = [
    (f"case{i}", CaseSummary((1.0, 1.0, 1.0), (30 + i, 50, 36), 1.0, False, ())) for i in range(12)
]  # hippocampus crops
_CT = ((60.0, 900.0, -50.0, 300.0), {int(INTENSITY.codes(np.array([60.0]))[0]): 1.0})
_CT_CASES = [(case, replace(summary, labelled=True, channels=(_CT,))) for case, summary in _CASES]
_VOTES = torch.from_numpy(_generator.uniform(-0.5, 0.9, size=(40, 2))).float()
MECHANISMS: dict[str, Callable[..., Mechanism]] = {
    "fingerprint": partial(fingerprint_mechanism, _CASES, {"case1": "case0"}, ()),
    "fingerprint of CT": partial(fingerprint_mechanism, _CT_CASES, {}, (0,)),
    "style": partial(style_mechanism, _QUANTILES, _OFFSETS, what="style"),
    "votes": partial(votes_mechanism, _VOTES, what="votes"),
}
EACH = pytest.mark.parametrize("what", MECHANISMS)


def audited(what: str, *, noise: float, draws: int = 300, factor: float = 1.0) -> StatisticAudit:
    with broken.statistics_noise(factor):
        mechanism = MECHANISMS[what](noise_multiplier=noise)
        return audit_statistic(mechanism, delta=1e-3, options=StatisticOptions(draws=draws))


@EACH
@pytest.mark.parametrize("noise", [1.0, 3.0])
def test_the_real_statistics_are_not_refuted_and_the_canary_moves_them_by_all_it_may(what: str, noise: float) -> None:
    found = audited(what, noise=noise)
    assert not found.refuted
    assert found.suspicions == []
    assert found.share == pytest.approx(1.0, abs=1e-5)
    assert found.together == round(noise**2)
    assert 0.2 < found.epsilon_low <= found.gaussian_low <= found.claimed < found.most
    assert noise <= found.noise_most < 2.5 * noise, "so few draws bound it no better"


@EACH
def test_without_noise_they_are_refuted(what: str) -> None:
    found = audited(what, noise=1.0, factor=1e-3)
    assert found.epsilon_low > found.claimed
    assert found.refuted


@EACH
def test_half_of_the_noise_is_refuted_and_named(what: str) -> None:
    found = audited(what, noise=4.0, factor=0.5)
    assert found.gaussian_low > found.claimed
    assert found.refuted
    assert found.noise_most < 4.0
    assert any("promised are 4" in sentence for sentence in found.suspicions)
    assert found.to_dict()["refuted"] is True


@EACH
def test_without_bounds_on_a_patient_they_are_refuted(what: str) -> None:
    with broken.statistics_without_bounds():
        found = audited(what, noise=1.0, draws=20)
    assert found.share > 1.3
    assert found.refuted
    assert any("the bound on a patient promises at most 1" in sentence for sentence in found.suspicions)


def test_too_few_draws_and_no_confidence_are_refused() -> None:
    with pytest.raises(PrivacyError, match="at least 10 draws"):
        StatisticOptions(draws=9)
    with pytest.raises(PrivacyError, match=r"between 0\.5 and 1"):
        StatisticOptions(confidence=1.0)


@pytest.fixture(scope="module")
def voting(tmp_path_factory: pytest.TempPathFactory, make_raw_dataset: Callable[..., Path]) -> AuditedSite:
    """Two sites in one place, of which the second votes on its polarity."""
    torch.set_num_threads(1)
    root = NnunetRoot(tmp_path_factory.mktemp("voting")).create()
    raw = make_raw_dataset(root.raw, name=NAME, n_labelled=4)
    cases = sorted(path.name.removesuffix(".nii.gz") for path in (raw / "labelsTr").glob("*.nii.gz"))
    owners = dict(zip(cases, "AABB", strict=True))
    SitesFile({"A": SiteInfo(), "B": SiteInfo()}, owners).save(raw / SITES_FILE)
    options = CentralOptions(
        configurations=("2d",), kind="polarity", reference="A", schedule=replace(SCHEDULE, harmonizer_epochs=1), check=False,
        plan=PlanOptions(base_features=4, max_features=8, batch_size=2, plans_name="plans_audit"),
    )  # fmt: skip
    plans = plan_central(root, "1", options)
    return AuditedSite(root=root, dataset_name=NAME, plans=plans, configuration="2d", fold="all")


def test_the_command_audits_all_that_a_site_tells_on_its_own_images(
    voting: AuditedSite, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "audit",
        "statistics",
        "-d",
        "1",
        "-p",
        "plans_audit",
        "-c",
        "2d",
        "--site-root",
        str(voting.root.path),
    ]
    arguments += ["--epsilon", "8", "--delta", "0.01", "--draws", "30", "-o", str(tmp_path)]
    with broken.statistics_noise(1.0):
        assert cli.main(arguments) == 0
    assert "nothing contradicts" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    content = json.loads((tmp_path / "report.json").read_text())
    found = {audit["what"]: audit for audit in content["statistics"]}
    assert set(found) == {"fingerprint summary", "style of A", "style of B", "votes of B"}
    assert [found[what]["patients"] for what in sorted(found)] == [4, 2, 2, 2]
    assert found["style of A"]["noise_multiplier"] == 5.0
    assert content["left_out"] == {}
    with broken.statistics_noise(1e-3):
        assert cli.main(arguments) == 1
    assert "the claim is contradicted" in capsys.readouterr().out
    assert not (voting.root.path / "fedharm").exists(), "nothing was released"


def test_what_has_no_noise_or_does_not_exist_is_named(site: AuditedSite) -> None:
    privacy = site.privacy({"epsilon": 8.0, "delta": 1e-2, "style_noise": 0.0, "fingerprint_noise": 0.0})
    found = audit_statistics(site, privacy, StatisticOptions(draws=10))
    assert found.audits == ()
    assert set(found.left_out) == {"fingerprint summary", "style", "votes on polarity"}
    assert not found.refuted
