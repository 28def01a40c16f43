"""Noise and secure sums of a site report: what they cost, what they hide, what the report still finds."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from nnunet_fedharm.differences import sketch
from nnunet_fedharm.differences.cross_validation import fold_alone
from nnunet_fedharm.differences.findings import Findings
from nnunet_fedharm.differences.findings_file import from_json
from nnunet_fedharm.differences.sketch_statistics import kruskal_wallis, noisy_rank_test
from nnunet_fedharm.differences.summary import describe
from nnunet_fedharm.errors import FederationError
from nnunet_fedharm.federation.messages import pack
from nnunet_fedharm.federation.report.config import SiteReportConfig
from nnunet_fedharm.federation.report.home import keys_beforehand, load_records, parts_of
from nnunet_fedharm.federation.report.messages import COUNTS, Part, parts_to_dict, send
from nnunet_fedharm.federation.report.noise import SHARES, Noiser, Protection, cut_norm, sensitivity_of
from nnunet_fedharm.federation.report.server import run_site_report
from nnunet_fedharm.privacy.accounting import Noise, epsilon_of
from nnunet_fedharm.privacy.gaussian import gaussian_sigma
from nnunet_fedharm.privacy.ledger import Ledger
from nnunet_fedharm.sites.features.table import SCALES, FeatureTable
from tests.federation.local_grid import Client, LocalGrid
from tests.federation.measured import NAMES, PARTS, draw_table, drawn_features, recorded, report_config, report_sites

PATIENTS = {"A": 30, "B": 25, "C": 20}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, make_consortium: Callable[..., Path]) -> Path:
    return make_consortium(tmp_path_factory.mktemp("protected"), dict.fromkeys(PATIENTS, (2, 0)))


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> dict[str, FeatureTable]:
    found = {
        site: draw_table(site, patients, shift=0.8 * index, seed=index)
        for index, (site, patients) in enumerate(PATIENTS.items())
    }
    drawn_features(monkeypatch, found)
    return found


def report(config: SiteReportConfig, clients: dict[int, Client] | None = None) -> tuple[Findings, Path]:
    path = run_site_report(LocalGrid(clients or report_sites(config, len(PATIENTS))), config)
    return from_json(Findings, json.loads(path.read_text())), path


def test_the_shares_of_the_budget_make_the_whole() -> None:
    assert sum(SHARES.values()) == pytest.approx(1.0)
    plan = Protection(epsilon=2.0, delta=1e-6)
    together = math.sqrt(sum(plan.multiplier(step) ** -2 for step in SHARES))
    assert 1 / together == pytest.approx(gaussian_sigma(2.0, 1e-6), rel=1e-9)
    assert Protection().sigma("locate", 5.0) == 0


def test_the_ledger_of_a_site_says_that_the_report_cost_its_epsilon(
    root: Path, tables: dict[str, FeatureTable]
) -> None:
    report(report_config(root, epsilon=3.0, delta=1e-5))
    entries = Ledger(root / "sites" / "B" / "fedharm")
    assert {one.mechanism for one in entries.releases()} == {"gaussian"}
    # Noise may leave too few patients for a fold: what is then not asked is not spent.
    assert 0.7 * 3.0 < entries.spent(1e-5).total <= 3.0 * (1 + 1e-6)


def test_a_report_with_every_message_costs_its_epsilon_exactly() -> None:
    plan = Protection(epsilon=3.0, delta=1e-5)
    assert epsilon_of([Noise(plan.multiplier(step)) for step in SHARES], 1e-5) == pytest.approx(3.0, rel=1e-6)


def test_no_message_changes_by_more_than_its_sensitivity_when_a_patient_leaves() -> None:
    table = draw_table("A", 12, shift=0.3, seed=5)
    parts = [Part(*key, NAMES) for key in PARTS]
    features = [len(NAMES)] * len(parts)
    edges = sketch.equal_edges(np.full(len(NAMES), -2.0), np.full(len(NAMES), 2.0), 16)

    def messages_of(own: FeatureTable) -> dict[str, np.ndarray]:
        found: dict[str, list[np.ndarray]] = {"locate": [], "histograms": [], "moments": [], "numbers": []}
        for part in parts:
            values = load_records(own, part).values
            vectors = cut_norm(np.nan_to_num(values, nan=0.0), 3.0) / 3.0
            products = (vectors.T @ vectors)[np.triu_indices(len(NAMES))]
            found["locate"].append(sketch.locate(values).ravel())
            found["histograms"].append(sketch.count_bins(values, edges).ravel())
            found["moments"].append(np.concatenate([[len(values)], vectors.sum(0), products]))
            found["numbers"].append(np.array([len(values)]))
        return {step: np.concatenate(arrays) for step, arrays in found.items()}

    whole = messages_of(table)
    for patient in range(12):
        without = messages_of(table.where(lambda row, gone=f"patient_A_{patient:03d}": row.patient != gone))
        for step, values in whole.items():
            assert np.linalg.norm(values - without[step]) <= sensitivity_of(step, features) + 1e-9, step


def test_nobodys_fold_depends_on_who_else_is_there() -> None:
    """`folds` and `classify` may change by one patient only; folds of equal size would deal all later ones anew."""
    patients = [f"patient_{number}" for number in range(40)]
    folds = dict(zip(patients, fold_alone(patients, folds=5, seed=3), strict=True))
    for leaving in patients:
        rest = [patient for patient in patients if patient != leaving]
        assert dict(zip(rest, fold_alone(rest, folds=5, seed=3), strict=True)) == {one: folds[one] for one in rest}
    assert set(folds.values()) == set(range(5))
    other = fold_alone(patients, folds=5, seed=4)
    assert list(other) != list(folds.values())


def test_which_parts_a_site_names_with_noise_does_not_depend_on_its_patients() -> None:
    description = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "liver": 1, "metastasis": 2}}
    options: dict[str, Any] = {
        "image_region": False,
        "channels": [],
        "regions": [],
        "features": [],
        "scales": list(SCALES),
    }
    keys = keys_beforehand(description, options, labelled=True, unlabelled=False)
    table = draw_table("A", 6, shift=0.0, seed=1)
    assert parts_of(table, options, keys) == parts_of(draw_table("A", 1, shift=0.0, seed=2), options, keys)
    regions = {key[:2] for key in keys}
    assert ("T2", "label metastasis") in regions
    assert ("T1", "foreground") in regions
    assert ("T1", "image") in regions
    assert not {region for _, region in regions if region == "label background"}
    alone = keys_beforehand(description, options, labelled=False, unlabelled=True)
    assert {key[1] for key in alone} == {"image"}


def test_noise_has_the_deviation_that_was_asked_for_and_repeats_nowhere() -> None:
    noiser = Noiser(Protection(epsilon=1.0))
    drawn = noiser.add("histograms", 2.0, np.zeros((200, 100)))
    assert drawn.std() == pytest.approx(Protection(epsilon=1.0).sigma("histograms", 2.0), rel=0.02)
    assert abs(drawn.mean()) < 0.05 * drawn.std()
    assert not np.array_equal(drawn, noiser.add("histograms", 2.0, np.zeros((200, 100))))


def test_with_noise_no_exact_number_leaves_a_site(root: Path, tables: dict[str, FeatureTable]) -> None:
    config = report_config(root, epsilon=5.0)
    sent: list[Message] = []
    clients = {node: recorded(client, sent) for node, client in report_sites(config, 3).items()}
    findings, _ = report(config, clients)
    for message in sent:
        for record in message.content.array_records.values():
            for array in record.values():
                assert not np.array_equal(array.numpy(), np.rint(array.numpy()))
    numbers = [
        json.loads(str(record["numbers"]))
        for message in sent
        for record in message.content.config_records.values()
        if "numbers" in record
    ]
    assert len(numbers) == 3
    assert all(set(one) == {"patients"} for one in numbers), "no count of cases, labels or failures"
    assert findings.failures == []
    assert set(findings.settings["noise"]["sigma"]) == set(SHARES)


def test_much_epsilon_finds_the_differences_and_little_finds_none(root: Path, tables: dict[str, FeatureTable]) -> None:
    strong, _ = report(report_config(root, epsilon=1000.0, bins=16, simulations=99))
    weak, _ = report(report_config(root, epsilon=0.1, bins=16, simulations=99))
    found = {one.name: one for one in strong.variants[0].parts[0].features}
    assert found["firstorder_Mean"].q is not None
    assert found["firstorder_Mean"].q < 0.05
    assert found["shape_Sphericity"].p is not None
    assert found["shape_Sphericity"].p > 0.01
    assert min(one.q for part in weak.variants[0].parts for one in part.features if one.q is not None) > 0.05


def test_few_features_of_one_region_carry_less_noise(root: Path, tables: dict[str, FeatureTable]) -> None:
    names = "firstorder_Mean,quality"
    findings, _ = report(
        report_config(root, epsilon=5.0, bins=8, regions="foreground", scales="z-score", features=names)
    )
    (part,) = findings.variants[0].parts
    assert part.region == "foreground"
    assert {feature.name for feature in part.features} == {"firstorder_Mean", "quality_noise", "quality_spacing"}
    few = findings.settings["noise"]["sigma"]["histograms"]
    assert few == pytest.approx(Protection(epsilon=5.0).sigma("histograms", math.sqrt(3)))


def test_noise_alone_is_not_called_a_difference() -> None:
    generator = np.random.default_rng(0)
    counts = generator.multinomial(40, np.full(18, 1 / 18), size=(3, 200)) + generator.normal(0, 6, size=(3, 200, 18))
    p = noisy_rank_test(counts, 6.0, simulations=99, generator=generator).p
    assert 0.01 < (p <= 0.05).mean() < 0.12
    assert (kruskal_wallis(np.maximum(counts, 0)).p <= 0.05).mean() > 0.2, "which is what chi squared would do"


def test_the_same_question_gets_the_same_noise_and_another_one_no_answer(
    root: Path, tables: dict[str, FeatureTable]
) -> None:
    config = report_config(root, epsilon=5.0, seed=3)
    _, path = report(config)
    client = report_sites(config, 3)[100]
    kept = json.loads((root / "sites/A/fedharm/site-report" / path.parent.name / "answers/histograms.json").read_text())
    assert set(kept["content"]) == {"values", "question"}
    part = Part(*PARTS[0], NAMES[:2])
    values: dict[str, Any] = {
        "run_id": path.parent.name,
        "parts": parts_to_dict([part]),
        "step": "histograms",
        "turn": 0,
    }
    content = pack(
        COUNTS,
        {**values, "protection": {"epsilon": 5.0, "delta": 1e-5}},
        send({"00.edges": np.array([[0.0, 1.0]] * 2)}),
    )
    answer = client(Message(content, dst_node_id=100, message_type="query.report_counts"))
    assert answer is not None
    assert "answers nothing else" in str(answer.content.config_records["config"]["text"])


@pytest.mark.parametrize(
    ("epsilon", "words"),
    [(0.0, "with noise only, epsilon at most 2"), (4.0, "The budget is epsilon 2 .*this run alone needs 4")],
)
def test_a_site_may_insist_on_noise(
    root: Path, tables: dict[str, FeatureTable], tmp_path: Path, epsilon: float, words: str
) -> None:
    shutil.copytree(root, tmp_path / "fresh", ignore=shutil.ignore_patterns("fedharm"))
    config = report_config(tmp_path / "fresh", epsilon=epsilon, bins=8)
    clients = {**report_sites(config, 3), 101: report_sites(config, 3, **{"max-epsilon": 2.0})[101]}
    findings, _ = report(config, clients)
    assert re.search(words, findings.settings["left_out"]["B"])


def test_two_reports_within_a_sites_limit_are_not_both_answered(
    root: Path, tables: dict[str, FeatureTable], tmp_path: Path
) -> None:
    shutil.copytree(root, tmp_path / "fresh", ignore=shutil.ignore_patterns("fedharm"))
    config = report_config(tmp_path / "fresh", epsilon=1.5, bins=8)
    clients = {**report_sites(config, 3), 101: report_sites(config, 3, **{"max-epsilon": 2.0})[101]}
    first, _ = report(config, clients)
    second, _ = report(config, clients)
    assert first.settings["left_out"] == {}
    assert re.search(r"1\.\d+ is spent, this run alone needs 1\.5", second.settings["left_out"]["B"])


def test_secure_sums_find_the_same_effects_and_no_single_site(root: Path, tables: dict[str, FeatureTable]) -> None:
    exact, _ = report(report_config(root))
    config = report_config(root, secure_sums=True)
    sent: list[Message] = []
    clients = {node: recorded(client, sent) for node, client in report_sites(config, 3).items()}
    findings, path = report(config, clients)
    for part, open_part in zip(findings.variants[0].parts, exact.variants[0].parts, strict=True):
        assert part.n == {"all sites": sum(PATIENTS.values())}
        assert part.pairs == part.classifiers == []
        for feature, open_feature in zip(part.features, open_part.features, strict=True):
            assert feature.effect.value == pytest.approx(open_feature.effect.value, abs=1e-6)
            assert feature.p == pytest.approx(open_feature.p, abs=1e-6)
            assert list(feature.medians) == ["all sites"]
    assert describe(findings)[0] == "The sites differ even after z-score."
    assert findings.sites[0].n_cases == 0, "which the page shows as not told"
    plain = [m for m in sent if "secure" not in str(m.metadata.message_type)]
    assert not any(len(record) for m in plain for record in m.content.array_records.values())
    own = json.loads(
        (root / "sites" / "C" / "fedharm" / "site-report" / path.parent.name / "against-others.json").read_text()
    )
    distances = {one["name"]: one["wasserstein"] for one in own["parts"][0]["features"]}
    assert distances["firstorder_Mean"] > 0.7 > distances["shape_Sphericity"]


def test_secure_sums_of_two_sites_are_refused(root: Path) -> None:
    with pytest.raises(FederationError, match="needs at least 3 sites"):
        report_config(root, secure_sums=True, sites="A,B")
    with pytest.raises(FederationError, match="cannot be combined"):
        report_config(root, secure_sums=True, epsilon=1.0)
