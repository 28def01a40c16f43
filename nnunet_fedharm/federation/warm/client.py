"""Flower's short-lived process asks the site's worker, and starts it where there is none. Imports nothing heavy.

The worker of a run listens on a Unix socket in `fedharm/worker/`, a folder that only the site's user can enter. The listening
socket is made here and handed down, so that the first message waits in its queue while the worker still imports.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import RecordDict

from nnunet_fedharm.errors import FederationError
from nnunet_fedharm.federation.durable import file_lock
from nnunet_fedharm.federation.messages import error_reply
from nnunet_fedharm.federation.site import Site, describe_error
from nnunet_fedharm.federation.warm.wire import Closed, receive, send

WARM_MINUTES = 30.0
"""How long a site keeps an idle worker, if its node config has no `warm-minutes`."""
FOLDER = "worker"
"""In the site's `fedharm/`: socket, its description, and the worker's own output."""
LOG_FILE = "worker.log"
TAKEN = "taken"
"""The worker's first word: it has read the message and begins to work."""
_LONGEST_ADDRESS = 100  # the system takes 104 to 108 bytes
_STARTS = 2
Configs = tuple[Mapping[str, Any], Mapping[str, Any]]


def warm_minutes(node_config: Mapping[str, Any]) -> float:
    """Minutes that this site's idle worker process stays; 0 where there is none.

    Only a deployment needs it: the processes of a simulation live on between messages anyway.
    """
    deployed = "site" in node_config and "site-root" in node_config
    return float(node_config.get("warm-minutes", WARM_MINUTES)) if deployed and os.name == "posix" else 0.0


class _Died(FederationError):
    """The worker ended while it worked."""


def ask(
    site: Site, kind: str, content: RecordDict, configs: Configs, *, run_id: int, minutes: float, parent: int = 0
) -> RecordDict:
    """The worker's reply to a message; one sentence instead where the worker dies over it.

    Args:
        site: whose worker.
        kind: Flower's message type.
        content: of the message.
        configs: node config and run config.
        run_id: Flower's; each run has a worker of its own, so that none outlives an upgrade of the package.
        minutes: after which an idle worker ends.
        parent: process with which the worker ends; 0 is the one above this process, Flower's SuperNode or its helper.
    """
    head = {"kind": kind, "node_config": dict(configs[0]), "run_config": dict(configs[1])}
    home = site.folder / FOLDER
    try:
        for attempt in range(_STARTS):
            try:
                return _exchange(home, head, content, run_id, minutes, parent or os.getppid())
            except Closed as error:
                # It was just leaving. A worker that ends before it takes a message twice will not do better a third time.
                if attempt + 1 == _STARTS:
                    raise FederationError(
                        f"Site {site.name}: its worker does not start; the reason is in its own {FOLDER}/{LOG_FILE}."
                    ) from error
    except _Died:
        text = (
            f"Site {site.name}: its worker ended in the middle of the work, killed or out of memory; see its own "
            f"{FOLDER}/{LOG_FILE}. The next message starts a fresh one."
        )
        return error_reply(*describe_error(site, FederationError(text)))
    except Exception as error:  # noqa: BLE001 - as in `answers`: a failure is a reply, and logged at the site
        return error_reply(*describe_error(site, error))
    raise AssertionError("unreachable")


def _exchange(
    home: Path, head: Mapping[str, Any], content: RecordDict, run_id: int, minutes: float, parent: int
) -> RecordDict:
    with _connected(home, run_id, minutes, parent) as stream:
        send(stream, head, content)
        word, _ = receive(stream)
        if word.get("status") != TAKEN:
            raise Closed("The worker leaves.")
        try:
            return receive(stream)[1]
        except Closed as error:
            raise _Died("The worker ended.") from error


def _connected(home: Path, run_id: int, minutes: float, parent: int) -> socket.socket:
    """A connection to the run's worker, which is started where it is not there."""
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    home.chmod(0o700)
    record = home / f"{run_id}.json"
    with file_lock(home / "start.lock"):
        found = connect(record)
        if found is not None:
            return found
        for other in home.glob("*.json"):
            _dismiss(other)
        return _start(home, record, minutes, parent)


def connect(record: Path) -> socket.socket | None:
    """A connection to the worker that a record describes; None where it is gone."""
    try:
        address = str(json.loads(record.read_text())["address"])
    except (OSError, ValueError, KeyError):
        return None
    stream = socket.socket(socket.AF_UNIX)
    try:
        stream.connect(address)
    except OSError:
        stream.close()
        return None
    return stream


def _dismiss(record: Path) -> None:
    """Ask the worker of another run to leave as soon as it is idle: one site has memory for one."""
    stream = connect(record)
    if stream is None:
        record.unlink(missing_ok=True)
        return
    with stream:
        send(stream, {"kind": "leave"}, RecordDict())


def _start(home: Path, record: Path, minutes: float, parent: int) -> socket.socket:
    listener, address = _listener(home, record.stem)
    command = [sys.executable, "-m", "nnunet_fedharm.federation.warm.process", "--record", str(record)]
    command += ["--socket", str(listener.fileno()), "--minutes", str(minutes), "--parent", str(parent)]
    # Flower's token is for this process and this message only.
    environment = {name: value for name, value in os.environ.items() if "TOKEN" not in name}
    with listener, (home / LOG_FILE).open("w", encoding="utf-8") as output:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        print(f"{stamp} worker of run {record.stem}", file=output, flush=True)
        process = subprocess.Popen(
            command,
            pass_fds=[listener.fileno()],
            env=environment,
            cwd=home,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        record.write_text(json.dumps({"address": address, "pid": process.pid}))
        stream = socket.socket(socket.AF_UNIX)
        stream.connect(address)
    return stream


def _listener(home: Path, name: str) -> tuple[socket.socket, str]:
    """A listening socket in the site's folder, or elsewhere where the path is too long or the disk knows no sockets."""
    path = home / f"{name}.sock"
    if len(os.fsencode(path)) <= _LONGEST_ADDRESS:
        path.unlink(missing_ok=True)
        try:
            return _bound(path)
        except OSError:
            path.unlink(missing_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="fedharm-"))
    try:
        return _bound(folder / "worker.sock")
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise FederationError(
            f"Cannot make a socket in {folder}: {error.strerror}. Set TMPDIR to a folder on a local disk, or add warm-minutes=0 "
            "to the node config."
        ) from error


def _bound(address: Path) -> tuple[socket.socket, str]:
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(str(address))
        address.chmod(0o600)
        listener.listen(8)
    except OSError:
        listener.close()
        raise
    return listener, str(address)
