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

from nnunet_fedharm.federation import messages
from nnunet_fedharm.federation.codec import decode
from nnunet_fedharm.federation.config import FederateConfig
from nnunet_fedharm.federation.deploy.control import operator
from nnunet_fedharm.federation.deploy.server_folder import ServerOptions, init_server
from nnunet_fedharm.federation.launch import app_folder
from nnunet_fedharm.federation.messages import SiteFailure, unpack_reply
from nnunet_fedharm.federation.state import load_state
from nnunet_fedharm.harmonizers import SITE_ROWS
from tests.federation.deploy.real import TINY, RealConsortium, listening
from tests.federation.deploy.recording import http_parts, messages_from_sites
from tests.federation.test_flower import check_results

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

SITES = ("hospital-north", "hospital-south")
RESULTS = "nnUNet_results/Dataset001_Blobs/nnUNetTrainerFedHarmNone__nnUNetFedHarmPlans__2d"
REPLIES = {
    "query.preflight": messages.PREFLIGHT_REPLY,
    "query.summarize": messages.SUMMARIZE_REPLY,
    "query.prepare": messages.PREPARE_REPLY,
    "query.plans": messages.STORE_PLANS_REPLY,
    "train": messages.TRAIN_REPLY,
    "query.finish": messages.FINISH_REPLY,
}
ROWS = {f"harmonizer.{name}" for name in SITE_ROWS}
FLEET = {"activate-node", "deactivate-node", "register-node", "send-node-heartbeat", "pull-messages", "push-messages"}
FLEET |= {"get-run", "get-fab", "push-object", "pull-object", "confirm-message-received", "unregister-node"}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, make_raw_dataset: Callable[..., Path]) -> Iterator[RealConsortium]:
    root = tmp_path_factory.mktemp("real")
    for index, site in enumerate((*SITES, "stranger")):
        raw = root / site / "nnUNet_raw"
        make_raw_dataset(raw, n_labelled=2, site=site, gain=1.0 + index, seed=index, shape=(12, 24, 24))
    made = RealConsortium(root, (*SITES, "stranger"))
    try:
        for site in SITES:
            folder = made.join(site)
            folder.policy_file.write_text("[patients]\nmin_patients = 2\n")
            status, text = made.command(
                "server", "register", str(made.server.path), site, str(folder.node_key.with_suffix(".pub"))
            )
            assert status == 0, text
        made.start("server", "server", "start", str(made.server.path))
        made.wait_for("server", "sites may connect")
        for site in SITES:
            made.start(site, "site", "start", str(root / site))
        yield made
    finally:
        made.close()


def run(real: RealConsortium, *words: str) -> tuple[int, str]:
    command = ("server", "run", str(real.server.path), "-d", "1", "--sites", ",".join(SITES), *TINY, *words)
    return real.command(*command, seconds=600)


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


def test_everything_that_left_a_site_fits_its_schema_and_no_tensor_is_an_image(trained: RealConsortium) -> None:
    known, least = known_tensors(trained)
    seen: set[str] = set()
    for message in messages_from_sites(trained.inside):
        if not message.has_content():
            continue  # Flower's own error, without any content
        seen.add(check_message(message, known, least))
    assert seen >= set(REPLIES), "every kind of message was recorded"


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
    real.wait_for_log("stranger", "not registered", seconds=30)
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


def known_tensors(real: RealConsortium) -> tuple[dict[str, tuple[int, ...]], int]:
    """Names and shapes of the model's tensors, and the number of pixels in a patch."""
    folder = max((path.parent for path in (real.server.results / "fedharm").glob("*/weights*")), default=None)
    assert folder is not None
    state, weights = load_state(folder)
    assert weights is not None
    patch = state.plans["configurations"]["2d"]["patch_size"]
    return {name: value.shape for name, value in weights.items()}, patch[0] * patch[1]


def check_message(message: Message, known: dict[str, tuple[int, ...]], least: int) -> str:
    """Hold one message from a site against its schema; returns its kind."""
    kind = message.metadata.message_type
    content = message.content
    assert set(content.config_records) == {"config"}
    assert not content.metric_records
    assert set(content.array_records) <= {"weights"}
    try:
        read = unpack_reply(REPLIES[kind], content, source="a site")
    except SiteFailure:
        assert set(content.config_records["config"]) == {"status", "kind", "text"}
        assert not content.array_records
        return kind
    arrays = decode(read.weights, source="a site")
    for name, value in arrays.items():
        own_row = (1, *known[name][1:]) if name in ROWS else None
        assert value.shape in (known[name], own_row), f"{name}: tensors of the model and the site's own rows only"
    assert longest_list(read.values) < least, "no list of numbers as long as a patch"
    assert "case0" not in json.dumps(read.values), "no case identifier"
    return kind


def longest_list(value: Any) -> int:
    """Length of the longest list anywhere in a message."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    own = len(value) if isinstance(value, list | dict) else 0
    return max([own, *map(longest_list, inner)])
