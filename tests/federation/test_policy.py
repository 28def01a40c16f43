"""A site's own rules: refused before any work, in one sentence that names the site and the rule."""

from __future__ import annotations

import shutil
import time
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nnunet_fedharm.errors import FederationError, PrivacyError
from nnunet_fedharm.federation import answers, messages
from nnunet_fedharm.federation.answers import answer
from nnunet_fedharm.federation.config import FederateConfig
from nnunet_fedharm.federation.durable import read_json, write_json
from nnunet_fedharm.federation.entries import FACTS
from nnunet_fedharm.federation.events import read_events
from nnunet_fedharm.federation.ownership import Ownership
from nnunet_fedharm.federation.policy import (
    METRICS,
    POLICY_FILE,
    TEMPLATE,
    Policy,
    checked_policy,
    load_policy,
    policy_from_dict,
)
from nnunet_fedharm.federation.policy_checks import USE_FILE, enforce
from nnunet_fedharm.federation.secure.rounds import Trained
from nnunet_fedharm.federation.server_app import run_server
from nnunet_fedharm.federation.site import Site, locate_site
from nnunet_fedharm.harmonizers.style import QUANTILE_LEVELS, Style
from nnunet_fedharm.planning.section import SECTION, FedHarmSection, Schedule
from nnunet_fedharm.privacy.ledger import Ledger
from nnunet_fedharm.privacy.options import PrivacyOptions
from nnunet_fedharm.privacy.releases import ANNOUNCED, GAUSSIAN, Release
from tests.federation.local_grid import LocalGrid
from tests.federation.test_in_process import real_sites, tiny

RUN = "0123456789ab-012345"
OTHER = "0123456789ab-999999"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, make_consortium: Callable[..., Path]) -> Path:
    return make_consortium(tmp_path_factory.mktemp("template"), {"A": (2, 1), "B": (2, 0)})


@pytest.fixture
def root(tmp_path: Path, template: Path) -> Path:
    shutil.copytree(template, tmp_path / "consortium")
    return tmp_path / "consortium"


@pytest.fixture
def site(root: Path) -> Site:
    found = locate_site({"partition-id": 0}, {"root": str(root)})
    Ledger(found.folder).record(Release(what=FACTS, mechanism=ANNOUNCED))  # as every run's preflight does
    return found


def train(**values: Any) -> dict[str, Any]:
    request = {"run_id": RUN, "dataset_name": "Dataset001_Blobs", "configuration": "2d", "epochs": 1}
    return {**request, "trainer_name": "nnUNetTrainerFedHarmNone", "phase": "segmenter", "round": 0, **values}


def check(
    site: Site, request: messages.Schema, values: dict[str, Any], run_config: dict[str, Any] | None = None
) -> None:
    enforce(site, request.name, values, run_config or {}, site.folder / RUN / "federation.json")


def plans_with(section: FedHarmSection) -> dict[str, Any]:
    return {"configurations": {"2d": {SECTION: section.to_dict()}, "3d_fullres": {}}}


def under(site: Site, **rules: Any) -> Site:
    return replace(site, policy=Policy(**rules))


def test_the_template_is_the_policy_that_it_explains() -> None:
    found = policy_from_dict(tomllib.loads(TEMPLATE), where="the template")
    assert found == Policy(min_patients=5)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[wrok]\nmax_rounds = 1", r"unknown section \[wrok\]"),
        ("[work]\nmax_round = 1", r"unknown rule work\.max_round"),
        ("[work]\ndatasets = 'A'", "a list of texts"),
        ("[work]\nmax_rounds = true", "int belongs there"),
        ("[work]\nmax_rounds = -1", "must not be negative"),
        ("[patients]\ndelta = 1", "between 0 and 1"),
        ("[messages]\nmetrics = ['images']", "unknown metric 'images'"),
        ("[messages", "cannot be read as TOML"),
    ],
)
def test_a_damaged_policy_stops_every_answer_and_shows_no_path(root: Path, text: str, reason: str) -> None:
    path = root / "sites" / "A" / "fedharm" / POLICY_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    with pytest.raises(FederationError, match=rf"policy.toml of site A .*{reason}") as caught:
        load_policy(path, site="A")
    assert str(root) not in str(caught.value)
    content = messages.pack(messages.PREFLIGHT, {"run_id": RUN, "dataset": "1", "check_data": False})
    given = answer("query.preflight", content, {"site": "A", "site-root": str(root / "sites" / "A")}, {})
    assert given.config_records["config"]["status"] == "error"


