"""What leaves a site, for every kind of harmonizer, with noise and in secure sums: serialised as Flower does it, and read again.

The consortium of `deploy/test_real_consortium.py` records a real network; here the real client app's messages are looked at one
by one, which takes seconds instead of minutes for a run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from nnunet_fedharm.federation.codec import bundle, decode, encode
from nnunet_fedharm.federation.report.server import run_site_report
from nnunet_fedharm.federation.server_app import run_server
from tests.federation.deploy.wire import (
    REPLIES,
    REPORT_REPLIES,
    SECURE_REPLIES,
    Allowed,
    allowed,
    check_message,
    check_private,
    volume,
)
from tests.federation.local_grid import Client, LocalGrid
from tests.federation.measured import report_config, report_sites
from tests.federation.test_in_process import real_sites, tiny

pytestmark = pytest.mark.slow

SITES = {"A": (3, 0), "B": (2, 0), "C": (2, 1)}
KINDS: dict[str, dict[str, Any]] = {
    "curve": {},
    "polarity": {},
    "cyclegan": {"width": 4, "discriminator_width": 8, "dilations": [1, 2], "train_everywhere": True},
    "diffusion": {"width": 4, "judge_width": 8},
}
PRIVATE: dict[str, Any] = {"epsilon": 6.0, "delta": 1e-3, "patients_per_step": 2.0}
SUMS: dict[str, Any] = {"secure_aggregation": "all"}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, make_consortium: Callable[..., Path]) -> Path:
    return make_consortium(tmp_path_factory.mktemp("template"), SITES)


@pytest.fixture
def consortium(tmp_path: Path, template: Path) -> Path:
    shutil.copytree(template, tmp_path / "consortium")
    return tmp_path / "consortium"


def travelled(message: Message) -> Message:
    """A message as it is after its way: taken into the pieces that Flower pushes, and put together from their bytes."""
    pieces = {name: part.deflate() for name, part in get_all_nested_objects(message).items()}
    found = inflate_object_from_contents(message.object_id, pieces)
    assert isinstance(found, Message)
    return found


def on_the_wire(clients: dict[int, Client], seen: list[Message]) -> dict[int, Client]:
    """The clients, whose answers travel as bytes and are kept."""

    def sending(client: Client) -> Client:
        def send(message: Message) -> Message | None:
            answer = client(message)
            assert answer is not None
            assert answer.has_content(), "the client app answers itself, with a sentence"
            seen.append(travelled(answer))
            return seen[-1]

        return send

    return {node: sending(client) for node, client in clients.items()}


def train(root: Path, **options: Any) -> tuple[list[Message], Allowed]:
    """Every message of a run, and what it allows."""
    config = tiny(root, segmenter_rounds=1, **options)
    seen: list[Message] = []
    run_server(LocalGrid(on_the_wire(real_sites(config, len(SITES)), seen)), config)
    return seen, allowed_in(root)


def allowed_in(root: Path, sites: Iterable[str] = SITES) -> Allowed:
    return allowed(root / "server" / "fedharm", [root / "sites" / site for site in sites])


def learned(kind: str) -> dict[str, Any]:
    options = {"harmonizer_options": json.dumps(KINDS[kind])} if KINDS[kind] else {}
    reference = {} if kind == "curve" else {"reference": "A"}
    return {"harmonizer": kind, "harmonizer_rounds": 1, **options, **reference}


@pytest.mark.parametrize("kind", list(KINDS))
def test_no_image_leaves_a_site_under_a_learned_harmonizer(consortium: Path, kind: str) -> None:
    seen, allows = train(consortium, **learned(kind))
    assert {check_message(message, allows) for message in seen} == set(REPLIES)
    sent = {name for message in seen for name in arrays_of(message)}
    assert any(name.startswith("harmonizer.") for name in sent), "the harmonizer was trained"
    assert any(name.startswith("segmenter.") for name in sent)


def test_a_private_run_sends_no_image_and_no_number_beside_its_noise(consortium: Path) -> None:
    seen, allows = train(consortium, harmonizer="nyul", reference="A", **PRIVATE)
    assert {check_message(message, allows) for message in seen} == set(REPLIES)
    for message in seen:
        check_private(message)


def test_a_site_report_measured_from_images_sends_counts_and_sums(
    tmp_path: Path, make_consortium: Callable[..., Path]
) -> None:
    patients = dict.fromkeys("AB", (4, 0))  # two folds of two, else nobody is classified
    consortium = make_consortium(tmp_path, patients)
    options = {"min_patients": 2, "scales": "raw", "regions": "foreground", "simulations": 0, "bootstrap": 0}
    config = report_config(consortium, **options)
    seen: list[Message] = []
    run_site_report(LocalGrid(on_the_wire(report_sites(config, len(patients)), seen)), config)
    allows = allowed_in(consortium, patients)
    assert {check_message(message, allows) for message in seen} == set(REPORT_REPLIES)


def arrays_of(message: Message) -> dict[str, Any]:
    record = message.content.array_records.get("weights")
    return {} if record is None else decode(record, source="a site", also=("float64",))


@dataclass(frozen=True)
class Sent:
    """What a run in secure sums sent.

    Attributes:
        seen: every message.
        messages: one of each kind.
        allows: what the run allows.
        slices: of an image of site A, as nibabel, SimpleITK and nnU-Net's preprocessed files have it.
    """

    seen: list[Message]
    messages: dict[str, Message]
    allows: Allowed
    slices: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory, template: Path) -> Sent:
    root = tmp_path_factory.mktemp("sent") / "consortium"
    shutil.copytree(template, root)
    seen, allows = train(root, **SUMS)
    home = root / "sites" / "A"
    (raw,) = home.glob("nnUNet_raw/*/imagesTr/Acase000_0000.nii.gz")
    (preprocessed,) = home.glob("nnUNet_preprocessed/*/*_2d/Acase000.b2nd")
    image = volume(raw)
    slices = {"nibabel": image[6], "SimpleITK": image.T[6], "nnU-Net": volume(preprocessed)[0, 6]}
    return Sent(seen, {message.metadata.message_type: message for message in seen}, allows, slices)


def test_a_run_in_secure_sums_sends_masked_bytes_and_own_rows_only(sent: Sent) -> None:
    """With noise, and the fingerprint in the sum too: `test_private_messages.py`."""
    kinds = {check_message(message, sent.allows) for message in sent.seen}
    assert kinds == (set(REPLIES) - {"train"}) | set(SECURE_REPLIES)


def leaking(message: Message, *, arrays: dict[str, Any] | None = None, **values: Any) -> Message:
    """The message with other arrays or values, as a broken or hostile client app would send it."""
    made = travelled(message)
    for key, value in values.items():
        made.content.config_records["config"][key] = value
    if arrays is not None:
        made.content["weights"] = bundle(encode(arrays))
    return travelled(made)


def test_a_reply_that_leaks_is_found(sent: Sent) -> None:
    allows, image = sent.allows, sent.slices["nibabel"]
    prepare, train_reply = sent.messages["query.prepare"], sent.messages["train.secure"]
    check_message(leaking(prepare), allows)
    style = json.loads(str(prepare.content.config_records["config"]["style"]))
    hidden = json.dumps({**style, "quantiles": image[3].tolist()}, separators=(",", ":"))
    long = json.dumps({**style, "quantiles": list(range(allows.pixels))})
    for message, words in (
        (leaking(train_reply, arrays={"image": image}), "a piece of an image"),
        (leaking(train_reply, arrays={"image": image * 0.37}), "tensors of the model"),
        (leaking(train_reply, arrays={"image": image.astype(np.uint8)}), "tensors of the model"),
        (leaking(prepare, style=hidden), "a piece of an image"),
        (leaking(prepare, style=long), "no list of numbers as long as a patch"),
        (leaking(prepare, style=json.dumps({**style, "Acase000": 1})), "no case identifier"),
    ):
        with pytest.raises(AssertionError, match=words):
            check_message(message, allows)


@pytest.mark.parametrize("source", ["nibabel", "SimpleITK", "nnU-Net"])
def test_an_image_in_the_shape_of_a_tensor_is_found_at_any_byte(sent: Sent, source: str) -> None:
    image = sent.slices[source]
    shapes = [(name, shape) for name, found in sorted(sent.allows.shapes.items()) for shape in found]
    name, shape = next(one for one in shapes if np.prod(one[1]) > image.size)
    for kind in (np.float32, np.float16):
        disguised = np.ascontiguousarray(np.resize(image, shape).astype(kind))
        message = travelled(sent.messages["train.secure"])
        message.content["weights"] = bundle(ArrayRecord({name: Array(disguised)}))
        with pytest.raises(AssertionError, match="a piece of an image"):
            check_message(travelled(message), sent.allows)


def test_an_update_without_its_mask_is_found(sent: Sent) -> None:
    allows, masked = sent.allows, sent.messages["query.secure_mask"]
    (value,) = arrays_of(masked).values()
    check_message(masked, allows)
    update = np.random.default_rng(0).normal(0, 1e-3, value.size // 5)
    plain = (update * 2**30).astype(np.int64).view(np.uint8).reshape(-1, 8)[:, :5].reshape(-1)
    with pytest.raises(AssertionError, match="not masked"):
        check_message(leaking(masked, arrays={"masked": plain}), allows)


def test_a_private_run_that_tells_its_loss_is_found(sent: Sent) -> None:
    prepare = sent.messages["query.prepare"]
    check_private(leaking(prepare, seconds=0.0))
    with pytest.raises(AssertionError):
        check_private(leaking(prepare, seconds=1.5))
