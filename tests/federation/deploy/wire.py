"""What left the sites of a recorded consortium, held against the schemas of messages."""

from __future__ import annotations

import json
import re
from typing import Any

from flwr.app import Message

from nnunet_fedharm.federation import messages
from nnunet_fedharm.federation.codec import decode
from nnunet_fedharm.federation.messages import SiteFailure, Unpacked, unpack_reply
from nnunet_fedharm.federation.report import messages as report_messages
from nnunet_fedharm.federation.state import load_state
from nnunet_fedharm.harmonizers import SITE_ROWS
from tests.federation.deploy.real import RealConsortium

REPLIES = {
    "query.preflight": messages.PREFLIGHT_REPLY,
    "query.summarize": messages.SUMMARIZE_REPLY,
    "query.prepare": messages.PREPARE_REPLY,
    "query.plans": messages.STORE_PLANS_REPLY,
    "train": messages.TRAIN_REPLY,
    "query.finish": messages.FINISH_REPLY,
}
REPORT_REPLIES = {
    "query.report_hello": report_messages.HELLO_REPLY,
    "query.report_measure": report_messages.MEASURE_REPLY,
    "query.report_counts": report_messages.COUNTS_REPLY,
    "query.report_moments": report_messages.MOMENTS_REPLY,
    "query.report_classify": report_messages.CLASSIFY_REPLY,
    "query.report_keep": report_messages.KEEP_REPLY,
}
SUMS = r"\d\d\.(counts|n|sum|products)"
"""Arrays of a report: counts and sums over patients of each part."""
ROWS = {f"harmonizer.{name}" for name in SITE_ROWS}
FLEET = {"activate-node", "deactivate-node", "register-node", "send-node-heartbeat", "pull-messages", "push-messages"}
FLEET |= {"get-run", "get-fab", "push-object", "pull-object", "confirm-message-received", "unregister-node"}


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
        read = unpack_reply((REPLIES | REPORT_REPLIES)[kind], content, source="a site")
    except SiteFailure:
        assert set(content.config_records["config"]) == {"status", "kind", "text"}
        assert not content.array_records
        return kind
    assert "case0" not in json.dumps(read.values), "no case identifier"
    if kind in REPORT_REPLIES:
        check_sums(read)
        return kind
    arrays = decode(read.weights, source="a site")
    for name, value in arrays.items():
        own_row = (1, *known[name][1:]) if name in ROWS else None
        assert value.shape in (known[name], own_row), f"{name}: tensors of the model and the site's own rows only"
    assert longest_list(read.values) < least, "no list of numbers as long as a patch"
    return kind


def check_sums(read: Unpacked) -> None:
    """Hold the arrays of a report against what they may be: counts are numbers of patients, never values of one."""
    for name, value in report_messages.receive(read.weights, None, source="a site").items():
        assert re.fullmatch(SUMS, name), name
        if name.endswith((".counts", ".n")):
            assert (value == value.round()).all(), name
            assert (value >= 0).all(), name


def longest_list(value: Any) -> int:
    """Length of the longest list anywhere in a message."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    own = len(value) if isinstance(value, list | dict) else 0
    return max([own, *map(longest_list, inner)])
