"""A report's exchanges with the real server and client code in one process, on drawn features."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from nnunet_fedharm.differences.findings import Findings
from nnunet_fedharm.differences.findings_file import from_json
from nnunet_fedharm.differences.options import StatisticsOptions
from nnunet_fedharm.differences.statistics import find_differences
from nnunet_fedharm.errors import FederationError
from nnunet_fedharm.federation.events import read_events
from nnunet_fedharm.federation.progress import describe
from nnunet_fedharm.federation.registered import NODES_FILE, write_registered
from nnunet_fedharm.federation.report.config import SiteReportConfig
from nnunet_fedharm.federation.report.server import run_site_report
from nnunet_fedharm.privacy.ledger import Ledger
from nnunet_fedharm.sites.features.table import FeatureTable
from tests.federation.local_grid import Client, LocalGrid
from tests.federation.measured import (
    draw_table,
    drawn_features,
    pooled_table,
    recorded,
    report_config,
    report_sites,
    texts_of,
)

PATIENTS = {"A": 30, "B": 25, "C": 20}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, make_consortium: Callable[..., Path]) -> Path:
    return make_consortium(tmp_path_factory.mktemp("report"), dict.fromkeys(PATIENTS, (2, 0)))


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> dict[str, FeatureTable]:
    found = {
        site: draw_table(site, patients, shift=0.8 * index, seed=index, cases_each=1 + (site == "C"))
        for index, (site, patients) in enumerate(PATIENTS.items())
    }
    drawn_features(monkeypatch, found)
    return found


def report(config: SiteReportConfig, clients: dict[int, Client] | None = None) -> Findings:
    path = run_site_report(LocalGrid(clients or report_sites(config, len(PATIENTS))), config)
    return from_json(Findings, json.loads(path.read_text()))


def test_the_servers_numbers_are_the_pooled_ones_within_the_stated_bounds(
    root: Path, tables: dict[str, FeatureTable]
) -> None:
    findings = report(report_config(root))
    options = StatisticsOptions(bootstrap=0, permutations=0, mmd_permutations=0, forest_permutations=0, trees=1)
    pooled = {
        (part.channel, part.region, part.scale): part
        for part in find_differences(pooled_table(tables), options=options)
    }
    bounds = findings.settings["bounds"]
    assert len(findings.variants[0].parts) == len(pooled) == 2
    for part in findings.variants[0].parts:
        exact = pooled[part.channel, part.region, part.scale]
        assert part.n == PATIENTS
        by_name = {feature.name: feature for feature in exact.features}
        for feature in part.features:
            other = by_name[feature.name]
            if feature.name == "quality_spacing":
                assert feature.p is None
                continue
            assert feature.n == other.n
            assert feature.effect.value is not None
            assert other.effect.value is not None
            assert abs(feature.effect.value - other.effect.value) <= bounds["effect"]["largest"]
            assert abs(feature.effect.value - other.effect.value) < 0.02
            for site, median in feature.medians.items():
                spread = np.nanstd(np.clip(tables[site].column(feature.name), -1e8, 1e8))
                assert abs(median - other.medians[site]) < 0.1 * spread, (feature.name, site)
        for pair, other_pair in zip(part.pairs, exact.pairs, strict=True):
            assert (pair.first, pair.second) == (other_pair.first, other_pair.second)
            assert pair.ks.value == pytest.approx(other_pair.ks.value, abs=0.05)
            assert pair.wasserstein.value == pytest.approx(other_pair.wasserstein.value, abs=0.05)


def test_the_classifier_is_the_pooled_discriminant_in_the_same_folds(
    root: Path, tables: dict[str, FeatureTable]
) -> None:
    """The last part's standardisation differs (quartiles of histograms), so a few patients near a border may change sides."""
    findings = report(report_config(root, folds=4))
    options = StatisticsOptions(
        bootstrap=0, permutations=0, mmd_permutations=0, forest_permutations=0, trees=1, folds=4
    )
    single = {**tables, "C": draw_table("C", PATIENTS["C"], shift=1.6, seed=2)}
    assert findings.settings["federation"]["folds"] == 4
    for part, exact in zip(
        findings.variants[0].parts, find_differences(pooled_table(single), options=options), strict=True
    ):
        (found,) = part.classifiers
        assert found.method == "linear discriminant on features"
        assert found.n == sum(PATIENTS.values())
        assert {site: sum(row.values()) for site, row in found.confusion.items()} == PATIENTS
        assert found.accuracy.value is not None
        assert found.null_mean == pytest.approx(1 / 3, abs=0.1)
        pooled = next(one for one in exact.classifiers if one.method == found.method)
        assert found.accuracy.value == pytest.approx(pooled.accuracy.value, abs=0.12)


