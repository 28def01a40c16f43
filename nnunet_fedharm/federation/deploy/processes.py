"""Children of `server start` and `site start`: started with their own logs, watched, and stopped together."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from nnunet_fedharm.errors import FederationError, SetupError
from nnunet_fedharm.federation.daemon import stop_process
from nnunet_fedharm.federation.durable import file_lock

_POLL_S = 0.5
_PR_SET_PDEATHSIG = 1
_LOG_BYTES = 20 * 2**20
_LAST_BYTES = 4096


@dataclass
class Children:
    """Processes that live and end together.

    Attributes:
        logs: folder of their outputs, one file each; readable by this user only.
        environment: of all of them.
    """

    logs: Path
    environment: Mapping[str, str]
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _log_starts: dict[str, int] = field(default_factory=dict)

    def start(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start a child; Ctrl-C reaches the parent first, which ends the children in order."""
        path = self.log(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > _LOG_BYTES:
            path.replace(path.with_suffix(".log.1"))
        self._log_starts[name] = path.stat().st_size if path.exists() else 0
        with _appending(path) as stream:
            self.running[name] = subprocess.Popen(
                list(command),
                env=dict(self.environment),
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
        return self.running[name]

    def log(self, name: str) -> Path:
        """Where the output of a child is."""
        return self.logs / f"{name}.log"

    def said(self, name: str) -> str:
        """The end of what a child has written since it was started, as one line."""
        return last_words(self.log(name), since=self._log_starts[name], lines=30, most=4000)

    def check(self) -> None:
        """Nothing, while all of them run.

        Raises:
            FederationError: one has ended; the sentence has the end of its log.
        """
        for name, process in self.running.items():
            self._keep_small(name)
            code = process.poll()
            if code is not None:
                raise FederationError(
                    f"The {name} ended with status {code}; {self.log(name)} says why: {last_words(self.log(name))}"
                )

    def _keep_small(self, name: str) -> None:
        """Move a long log's content to its one older file while its child writes: that goes on at the new end (O_APPEND)."""
        path = self.log(name)
        with suppress(OSError):  # a full disk, or somebody has moved the log away: no reason to end the child
            if path.stat().st_size <= _LOG_BYTES:
                return
            content = path.read_bytes()
            os.truncate(path, 0)
            kept = content[-_LAST_BYTES:]  # for `said`
            self._log_starts[name] = max(0, self._log_starts[name] - (len(content) - len(kept)))
            for where, data, flags in ((path, kept, 0), (path.with_suffix(".log.1"), content, os.O_TRUNC)):
                with _appending(where, flags) as stream:
                    stream.write(data)

    def stop(self) -> None:
        """End all, the last one first."""
        for process in reversed(list(self.running.values())):
            stop_process(process)
        self.running.clear()


def _appending(path: Path, flags: int = 0) -> BinaryIO:
    """A file for this user only, at whose end everything is written."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | flags, 0o600), "ab")


def _end_with_parent() -> None:
    """In the child: a parent that is killed leaves no orphan that holds its port."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def children(logs: Path, environment: Mapping[str, str]) -> Iterator[Children]:
    """Children that end with the block, however it ends."""
    family = Children(logs, environment)
    try:
        yield family
    finally:
        family.stop()


def watch(family: Children, stopped: threading.Event, each: Callable[[], None] | None = None) -> None:
    """Wait for a signal, while all children run.

    Args:
        each: called twice a second.

    Raises:
        FederationError: a child ended by itself.
    """
    while not stopped.wait(_POLL_S):
        family.check()
        if each is not None:
            each()


@contextmanager
def alone(lock: Path, who: str) -> Iterator[None]:
    """Only one process at a time.

    Raises:
        SetupError: `who` runs already.
    """
    with file_lock(lock, wait_s=1.0) as held:
        if not held:
            raise SetupError(f"{who} runs already.")
        yield


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM (systemd), SIGINT (Ctrl-C) and SIGHUP (a closed terminal) set."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped  # Python allows signal handlers in the main thread only
        return
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    former = {number: signal.signal(number, lambda *_: stopped.set()) for number in numbers}
    try:
        yield stopped
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def last_words(log: Path, *, lines: int = 3, most: int = 400, since: int = 0) -> str:
    """The last lines of a log from byte `since` on, as one, without colours."""
    if not log.is_file():
        return "(no output)"
    with log.open("rb") as stream:
        stream.seek(max(since, log.stat().st_size - _LAST_BYTES))
        text = stream.read().decode(errors="replace")
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return " | ".join([line.strip() for line in plain.splitlines() if line.strip()][-lines:])[-most:]