def test_without_a_policy_a_site_has_the_rules_of_its_node_config(root: Path) -> None:
    node = {"site": "A", "site-root": str(root / "sites" / "A"), "min-patients": 7, "max-epsilon": 2.0}
    assert locate_site(node, {}).policy == Policy()
    path = root / "sites" / "A" / "fedharm" / POLICY_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[patients]\nmin_patients = 9\nmax_epsilon = 3.0\nsecure_only = true\n")
    both = locate_site(node, {})
    assert (both.min_patients, both.max_epsilon, both.secure_only) == (9, 2.0, True), "the stricter one counts"


@pytest.mark.parametrize(
    ("rules", "run_config", "rule"),
    [
        ({"training": False}, {}, "work.training"),
        ({"datasets": ("Dataset910_Hippocampus",)}, {}, "work.datasets"),
        ({"harmonizers": ("none",)}, {"harmonizer": "curve"}, "work.harmonizers"),
        ({"trainers": ("nnUNetTrainerFedHarmNone",)}, {"harmonizer": "curve"}, "work.trainers"),
        ({"max_rounds": 10}, {"harmonizer-rounds": 5, "segmenter-rounds": 6}, "work.max_rounds"),
        ({"max_epochs": 10}, {"segmenter-rounds": 6, "local-epochs": 2}, "work.max_epochs"),
        ({"max_iterations_per_epoch": 100}, {"iterations-per-epoch": 101}, "work.max_iterations_per_epoch"),
        ({"require_privacy": True}, {"epsilon": 0.0}, "patients.require_privacy"),
        ({"max_epsilon": 2.0}, {"epsilon": 2.5, "delta": 1e-5}, "patients.max_epsilon"),
        ({"max_epsilon": 2.0, "delta": 1e-6}, {"epsilon": 1.0, "delta": 1e-5}, "patients.delta"),
        ({"min_patients": 4}, {}, "patients.min_patients"),
    ],
)
def test_a_run_is_refused_at_preflight(
    site: Site, rules: dict[str, Any], run_config: dict[str, Any], rule: str
) -> None:
    request = {"run_id": RUN, "dataset": "1", "check_data": True}
    check(site, messages.PREFLIGHT, request, run_config)
    with pytest.raises(FederationError, match=rf"^Site A refuses by the rule {rule} of its own policy: .*\.$"):
        check(under(site, **rules), messages.PREFLIGHT, request, run_config)


def test_secure_only_is_said_at_preflight(site: Site) -> None:
    request = {"run_id": RUN, "dataset": "1", "check_data": True}
    with pytest.raises(FederationError, match="secure sums only"):
        check(replace(site, secure_only=True), messages.PREFLIGHT, request, {"secure-aggregation": "off"})
    check(replace(site, secure_only=True), messages.PREFLIGHT, request, {"secure-aggregation": "segmenter"})


@pytest.mark.parametrize(
    ("rules", "section", "rule"),
    [
        ({"harmonizers": ("none",)}, FedHarmSection(kind="curve"), "work.harmonizers"),
        ({"require_privacy": True}, FedHarmSection(kind="none"), "patients.require_privacy"),
        (
            {"max_iterations_per_epoch": 100},
            FedHarmSection(kind="none", schedule=Schedule(iterations_per_epoch=101)),
            "work.max_iterations_per_epoch",
        ),
        (
            {"max_epsilon": 1.0},
            FedHarmSection(kind="none", privacy=PrivacyOptions(epsilon=1.5)),
            "patients.max_epsilon",
        ),
    ],
)
def test_a_server_that_says_one_thing_and_sends_other_plans_is_refused(
    site: Site, rules: dict[str, Any], section: FedHarmSection, rule: str
) -> None:
    strict, plans = under(site, **rules), plans_with(section)
    with pytest.raises(FederationError, match=rule):
        check(strict, messages.STORE_PLANS, {"run_id": RUN, "dataset_name": "Dataset001_Blobs", "plans": plans})
    write_json(site.folder / RUN / "federation.json", {"plans": plans})  # stored before the policy became stricter
    with pytest.raises(FederationError, match=rule):
        check(strict, messages.TRAIN, train())