def test_one_population_at_three_sites_is_not_told_apart(
    root: Path, tables: dict[str, FeatureTable], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn_features(
        monkeypatch, {site: draw_table(site, 30, shift=0, seed=20 + index) for index, site in enumerate("ABC")}
    )
    findings = report(report_config(root, simulations=59))
    for part in findings.variants[0].parts:
        assert min(one.q for one in part.features if one.q is not None) > 0.05
        assert part.classifiers[0].p is not None
        assert part.classifiers[0].p > 0.05
        assert part.families["intensity"].low is not None
        assert part.families["intensity"].low < 0.05


def test_nothing_that_leaves_a_site_names_a_case_or_a_patient(root: Path, tables: dict[str, FeatureTable]) -> None:
    config = report_config(root)
    sent: list[Message] = []
    clients = {node: recorded(client, sent) for node, client in report_sites(config, 3).items()}
    findings = report(config, clients)
    assert len(sent) >= 3 * 8
    for message in sent:
        assert "secret" not in texts_of(message)
        assert "patient_" not in texts_of(message)
    stored = (root / "server" / "fedharm" / "events.jsonl").read_text() + json.dumps(findings.settings)
    assert "secret" not in stored
    assert [(one.site, one.case) for one in findings.failures] == [("A", "")]
    axes = [array.shape for m in sent for record in m.content.array_records.values() for array in record.values()]
    assert not {shape for shape in axes if set(shape) & set(PATIENTS.values())}, "no array has an axis of patients"


def test_a_site_keeps_its_table_and_a_report_with_what_only_it_may_know(
    root: Path, tables: dict[str, FeatureTable]
) -> None:
    config = report_config(root)
    path = run_site_report(LocalGrid(report_sites(config, 3)), config)
    home = root / "sites" / "A" / "fedharm" / "site-report" / path.parent.name
    assert (home / "features.csv").read_text().count("secret_A_") == 2 * PATIENTS["A"]
    own = from_json(Findings, json.loads((home / "report.json").read_text()))
    assert [one.case for one in own.failures if one.site == "A"] == ["secret_A_broken"]
    assert all(one.site == "A" for part in own.variants[0].parts for one in part.outliers)
    assert not [
        one for part in from_json(Findings, json.loads(path.read_text())).variants[0].parts for one in part.outliers
    ]


def test_a_small_site_sends_nothing_and_is_named(
    root: Path, tables: dict[str, FeatureTable], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn_features(monkeypatch, {**tables, "B": draw_table("B", 4, shift=0, seed=9)})
    config = report_config(root)
    sent: list[Message] = []
    clients = report_sites(config, 3)
    findings = report(config, {**clients, 101: recorded(clients[101], sent)})
    assert [card.site for card in findings.sites] == ["A", "C"]
    assert "Site B has fewer patients than the 5" in findings.settings["left_out"]["B"]
    assert any("Left out: Site B" in note for note in findings.variants[0].parts[0].notes)
    assert not any(message.content.array_records for message in sent), "no number of its patients left it"


def test_a_site_may_ask_for_more_patients_than_the_run(root: Path, tables: dict[str, FeatureTable]) -> None:
    config = report_config(root)
    clients = {**report_sites(config, 3), 102: report_sites(config, 3, **{"min-patients": 21})[102]}
    findings = report(config, clients)
    assert "fewer patients than the 21" in findings.settings["left_out"]["C"]


def test_a_report_on_one_site_is_refused(
    root: Path, tables: dict[str, FeatureTable], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn_features(
        monkeypatch, {**tables, "A": tables["A"].where(lambda row: False), "B": tables["B"].where(lambda row: False)}
    )
    with pytest.raises(FederationError, match=r"A report needs 2 sites, 1 of 3 can take part\. Left out: A"):
        report(report_config(root))
    last = read_events(root / "server" / "fedharm" / "events.jsonl")[0][-1]
    assert last["event"] == "failed"


@pytest.mark.parametrize("action", ["measure", "counts", "moments", "classify"])
def test_a_site_that_falls_silent_is_left_out_and_the_rest_goes_on(
    root: Path, tables: dict[str, FeatureTable], action: str
) -> None:
    config = report_config(root, deadline_s=0.3, prepare_deadline_s=0.3)
    clients = report_sites(config, 3)

    def leaving(message: Message) -> Message | None:
        return None if message.metadata.message_type.endswith(action) else clients[101](message)

    findings = report(config, {**clients, 101: leaving})
    assert "B" in findings.settings["left_out"]
    there = ["A", "C"] if action in ("measure", "counts") else ["A", "B", "C"]
    assert [card.site for card in findings.sites] == there, "what it sent before stays in the report"
    for part in findings.variants[0].parts:
        (found,) = part.classifiers
        assert list(found.confusion) == ["A", "C"]
        assert sum(map(sum, (row.values() for row in found.confusion.values()))) == PATIENTS["A"] + PATIENTS["C"]


def test_a_site_that_connects_while_others_are_greeted_takes_part(root: Path, tables: dict[str, FeatureTable]) -> None:
    config = report_config(root)
    clients = report_sites(config, 3)
    grid = LocalGrid({100: clients[100], 101: clients[101]})

    def slow(message: Message) -> Message | None:
        grid.clients[102] = clients[102]
        return clients[100](message)

    grid.clients[100] = slow
    findings = from_json(Findings, json.loads(run_site_report(grid, config).read_text()))
    assert [card.site for card in findings.sites] == ["A", "B", "C"]


@pytest.fixture
def registered(root: Path) -> Iterator[None]:
    """The coordinator has registered the nodes' keys."""
    fedharm = root / "server" / "fedharm"
    write_registered(fedharm, {100: "A", 101: "B", 102: "C"})
    yield
    (fedharm / NODES_FILE).unlink()


@pytest.mark.usefixtures("registered")
def test_a_site_whose_first_answer_comes_too_late_is_asked_again_and_named_meanwhile(
    root: Path, tables: dict[str, FeatureTable], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nnunet_fedharm.federation.report.exchange._GREETING_S", 0.3)
    monkeypatch.setattr("nnunet_fedharm.federation.exchange.WAITING_EVERY_S", 0.1)
    config = report_config(root)
    clients = report_sites(config, 3)
    asked: list[str] = []

    def busy(message: Message) -> Message | None:
        asked.append(message.metadata.message_type)
        return None if len(asked) == 1 else clients[102](message)

    events = root / "server" / "fedharm" / "events.jsonl"
    offset = events.stat().st_size if events.exists() else 0
    findings = report(config, {**clients, 102: busy})
    assert [card.site for card in findings.sites] == ["A", "B", "C"]
    assert asked[:3] == ["query.report_hello", "query.report_hello", "query.report_measure"]
    lines = [describe(event) for event in read_events(events, offset)[0]]
    assert "  waiting for a first answer: C (0 s)" in lines


@pytest.mark.usefixtures("registered")
def test_a_connected_site_that_says_nothing_is_not_called_disconnected(
    root: Path, tables: dict[str, FeatureTable], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nnunet_fedharm.federation.report.exchange._GREETING_S", 0.2)
    config = report_config(root, join_wait_s=0.5)
    findings = report(config, {**report_sites(config, 3), 102: lambda message: None})
    assert "is connected, but did not answer within" in findings.settings["left_out"]["C"]


def test_every_release_is_in_the_sites_ledger(root: Path, tables: dict[str, FeatureTable]) -> None:
    report(report_config(root))
    entries = Ledger(root / "sites" / "A" / "fedharm").releases()
    assert {one.what for one in entries} == {
        f"site report, {step}" for step in ("numbers", "locate", "histograms", "moments", "folds", "classify")
    }
    assert {one.mechanism for one in entries} == {"none"}


def test_sites_that_measure_differently_are_refused_by_name(
    root: Path, tables: dict[str, FeatureTable], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nnunet_fedharm.federation.report import home as measure_home
    from nnunet_fedharm.federation.report.home import own_table

    def other(site: Any, *args: Any) -> Any:
        home = own_table(site, *args)
        if site.name == "C":
            home.settings["bin_count"] = 64
        return home

    monkeypatch.setattr("nnunet_fedharm.federation.report.site.own_table", other)
    assert measure_home.own_table is own_table
    with pytest.raises(Exception, match="Site C disagrees on how features are measured: it has bin_count = 64"):
        report(report_config(root))
