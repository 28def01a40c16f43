"""A site whose own policy makes its training private, among sites and in runs that ask for nothing of the kind."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict

from nnunet_fedharm.errors import FederationError
from nnunet_fedharm.evaluation.audit.model import read_claim
from nnunet_fedharm.federation.answers import answer
from nnunet_fedharm.federation.config import FederateConfig
from nnunet_fedharm.federation.durable import read_json
from nnunet_fedharm.federation.entries import FACTS
from nnunet_fedharm.federation.events import read_events
from nnunet_fedharm.federation.messages import PREFLIGHT, SUMMARIZE, TRAIN, json_hash, pack, unpack
from nnunet_fedharm.federation.own_privacy import OWN_FILE
from nnunet_fedharm.federation.policy import POLICY_FILE
from nnunet_fedharm.federation.policy_checks import USE_FILE
from nnunet_fedharm.federation.server_app import run_server
from nnunet_fedharm.federation.state import find_run, load_state
from nnunet_fedharm.privacy.accounting import epsilon_of
from nnunet_fedharm.privacy.ledger import Ledger
from nnunet_fedharm.privacy.options import PRIVACY_FILE
from nnunet_fedharm.privacy.releases import GAUSSIAN, Release
from nnunet_fedharm.privacy.shared_steps import SharedSteps
from nnunet_fedharm.study.model_card import model_card
from nnunet_fedharm.study.model_facts import read_card_facts
from tests.federation.local_grid import Client, LocalGrid
from tests.federation.test_in_process import PowerCut, cut_at, full, real_sites, tiny
from tests.federation.test_private_rounds import listening, site_card, site_model

EPSILON, DELTA = 6.0, 1e-3
RULES = {"private_epsilon": EPSILON, "delta": DELTA, "private_patients_per_step": 2.0, "private_clip": 0.5}
RUN: dict[str, Any] = {"harmonizer": "polarity", "reference": "A", "harmonizer_rounds": 1}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, make_consortium: Callable[..., Path]) -> Path:
    return make_consortium(tmp_path_factory.mktemp("template"), {"A": (2, 0), "B": (3, 0), "C": (2, 0)})


@pytest.fixture
def root(tmp_path: Path, template: Path) -> Path:
    shutil.copytree(template, tmp_path / "consortium")
    return tmp_path / "consortium"


def keep_private(root: Path, site: str = "B", **rules: Any) -> None:
    path = root / "sites" / site / "fedharm" / POLICY_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[patients]\n" + "".join(f"{name} = {value}\n" for name, value in {**RULES, **rules}.items()))


def ledger(root: Path, site: str = "B") -> Ledger:
    return Ledger(root / "sites" / site / "fedharm")


def run_folder(config: FederateConfig) -> Path:
    folder = find_run(Path(config.root) / "server" / "fedharm", full(config).fingerprint())
    assert folder is not None
    return folder


def heard_at(clients: dict[int, Client]) -> tuple[LocalGrid, list[dict[str, Any]]]:
    heard: list[dict[str, Any]] = []
    return LocalGrid({node: listening(client, heard) for node, client in clients.items()}), heard


@pytest.mark.slow
@pytest.mark.parametrize("secure", ["off", "segmenter"])
def test_one_site_trains_privately_by_its_policy_and_the_others_as_the_run_says(root: Path, secure: str) -> None:
    keep_private(root)
    config = tiny(root, **RUN, secure_aggregation=secure)
    grid, heard = heard_at(real_sites(config, 3))
    run_server(grid, config)
    state, _ = load_state(run_folder(config))
    metrics = {
        (reply["site"], reply["phase"]): set(json.loads(reply["metrics"])) for reply in heard if "metrics" in reply
    }
    assert metrics["B", "harmonizer"] == {"epsilon"}
    assert "train_loss" in metrics["A", "harmonizer"]
    if secure == "off":
        assert metrics["B", "segmenter"] == {"epsilon"}
        assert {"train_loss", "dice"} <= metrics["A", "segmenter"]
        told = [json.loads(reply["metrics"])["epsilon"] for reply in heard if reply["site"] == "B"]
        assert told == sorted(told)
        assert told[-1] == pytest.approx(ledger(root).spent(DELTA).epsilon), "as its ledger has it"
        assert {reply["seconds"] for reply in heard if reply["site"] == "B"} == {0.0}
    assert {reply["plans_hash"] for reply in heard if "plans_hash" in reply} == {json_hash(state.plans)}

    releases = ledger(root).releases()
    steps: Counter[str] = Counter()
    for release in releases:
        steps[release.what] += release.steps if release.bounded else 0
    once = {"fingerprint summary": 1, "style of B": 1, "votes on polarity": 1}
    assert +steps == {**once, "segmenter training": config.segmenter_rounds}
    assert {release.what for release in releases if not release.bounded} == {FACTS}
    spent = epsilon_of([release.noise for release in releases if release.bounded], DELTA)
    assert 0.5 * EPSILON < spent <= EPSILON, "noise was made for this run, not for any"
    for site in "AC":
        others = ledger(root, site)
        assert others.spent(DELTA).unbounded
        assert not [entry for entry in others.releases() if entry.bounded]


@pytest.mark.slow
def test_cards_at_server_and_sites_say_whose_patients_are_promised_what(root: Path) -> None:
    keep_private(root)
    config = tiny(root, segmenter_rounds=1)
    results = run_server(LocalGrid(real_sites(config, 3)), config)
    events = read_events(root / "server" / "fedharm" / "events.jsonl")[0]
    assert [event["sites"] for event in events if event["event"] == "private_by_own_policy"] == [
        {"B": {"epsilon": EPSILON, "delta": DELTA}}
    ]
    said = json.loads((results / PRIVACY_FILE).read_text())
    assert set(said) == {"own_policy"}, "the run promises nothing to all patients"
    assert said["own_policy"]["sites"] == {"B": {"epsilon": EPSILON, "delta": DELTA}}
    assert site_card(root, "A") == said
    card = site_card(root, "B")["own_policy"]["sites"]["B"]
    assert card["epsilon"] == pytest.approx(ledger(root).spent(DELTA).epsilon)
    assert (card["unit"], card["clip"], card["without_noise"]) == ("patient", 0.5, [])
    assert card["promised"] == {"epsilon": EPSILON, "delta": DELTA}
    for model, epsilon in ((results.parent, EPSILON), (site_model(root, "B"), card["epsilon"])):
        facts = read_card_facts(model, folds=("all",), checkpoint="checkpoint_final.pth")
        (shown,) = facts.privacy
        assert (shown.unit, shown.site, shown.epsilon) == ("patient", "B", pytest.approx(epsilon))
        assert "unit: patient of site B alone" in model_card(facts)
        assert "of another site than B has no bound" in model_card(facts)
        assert read_claim(model / "fold_all") is None, "an audit of all patients has no claim to hold against"
    plans = json.loads((site_model(root, "B") / "plans.json").read_text())
    assert plans["configurations"]["2d"]["fedharm"]["privacy"]["epsilon"] == EPSILON
    assert "privacy" not in json.loads((results.parent / "plans.json").read_text())["configurations"]["2d"]["fedharm"]
    assert not [entry for entry in ledger(root).releases() if "style" in entry.what], "plain nnU-Net reads none"


@pytest.mark.slow
def test_a_run_without_privacy_takes_the_promise_of_a_former_one_away_with_its_first_checkpoint(root: Path) -> None:
    private = tiny(root, segmenter_rounds=1, epsilon=6.0, delta=DELTA)
    results = run_server(LocalGrid(real_sites(private, 3)), private)
    assert (results / PRIVACY_FILE).is_file()
    stopped(tiny(root))
    assert (results / "checkpoint_latest.pth").stat().st_mtime > (results / "checkpoint_final.pth").stat().st_mtime
    assert not (results / PRIVACY_FILE).exists()


def stopped(config: FederateConfig) -> tuple[dict[int, Client], RecordDict]:
    """A run whose server ends in round 2: its clients, and what B was asked in round 1."""
    clients, asked = real_sites(config, 3), []

    def keeping(message: Message) -> Message | None:
        if message.metadata.message_type == "train":
            asked.append(message.content)
        return clients[101](message)

    with pytest.raises(PowerCut):
        run_server(LocalGrid({**clients, 100: cut_at(clients[100], ("segmenter", 1)), 101: keeping}), config)
    return clients, asked[0]


def refused(config: FederateConfig, kind: str, content: RecordDict) -> str:
    """Why B refuses a message of the run."""
    reply = answer(kind, content, {"partition-id": 1}, config.to_run_config()).config_records["config"]
    assert reply["status"] == "error"
    return str(reply["text"])


@pytest.mark.slow
def test_a_resumed_run_keeps_the_options_that_it_began_with(root: Path) -> None:
    keep_private(root)
    config = tiny(root)
    clients, question = stopped(config)
    run_id = run_folder(config).name
    hello = pack(PREFLIGHT, {"run_id": run_id, "dataset": "1", "check_data": False})
    noise = {entry.noise_multiplier for entry in ledger(root).releases() if entry.what == "segmenter training"}
    before = ledger(root).releases()
    for changed in (
        {"private_epsilon": 3.0},
        {"private_epsilon": 60.0},
        {"private_clip": 1.0},
        {"private_epsilon": 0.0},
    ):
        keep_private(root, **changed)
        for kind, content in (("query.preflight", hello), ("train", question)):
            assert re.search(
                r"Site B refuses by the rule patients\.private_epsilon of its own policy: it was epsilon 6 .*put it back",
                refused(config, kind, content),
            )
    assert ledger(root).releases() == before
    keep_private(root)
    run_server(LocalGrid(clients), config)
    steps = [entry for entry in ledger(root).releases() if entry.what == "segmenter training"]
    assert {entry.noise_multiplier for entry in steps} == noise
    assert sum(entry.steps for entry in steps) == config.segmenter_rounds
    assert ledger(root).spent(DELTA).epsilon <= EPSILON
    use = read_json(root / "sites" / "B" / "fedharm" / USE_FILE)[run_id]
    assert use["epsilon"] == EPSILON, "what the run may cost counts against max_epsilon"


@pytest.mark.slow
def test_no_word_of_a_request_switches_the_sites_own_noise_off(root: Path) -> None:
    keep_private(root)
    config = tiny(root)
    _, question = stopped(config)
    said = SharedSteps(noise=5.0, sample_rate=1.0, rounds=9, delta=DELTA, least=3, colluding=0).to_dict()
    asked = unpack(TRAIN, question, source="the server").values | {"shared_steps": said}
    content = pack(TRAIN, asked, question.array_records["weights"])
    told = answer("train", content, {"partition-id": 1}, config.to_run_config()).config_records["config"]
    assert set(json.loads(str(told["metrics"]))) == {"epsilon"}
    assert "Noise is shared in rounds of one private step" in refused(config, "train.secure", content)
    assert ledger(root).spent(DELTA).unbounded == ()


def test_a_sites_own_noise_is_not_cut_into_shares_that_nobody_completes(root: Path) -> None:
    keep_private(root)
    config = tiny(root)
    run: dict[str, Any] = {"run_id": f"{0:012}-{0:06}"}
    hello = pack(PREFLIGHT, {**run, "dataset": "1", "check_data": False})
    values = {**run, "dataset_name": "Dataset001_Blobs", "epsilon": 0.0, "delta": DELTA, "noise": 0.0}
    question = pack(SUMMARIZE, {**values, "summed_over": 100, "colluding": 0})
    for kind, content in (("query.preflight", hello), ("query.summarize", question)):
        told = answer(kind, content, {"partition-id": 1}, full(config).to_run_config()).config_records["config"]
        assert told["status"] == "ok", told
    (release,) = (entry for entry in ledger(root).releases() if entry.bounded)
    assert (release.what, release.noise_alone) == ("fingerprint summary", 0.0)
    assert not (root / "sites" / "B" / "fedharm" / "secure-sums").exists(), "nothing is offered to a sum"


@pytest.mark.slow
def test_privacy_cannot_be_switched_on_within_a_run_that_has_told_of_patients_without_noise(root: Path) -> None:
    config = tiny(root)
    _, question = stopped(config)
    keep_private(root)
    why = refused(config, "train", question)
    assert re.search(r"Site B refuses .*it was off when this run began.* --restart", why)


def test_a_run_that_earlier_ones_left_no_room_for_is_refused_at_the_start(root: Path) -> None:
    keep_private(root)
    ledger(root).record(Release(what="segmenter training", mechanism=GAUSSIAN, noise_multiplier=0.7, run_id="earlier"))
    before = ledger(root).releases()
    config = tiny(root)
    with pytest.raises(FederationError, match=r"Site B: .* is spent by earlier runs.*raise patients\.private_epsilon"):
        run_server(LocalGrid(real_sites(config, 3)), config)
    assert ledger(root).releases() == before


def test_max_epsilon_holds_for_what_the_policy_itself_switches_on(root: Path) -> None:
    keep_private(root, max_epsilon=4.0)
    config = tiny(root)
    with pytest.raises(FederationError, match=r"Site B refuses by the rule patients\.max_epsilon"):
        run_server(LocalGrid(real_sites(config, 3)), config)


@pytest.mark.parametrize("asked", [{"epsilon": 8.0, "delta": DELTA}, {"epsilon": 4.0, "delta": 2 * DELTA}])
def test_a_private_run_that_is_weaker_than_the_policy_is_refused(root: Path, asked: dict[str, float]) -> None:
    keep_private(root)
    config = tiny(root, **asked)
    with pytest.raises(
        FederationError, match=r"Site B refuses by the rule patients\.private_epsilon .*at most epsilon 6"
    ):
        run_server(LocalGrid(real_sites(config, 3)), config)


@pytest.mark.slow
def test_a_private_run_that_is_stricter_than_the_policy_is_trained_as_it_says(root: Path) -> None:
    keep_private(root, require_privacy="true")
    config = tiny(root, segmenter_rounds=1, epsilon=4.0, delta=DELTA, patients_per_step=3.0)
    results = run_server(LocalGrid(real_sites(config, 3)), config)
    assert set(json.loads((results / PRIVACY_FILE).read_text())) == {"patient_level"}
    assert ledger(root).spent(DELTA).epsilon <= 4.0
    assert not list((root / "sites" / "B" / "fedharm").glob(f"*/{OWN_FILE}"))
    bare = tiny(root, segmenter_rounds=1, epsilon=18.0, delta=DELTA, fingerprint_noise=0.0)
    keep_private(root, private_epsilon=20.0)
    with pytest.raises(
        FederationError, match=r"Site B .* patients\.private_epsilon .* asks for statistics without noise"
    ):
        run_server(LocalGrid(real_sites(bare, 3)), bare)


@pytest.mark.slow
def test_a_site_that_insists_on_privacy_takes_part_with_its_own_where_every_site_is_private(root: Path) -> None:
    for site in "ABC":
        keep_private(root, site, require_privacy="true")
    config = tiny(root, segmenter_rounds=1, strategy="scaffold", local_epochs=2)
    results = run_server(LocalGrid(real_sites(config, 3)), config)
    assert set(json.loads((results / PRIVACY_FILE).read_text())["own_policy"]["sites"]) == set("ABC")
    for site in "ABC":
        assert ledger(root, site).spent(DELTA).unbounded == ()
        assert ledger(root, site).spent(DELTA).epsilon <= EPSILON
    _, weights = load_state(run_folder(config))
    assert weights is not None
    assert all(np.isfinite(value).all() for value in weights.values())