def test_rounds_and_epochs_are_counted_at_the_site_also_repeated_ones_and_over_runs(site: Site) -> None:
    strict = under(site, max_rounds=2, max_rounds_of_all_runs=3, max_epochs=8)
    check(strict, messages.TRAIN, train())
    check(strict, messages.TRAIN, train())
    with pytest.raises(FederationError, match=r"work.max_rounds of its own policy: 3 rounds of this run, at most 2"):
        check(strict, messages.TRAIN, train())
    check(strict, messages.TRAIN, train(run_id=OTHER))
    with pytest.raises(FederationError, match=r"work.max_rounds_of_all_runs"):
        check(strict, messages.TRAIN, train(run_id=OTHER))
    with pytest.raises(FederationError, match=r"work.max_epochs"):
        check(under(site, max_epochs=8), messages.TRAIN, train(epochs=7))
    assert read_json(site.folder / USE_FILE)[RUN]["rounds"] == 2, "what was refused is not counted"


def test_few_labelled_patients_train_no_segmenter(site: Site) -> None:
    check(under(site, min_patients=3), messages.TRAIN, train(phase="harmonizer"))
    with pytest.raises(FederationError, match=r"patients.min_patients") as caught:
        check(under(site, min_patients=3), messages.TRAIN, train())
    assert "2 patients" not in str(caught.value), "how many there are stays at the site"


def test_what_earlier_runs_may_cost_counts_against_max_epsilon(site: Site) -> None:
    strict = under(site, max_epsilon=3.0)
    plans = plans_with(FedHarmSection(kind="none", privacy=PrivacyOptions(epsilon=2.0)))
    write_json(site.folder / RUN / "federation.json", {"plans": plans})
    check(strict, messages.TRAIN, train())
    check(strict, messages.TRAIN, train(round=1))
    request = {"run_id": OTHER, "dataset_name": "Dataset001_Blobs", "plans": plans}
    with pytest.raises(FederationError, match=r"epsilon 2 with what earlier runs may cost is above 3"):
        check(strict, messages.STORE_PLANS, request)
    check(under(site, max_epsilon=4.0), messages.STORE_PLANS, request)
    Ledger(site.folder).record(Release(what="counts", mechanism=GAUSSIAN, noise_multiplier=5.0))
    with pytest.raises(FederationError, match=r"patients.max_epsilon"):
        check(under(site, max_epsilon=4.0), messages.STORE_PLANS, request)


def test_a_run_that_is_resumed_is_not_held_against_itself(site: Site) -> None:
    """Whatever of it stands in the site's own books: its fingerprint and style, which come before a round, and its rounds."""
    strict = under(site, max_epsilon=4.0)
    asked = {"dataset": "1", "check_data": False}
    run_config = {"epsilon": 4.0, "delta": 1e-5}
    for what in ("fingerprint summary", "style of A"):
        Ledger(site.folder).record(Release(what=what, mechanism=GAUSSIAN, noise_multiplier=2.0, run_id=RUN))
    check(strict, messages.PREFLIGHT, {"run_id": RUN, **asked}, run_config)
    plans = plans_with(FedHarmSection(kind="none", privacy=PrivacyOptions(epsilon=4.0)))
    write_json(site.folder / RUN / "federation.json", {"plans": plans})
    check(strict, messages.TRAIN, train())
    check(strict, messages.PREFLIGHT, {"run_id": RUN, **asked}, run_config)
    with pytest.raises(FederationError, match=r"epsilon 4 with what earlier runs may cost is above 4"):
        check(strict, messages.PREFLIGHT, {"run_id": OTHER, **asked}, run_config)


def test_a_run_that_earlier_ones_left_no_room_for_is_refused_before_it_asks_anything(site: Site) -> None:
    asked, config = {"dataset": "1", "check_data": False}, {"epsilon": 4.0, "delta": 1e-5}
    check(site, messages.PREFLIGHT, {"run_id": OTHER, **asked}, config)
    small = Release(what="style of A", mechanism=GAUSSIAN, noise_multiplier=8.0, run_id="earlier")
    Ledger(site.folder).record(small)
    check(site, messages.PREFLIGHT, {"run_id": OTHER, **asked}, config)
    Ledger(site.folder).record(replace(small, what="segmenter training", noise_multiplier=2.0, run_id=RUN))
    check(site, messages.PREFLIGHT, {"run_id": RUN, **asked}, config)
    with pytest.raises(
        PrivacyError, match=r"Site A: .* epsilon 2\.\d* at delta 1e-05 is spent by earlier runs: .* within 4\."
    ):
        check(site, messages.PREFLIGHT, {"run_id": OTHER, **asked}, config)
    check(site, messages.PREFLIGHT, {"run_id": OTHER, **asked}, {"epsilon": 8.0, "delta": 1e-5})


