"""The real thing: a site report through `flwr run` in simulation, with features measured from images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nnunet_fedharm.federation.report.config import SiteReportConfig
from nnunet_fedharm.federation.report.launch import federated_findings

pytestmark = [pytest.mark.slow, pytest.mark.long]


def test_a_federation_reports_on_its_sites_and_every_site_keeps_the_report(
    tmp_path: Path, make_consortium: Callable[..., Path]
) -> None:
    root = make_consortium(tmp_path, {"A": (4, 0), "B": (4, 0), "C": (4, 0)})
    config = SiteReportConfig(
        root=str(root), dataset="1", min_patients=2, scales="raw", simulations=20, bootstrap=20, parallel_sites=2
    )
    lines: list[str] = []
    findings = federated_findings(config, show=lines.append)
    assert findings.mode == "federated"
    assert [card.n_patients for card in findings.sites] == [4, 4, 4]
    assert {part.region for part in findings.variants[0].parts} == {"foreground", "image"}
    part = next(part for part in findings.variants[0].parts if part.region == "foreground")
    mean = next(feature for feature in part.features if feature.name == "firstorder_Mean")
    assert mean.effect.value is not None
    assert mean.effect.value > 0.7, "the sites' gains are 1, 2 and 3"
    assert mean.medians["A"] < mean.medians["B"] < mean.medians["C"]
    assert len(part.classifiers) == 1
    assert {what for what, _, _ in findings.shared} >= {
        "measure",
        "locate",
        "histograms",
        "moments",
        "folds",
        "classify",
    }
    text = "\n".join(lines) + (root / "server" / "fedharm" / "events.jsonl").read_text()
    assert "case0" not in text, "no case identifier leaves a site"
    for site in "ABC":
        (kept,) = (root / "sites" / site / "fedharm" / "site-report").glob("*/report.json")
        assert f"{site}case000" in (kept.parent / "features.csv").read_text()
