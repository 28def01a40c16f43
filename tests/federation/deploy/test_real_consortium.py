"""The real thing over TLS with node keys: who is refused, what goes over the wire, what a run leaves behind.

One SuperLink and two SuperNodes serve the tests of this file. Each test asks for what it looks at (`real`, `trained`),
so that any of them runs alone, on any test process.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.fab_pb2 import Fab

from nnunet_fedharm.differences.findings import Findings
from nnunet_fedharm.differences.findings_file import from_json
from nnunet_fedharm.federation.config import FederateConfig
from nnunet_fedharm.federation.daemon import app_folder
from nnunet_fedharm.federation.deploy.control import operator
from nnunet_fedharm.federation.deploy.server_folder import ServerOptions, init_server
from nnunet_fedharm.federation.deploy.site_folder import SiteFolder
from nnunet_fedharm.federation.events import EVENTS_FILE, read_events
from tests.federation.deploy.real import TINY, RealConsortium, listening
from tests.federation.deploy.recording import http_parts, messages_from_sites
from tests.federation.deploy.wire import FLEET, REPLIES, REPORT_REPLIES, Allowed, allowed, check_message
from tests.federation.test_flower import check_results

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

SITES = ("hospital-north", "hospital-south")
RESULTS = "nnUNet_results/Dataset001_Blobs/nnUNetTrainerFedHarmNone__nnUNetFedHarmPlans__2d"


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, make_raw_dataset: Callable[..., Path]) -> Iterator[RealConsortium]:
    root = tmp_path_factory.mktemp("real")
    for index, site in enumerate((*SITES, "stranger")):
        raw = root / site / "nnUNet_raw"
        make_raw_dataset(raw, n_labelled=4, site=site, gain=1.0 + index, seed=index, shape=(12, 24, 24))
    made = RealConsortium(root, (*SITES, "stranger"))
    try:
        for site in SITES:
            made.admit(site)
        made.open(SITES)
        yield made
    finally:
        made.close()


def run(real: RealConsortium, *words: str) -> tuple[int, str]:
    command = ("server", "run", str(real.server.path), "-d", "1", "--sites", ",".join(SITES), *TINY, *words)
    return real.command(*command, seconds=600)


def events_of(real: RealConsortium, name: str) -> list[dict[str, Any]]:
    return [event for event in read_events(real.server.results / "fedharm" / EVENTS_FILE)[0] if event["event"] == name]


@pytest.fixture(scope="module")
def trained(real: RealConsortium) -> RealConsortium:
    """The consortium after one training of one round."""
    status, text = run(real, "--segmenter-rounds", "1")
    assert status == 0, text
    assert "segmenter round 1/1 done" in text
    return real


def test_a_training_over_tls_with_node_keys_leaves_standard_results_everywhere(trained: RealConsortium) -> None:
    for home in (trained.server.results, *(trained.root / site for site in SITES)):
        check_results(home / RESULTS)
    for log in trained.server.logs.iterdir():
        assert "case0" not in log.read_text(errors="replace"), "no case identifier in the server's logs"


def test_a_site_opens_no_port_but_on_loopback(trained: RealConsortium) -> None:
    for site in SITES:
        sockets = listening(trained.processes[site].pid)
        assert sockets, "the SuperNode's own door"
        assert {address for address, _ in sockets} == {"0100007F"}, sockets


def messages_of_sites(real: RealConsortium) -> list[Message]:
    """All that were recorded, but Flower's own errors, which have no content."""
    return [message for message in messages_from_sites(real.inside) if message.has_content()]


def allowed_by(real: RealConsortium) -> Allowed:
    return allowed(real.server.results / "fedharm", [real.root / site for site in SITES])


def test_everything_that_left_a_site_fits_its_schema_and_no_tensor_is_an_image(trained: RealConsortium) -> None:
    sent = messages_of_sites(trained)
    allows = allowed_by(trained)
    assert {check_message(message, allows) for message in sent} >= set(REPLIES), "every kind of message was recorded"