def test_what_a_run_told_before_it_was_given_up_counts_against_max_epsilon(site: Site) -> None:
    """A run that never came to a round is not among those that were trained, but its noisy style has left the site."""
    strict = under(site, max_epsilon=4.0)
    style = Release(what="style of A", mechanism=GAUSSIAN, noise_multiplier=2.0, run_id=RUN)
    Ledger(site.folder).record(style)
    request = {"run_id": OTHER, "dataset": "1", "check_data": False}
    with pytest.raises(FederationError, match=r"patients.max_epsilon"):
        check(strict, messages.PREFLIGHT, request, {"epsilon": 4.0, "delta": 1e-5})


def test_a_site_report_can_be_refused_alone(site: Site) -> None:
    with pytest.raises(FederationError, match=r"work.site_report"):
        enforce(under(site, site_report=False), "report hello request", {"dataset": "1"}, {}, Path("none"))
    enforce(under(site, training=False), "report hello request", {"dataset": "1"}, {}, Path("none"))


def test_metrics_that_may_not_leave_are_dropped() -> None:
    measured = {"train_loss": 1.0, "dice": 0.5, "seconds": 3.0, "epsilon": 1.0, "invented": 2.0}
    assert set(Policy(metrics=("train_loss",)).allowed_metrics(measured)) == {"train_loss", "epsilon"}
    assert set(Policy(metrics=METRICS).allowed_metrics(measured)) == {"train_loss", "dice", "seconds", "epsilon"}


@pytest.mark.parametrize("metrics", [METRICS, ()])
def test_a_site_that_sends_no_seconds_says_in_no_reply_how_long_its_work_took(
    site: Site, monkeypatch: pytest.MonkeyPatch, metrics: tuple[str, ...]
) -> None:
    weights = {"segmenter.w": np.zeros(2, np.float32)}
    trained = Trained(weights, weights, Ownership(), 1, 1, {}, private=False)
    style = Style(quantiles=np.zeros((1, len(QUANTILE_LEVELS))), offset=np.zeros(1), n_cases=2)
    monkeypatch.setattr(answers, "_local_round", lambda site, request: (time.sleep(0.01) or trained, {}))
    monkeypatch.setattr(answers, "_own_every_case", lambda site, name: None)
    monkeypatch.setattr("nnunet_fedharm.planning.preprocess.preprocess_site", lambda *args, **options: time.sleep(0.01))
    monkeypatch.setattr("nnunet_fedharm.planning.style.site_style", lambda *args, **options: style)
    strict = under(site, metrics=metrics)
    asked = train(
        plans_hash="0" * 64, site_dp={}, fp16=False, noise=0.0, styled=True, plans={}, dataset_json={}, fingerprint={}
    )
    for work, schema in ((answers._train, messages.TRAIN_REPLY), (answers._prepare, messages.PREPARE_REPLY)):
        seconds = messages.unpack_reply(schema, work(strict, messages.Unpacked(asked)), source="A").values["seconds"]
        assert (seconds > 0) is bool(metrics)


def test_a_policy_that_names_what_does_not_exist_is_found_by_the_site_itself(tmp_path: Path) -> None:
    path = tmp_path / POLICY_FILE
    with pytest.raises(FederationError, match="does not exist"):
        checked_policy(path, site="A")
    path.write_text("[work]\nharmonizers = ['curv']\n")
    with pytest.raises(FederationError, match=r"names 'curv' in work.harmonizers"):
        checked_policy(path, site="A")
    path.write_text(TEMPLATE)
    assert checked_policy(path, site="A").min_patients == 5


@pytest.mark.slow
def test_the_server_hears_the_rule_and_a_site_keeps_its_metrics(root: Path) -> None:
    config: FederateConfig = tiny(root, segmenter_rounds=1, sites="A,B")
    path = root / "sites" / "B" / "fedharm" / POLICY_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('[work]\nharmonizers = ["curve"]\n')
    sites = real_sites(config, 2)
    with pytest.raises(FederationError, match=r"Site B refuses by the rule work.harmonizers of its own policy: none"):
        run_server(LocalGrid(sites), config)
    path.write_text('[messages]\nmetrics = ["train_loss"]\n')
    run_server(LocalGrid(sites), config)
    events = read_events(root / "server" / "fedharm" / "events.jsonl")[0]
    trained = {event["site"]: set(event["metrics"]) for event in events if event["event"] == "site_trained"}
    assert trained["B"] == {"train_loss"}
    assert {"train_loss", "dice"} <= trained["A"] | {"dice"}
