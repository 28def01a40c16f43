"""The worker itself: answers one message after the other, and ends when it is idle, dismissed, or alone.

Everything that a site has to remember is on its disk, so the worker may be killed at any moment; what it keeps in memory only
saves time.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import os
import select
import shutil
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from flwr.app import RecordDict

from nnunet_fedharm.errors import FederationError
from nnunet_fedharm.federation.warm.client import TAKEN
from nnunet_fedharm.federation.warm.wire import receive, send

_WATCH_EVERY_S = 1.0
_PR_SET_PDEATHSIG = 1
_HANG_UP = select.POLLHUP | select.POLLERR | getattr(select, "POLLRDHUP", 0)

logger = logging.getLogger(__name__)


class Watch(threading.Thread):
    """Ends the process, and all that it started, when its parent is gone or nobody waits for the answer any more.

    Args:
        parent: process id.
    """

    def __init__(self, parent: int) -> None:
        super().__init__(daemon=True, name="watch")
        self.parent = parent
        self.born = born(parent)
        self.waiting: socket.socket | None = None

    def run(self) -> None:
        while True:
            time.sleep(_WATCH_EVERY_S)
            if not self.born or self.born != born(self.parent):
                end("the SuperNode is gone")
            waiting = self.waiting
            if waiting is not None and hung_up(waiting):
                end("nobody waits for the answer any more")


def born(pid: int, proc: Path = Path("/proc")) -> str:
    """What tells a process from a later one of the same number; empty where there is none."""
    try:
        fields = (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        # There is no /proc on this system, or it hides the process: Flower's helper forbids others to look into it, and then
        # `hidepid` (systemd's ProtectProc) hides it even from its own user.
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return ""
        except PermissionError:  # another user's
            return "there"
        return "there"
    return "" if fields[0] == "Z" else fields[19]


def hung_up(stream: socket.socket) -> bool:
    """Whether the other end was closed."""
    poll = select.poll()
    poll.register(stream.fileno(), _HANG_UP)
    return any(event & _HANG_UP for _, event in poll.poll(0))


def leave_children_alone(sockets: list[socket.socket]) -> None:
    """Forked children, nnU-Net's loaders, neither keep these sockets open nor outlive this process, however it ends."""

    def in_child() -> None:
        for stream in sockets:
            stream.close()
        if sys.platform == "linux":
            with suppress(OSError, AttributeError):
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    os.register_at_fork(after_in_child=in_child)


def end(reason: str) -> None:
    """End at once, with the processes that load data. Files are replaced as a whole, so nothing is left half written."""
    print(f"worker ends: {reason}", flush=True)
    os.killpg(0, signal.SIGKILL) if os.getpgrp() == os.getpid() else os._exit(1)


def serve(opened: list[socket.socket], watch: Watch, *, minutes: float) -> str:
    """Answer until there is nothing to do for some minutes; returns why it ended.

    Args:
        opened: the listening socket; the one of the message at hand is kept beside it.
        watch: is told who waits.
        minutes: see above.
    """
    import nnunet_fedharm.federation.answers  # noqa: F401 - the slow part, while the first message is on its way

    listener = opened[0]
    listener.settimeout(minutes * 60)
    while True:
        try:
            stream, _ = listener.accept()
        except TimeoutError:
            return f"idle for {minutes:g} minutes"
        opened[1:] = [stream]
        with stream:
            if own_user(stream) and not _serve_one(stream, watch):
                return "another run began"
        give_back_memory()


def _serve_one(stream: socket.socket, watch: Watch) -> bool:
    """Answer one message; False where it is the dismissal."""
    from nnunet_fedharm.federation import answers

    stream.settimeout(None)
    try:
        head, content = receive(stream)
        if head["kind"] == "leave":
            return False
        send(stream, {"status": TAKEN}, RecordDict())
        watch.waiting = stream
        reply = answers.answer(head["kind"], content, head["node_config"], head["run_config"])
        watch.waiting = None
        send(stream, {"status": "done"}, reply)
    except (FederationError, ValueError, KeyError) as error:
        logger.warning("a message was not answered: %s", error)
    finally:
        watch.waiting = None
    return True


def own_user(stream: socket.socket) -> bool:
    """Whether the peer is a process of this user; True where the system cannot say, as the folder keeps others out already."""
    if not hasattr(socket, "SO_PEERCRED"):
        return True
    raw = stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", raw)[1]) == os.getuid()


def give_back_memory() -> None:
    """Return what a round no longer needs to the GPU and to the system."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library than glibc, which keeps freed memory for itself
            ctypes.CDLL(None).malloc_trim(0)


def forget(record: Path) -> None:
    """Remove the socket and its description."""
    try:
        address = Path(json.loads(record.read_text())["address"])
    except (OSError, ValueError, KeyError):
        return
    record.unlink(missing_ok=True)
    address.unlink(missing_ok=True)
    if address.parent != record.parent:
        shutil.rmtree(address.parent, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(description="Warm worker of a site; started by the ClientApp.")
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--socket", type=int, required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--parent", type=int, required=True)
    options = parser.parse_args(arguments)

    def terminated(number: int, frame: FrameType | None) -> None:
        end("it was asked to")

    signal.signal(signal.SIGTERM, terminated)
    watch = Watch(options.parent)
    watch.start()
    with socket.socket(fileno=options.socket) as listener:
        opened = [listener]
        leave_children_alone(opened)
        reason = serve(opened, watch, minutes=options.minutes)
        forget(options.record)
    end(reason)


if __name__ == "__main__":
    main()