def test_no_other_request_than_flowers_own_left_a_site(trained: RealConsortium) -> None:
    asked = {line.split()[1] for sent in trained.inside.sent for line, _ in http_parts(bytes(sent))}
    assert asked
    assert {path.removeprefix("/v1/fleet/") for path in asked} <= FLEET


def test_the_network_sees_neither_tensors_nor_names(trained: RealConsortium) -> None:
    plain = b"".join(map(bytes, [*trained.inside.sent, *trained.inside.received]))
    wire = b"".join(map(bytes, [*trained.network.sent, *trained.network.received]))
    assert len(wire) > len(plain) > 100_000
    for word in (*SITES, "\x93NUMPY", "segmenter.", "Dataset001_Blobs", "/v1/fleet/", "train_loss", "plans_hash"):
        data = word.encode("latin-1")
        assert data in plain, f"{word} went by"
        assert data not in wire, f"{word} was readable"


@pytest.mark.long
def test_a_run_that_a_policy_forbids_ends_with_the_rule_at_the_server(real: RealConsortium) -> None:
    policy = real.root / SITES[0] / "fedharm" / "policy.toml"
    former = policy.read_text()
    policy.write_text('[work]\nharmonizers = ["curve"]\n')
    status, text = run(real)
    policy.write_text(former)
    assert status == 2
    assert (
        "Site hospital-north refuses by the rule work.harmonizers of its own policy: none is not among curve." in text
    )


@pytest.mark.long
def test_no_image_leaves_a_site_under_a_learned_harmonizer(real: RealConsortium) -> None:
    """The other kinds, noise and secure sums are looked at message by message in `tests/federation/test_wire.py`."""
    before = len(messages_of_sites(real))
    words = ("--harmonizer", "polarity", "--reference", SITES[0], "--harmonizer-rounds", "1", "--segmenter-rounds", "1")
    status, text = run(real, *words)
    assert status == 0, text
    assert "harmonizer round 1/1 done" in text
    sent, allows = messages_of_sites(real), allowed_by(real)
    assert len(sent) - before >= 2 * 7, "two rounds and five other messages at each site"
    assert any("harmonizer.polarity_judge." in name for name in allows.shapes)
    for message in sent:
        check_message(message, allows)


@pytest.mark.long
def test_a_site_report_over_the_deployment_is_at_the_server_and_at_every_site(real: RealConsortium) -> None:
    words = (
        "--sites",
        ",".join(SITES),
        "--min-patients",
        "2",
        "--scales",
        "raw",
        "--simulations",
        "0",
        "--bootstrap",
        "0",
    )
    status, text = real.command("server", "report", str(real.server.path), "-d", "1", *words, seconds=900)
    assert status == 0, text
    assert "Make the page: nnunet-fedharm sites report --findings" in text
    assert "case0" not in text
    (path,) = (real.server.results / "fedharm" / "site-report").glob("*/report.json")
    findings = from_json(Findings, json.loads(path.read_text()))
    assert {card.site: card.n_patients for card in findings.sites} == dict.fromkeys(SITES, 4)
    part = next(part for part in findings.variants[0].parts if part.region == "foreground")
    mean = next(feature for feature in part.features if feature.name == "firstorder_Mean")
    assert mean.medians[SITES[0]] < mean.medians[SITES[1]], "the sites' gains are 1 and 2"
    assert part.classifiers, "two folds of two patients each"
    for site in SITES:
        (kept,) = (real.root / site / "fedharm" / "site-report").glob("*/report.json")
        assert f"{site}case000" in (kept.parent / "features.csv").read_text()
    sent = [one for one in messages_of_sites(real) if one.metadata.message_type in REPORT_REPLIES]
    allows = allowed_by(real)
    assert {check_message(message, allows) for message in sent} == set(REPORT_REPLIES)


