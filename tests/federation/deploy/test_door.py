"""How a SuperNode's end is read, and when a site stops trying; the lines are Flower's own, as it wrote them in real runs."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from nnunet_fedharm.errors import FederationError, SetupError
from nnunet_fedharm.federation.deploy.door import Door, End, end_of, watch_door
from nnunet_fedharm.federation.deploy.processes import children

TROUBLE = "ERROR :     Server error '500 Internal Server Error' for url 'https://h:9092/v1/fleet/pull-messages'"
REFUSED = "ERROR :     Client error '401 Unauthorized' for url 'https://h:9092/v1/fleet/pull-messages'"
PIECE = "ERROR :     Failed to receive message 7: Server error '500 Internal Server Error' for url 'https://h:9092/v1/fleet/pull-object'"


def test_the_end_of_a_supernode_is_read_from_its_own_words() -> None:
    assert end_of(f"INFO : Sent successfully | {TROUBLE}") is End.TROUBLE
    assert end_of(REFUSED) is End.SHUT_OUT
    assert end_of("INFO : SuperNode terminated gracefully.") is End.SHUT_OUT
    assert end_of("[code: 1] Failed to activate SuperNode.") is End.NOT_LET_IN
    assert end_of(PIECE) is None, "one message failed, and the SuperNode goes on"
    assert end_of("Traceback: no space left") is None


def test_a_supernode_that_lives_on_without_its_loop_is_noticed(tmp_path: Path) -> None:
    """Flower's loop ends with the error, and the thread of its door keeps the process: nobody would start it again."""
    code = f"import time; print({TROUBLE!r}, flush=True); time.sleep(60)"
    with children(tmp_path / "logs", {}) as family:
        process = family.start("supernode", [sys.executable, "-c", code])
        assert watch_door(family, threading.Event()) is End.TROUBLE
        assert process.poll() is None
    with children(tmp_path / "logs", {}) as family:
        family.start("supernode", [sys.executable, "-c", "print('no space left')"])
        with pytest.raises(FederationError, match="no space left"):
            watch_door(family, threading.Event())


def test_a_removed_site_stops_soon_and_an_unknown_one_has_patience(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("nnunet_fedharm.federation.deploy.door.time.monotonic", lambda: clock[0])
    removed, unknown = Door("north", tmp_path / "node.pub"), Door("north", tmp_path / "node.pub")
    assert "not let north in any more" in removed.why_again(End.SHUT_OUT, was_up_s=500)
    assert "killed less than a minute ago" in unknown.why_again(End.NOT_LET_IN, was_up_s=1)
    clock[0] = 25.0
    with pytest.raises(SetupError, match="The coordinator has removed north, or replaced its key"):
        removed.why_again(End.NOT_LET_IN, was_up_s=1)
    assert "Trying again" in unknown.why_again(End.NOT_LET_IN, was_up_s=1)
    clock[0] = 95.0
    with pytest.raises(SetupError, match="key is not registered there"):
        unknown.why_again(End.NOT_LET_IN, was_up_s=1)


def test_a_server_in_trouble_is_tried_again_for_ever(tmp_path: Path) -> None:
    door = Door("north", tmp_path / "node.pub")
    for _ in range(3):
        assert "Trying again" in door.why_again(End.TROUBLE, was_up_s=1)
    assert door.shut_since == float("inf")