@pytest.mark.long
def test_a_site_that_is_removed_in_a_run_stays_out_until_it_has_another_key(real: RealConsortium) -> None:
    stays, away = SITES
    study, key = str(real.server.path), str(SiteFolder(real.root / away).node_key.with_suffix(".pub"))
    options = ("--segmenter-rounds", "3", "--quorum", "1", "--seed", "1")
    real.start("run", "server", "run", study, "-d", "1", "--sites", ",".join(SITES), *TINY, *options)
    real.wait_for("run", "segmenter round 1/3 done", seconds=600)
    assert real.command("server", "remove", study, away) == (0, f"{away} is shut out.\n")

    # The run goes on without it, and says so.
    assert real.processes["run"].wait(600) == 0, real.output("run")
    rounds = [event["sites"] for event in events_of(real, "round_end") if event["round"] in (1, 3)][-2:]
    assert rounds == [[stays, away], [stays]]
    assert events_of(real, "finished")[-1]["sites_without_model"] == [away]

    # The site says why and stops trying.
    assert real.processes[away].wait(180) == 2, real.output(away)
    assert f"The coordinator has removed {away}, or replaced its key" in real.output(away)

    # Its key stays out, whatever the coordinator or the site does.
    status, text = real.command("server", "register", study, away, key, "--replace")
    assert status == 2
    assert "was shut out before, and such a key is never let in again" in text
    lets_in = "SuperNode ID"
    log = real.root / away / "fedharm" / "logs" / "supernode.log"
    entered = log.read_text(errors="replace").count(lets_in)
    real.start(away, "site", "start", str(real.root / away))
    real.wait_for(away, f"The server does not let {away} in. Either")
    assert real.end(away) == 0
    assert log.read_text(errors="replace").count(lets_in) == entered

    # Another key lets it in again.
    file = str(real.server.consortium_file)
    status, text = real.command("site", "join", file, "--site", away, "--site-root", str(real.root / away), "--new-key")
    assert status == 0, text
    assert real.command("server", "register", study, away, key, "--replace") == (0, f"{away} is registered.\n")
    real.start(away, "site", "start", str(real.root / away))
    real.wait_for_count(log, lets_in, entered + 1)
    with operator(real.server) as connection:
        assert {node.site: node.status for node in connection.nodes()} == dict.fromkeys(SITES, "online")


def test_an_app_that_the_coordinator_did_not_sign_runs_nowhere(real: RealConsortium, tmp_path: Path) -> None:
    from flwr.cli.build import build_fab_from_disk

    shutil.copytree(app_folder(), tmp_path / "app")
    file = tmp_path / "app" / "pyproject.toml"
    file.write_text(file.read_text().replace("federation.client_app:app", "federation.stolen:app"))
    config = FederateConfig(
        server_root=str(tmp_path / "elsewhere"), dataset="1", sites=",".join(SITES), join_wait_s=3.0
    )
    from flwr.common.serde import user_config_to_proto

    with operator(real.server) as connection:
        request = StartRunRequest(
            fab=Fab(content=build_fab_from_disk(tmp_path / "app")),
            override_config=user_config_to_proto(config.to_run_config()),
        )
        connection.client.StartRun(request)
    real.wait_for_log(SITES[0], "could not be verified")
    real.wait_for_log(SITES[1], "could not be verified")
    with operator(real.server) as connection:
        for number in connection.active_runs():
            connection.stop_run(number)


def test_an_unregistered_key_and_a_false_server_are_refused(real: RealConsortium, tmp_path: Path) -> None:
    stranger = real.join("stranger")
    real.start("stranger", "site", "start", str(stranger.root))
    real.wait_for_log("stranger", "not registered")
    status, text = real.command("server", "sites", str(real.server.path))
    assert status == 0
    assert f"{'stranger':<24} not registered" in text
    if real.processes["stranger"].poll() is None:
        real.end("stranger")
    other = init_server(tmp_path / "other", ServerOptions(name="Other", hosts=["localhost"], sites=SITES))
    real.join("stranger", authority=other)
    for action in ("check", "start"):
        status, text = real.command("site", action, str(stranger.root))
        assert status == 2
        assert "is not this consortium's server" in text


def test_server_and_sites_end_cleanly_on_signals(real: RealConsortium) -> None:
    pid = real.processes["server"].pid
    assert real.end(SITES[0], signal.SIGTERM) == 0
    assert real.end(SITES[1], signal.SIGINT) == 0
    assert real.end("server", signal.SIGTERM) == 0
    assert listening(pid) == []
