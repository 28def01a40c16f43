"""The SuperLink that a local run starts and stops: its own home, its own port, its own environment."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

from nnunet_fedharm.errors import SetupError

CONNECTION = "fedharm"
"""Name of the SuperLink connection in the run's own Flower config."""
_DAEMON_FILE = "daemon.json"
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")
_START_S = 60.0
_STOP_S = 20.0


def app_folder() -> Path:
    """The folder that `flwr run` packs."""
    return Path(str(files("nnunet_fedharm") / "flower_app"))


def flower_environment(
    home: Path,
    *,
    device: str,
    parallel_sites: int,
    look_every_s: float = 1.0,
    hosts: Sequence[str] = (),
    proxy: str = "",
) -> dict[str, str]:
    """Environment of every Flower process of a run: offline, on loopback, nothing installed at run time.

    Flower's daemon keeps the environment of its first start, so everything has to be set before.

    Args:
        look_every_s: how often Flower's helper asks whether there is a process to start. A site's rounds wait for it; a
            server's helper starts one process in the whole run, and each of its questions costs the SuperLink 10 to 40 ms.
        hosts, proxy: as in `with_proxies`.
    """
    environment = with_proxies(os.environ, hosts=hosts, proxy=proxy)
    environment |= {
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray listens on loopback then, not on the machine's address
        # Ray makes its processes as nice as can be, so that a simulation next to any other work all but stands still.
        "RAY_worker_niceness": "0",
        # Flower starts its helpers by name: they have to be those of this Python.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }
    environment.setdefault("FLWR_SUPEREXEC_TASK_POLL_INTERVAL", str(look_every_s))
    # Ray would give each site one thread.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // parallel_sites)))
    if device == "cpu":
        environment |= {"nnUNet_compile": "f", "nnUNet_n_proc_DA": "0"}
    return environment


def with_proxies(environment: Mapping[str, str], *, hosts: Sequence[str] = (), proxy: str = "") -> dict[str, str]:
    """An environment in which Flower's HTTP client takes exactly one way.

    The client follows exported proxies even to loopback, where the run's own processes call each other.

    Args:
        environment: to start from; what its NO_PROXY names stays there.
        hosts: names and addresses that are called directly, as loopback is.
        proxy: the only way to everything but loopback, whatever is exported; empty for none.
    """
    # The client does not start where one of them names a SOCKS proxy, though NO_PROXY has every host that it calls.
    kept = {
        name: value
        for name, value in environment.items()
        if not (name.lower() in _PROXIES and value.lower().startswith("socks"))
    }
    own = [] if proxy else [*f"{kept.get('no_proxy', '')},{kept.get('NO_PROXY', '')}".split(","), *hosts]
    direct = ",".join(dict.fromkeys(name.strip() for name in (*own, *_LOOPBACK) if name.strip()))
    kept |= {"NO_PROXY": direct, "no_proxy": direct}
    return kept | ({"HTTPS_PROXY": proxy, "https_proxy": proxy} if proxy else {})


def program(name: str) -> str:
    """Path of one of Flower's programs, that of this Python first.

    Raises:
        SetupError: it is not installed.
    """
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise SetupError(f"The program {name} is missing. Install it with `pip install 'flwr[simulation]'`.")
    return found


@contextmanager
def local_superlink(home: Path, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A SuperLink in simulation mode on a free loopback port, stopped when the block ends, however it ends.

    Yields:
        Its process.

    Raises:
        SetupError: a daemon of an earlier run is still there, or this one does not start.
    """
    refuse_stale_daemon(home)
    home.mkdir(parents=True, exist_ok=True)
    port = free_port()
    command = [program("flower-superlink"), "--insecure", "--simulation", "--isolation", "subprocess"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--disable-runtime-dependency-installation"]
    log_file = home / "superlink.log"
    with log_file.open("a", encoding="utf-8") as stream:
        # A session of its own: Ctrl-C reaches us first, and we stop it in order.
        process = subprocess.Popen(
            command, env=dict(environment), stdout=stream, stderr=subprocess.STDOUT, cwd=home, start_new_session=True
        )
    try:
        (home / _DAEMON_FILE).write_text(json.dumps({"pid": process.pid, "port": port}))
        wait_until_ready(process, port, log_file)
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        )
        yield process
    finally:
        stop_process(process)
        (home / _DAEMON_FILE).unlink(missing_ok=True)


def refuse_stale_daemon(home: Path) -> None:
    """Refuse to start beside the SuperLink of an earlier run, whose environment and folder are not this run's.

    Raises:
        SetupError: it is alive; the message has the line that stops it.
    """
    record = home / _DAEMON_FILE
    if not record.exists():
        return
    try:
        pid = int(json.loads(record.read_text())["pid"])
    except (ValueError, KeyError, TypeError):
        return
    if is_superlink(pid):
        raise SetupError(
            f"A Flower daemon of an earlier or still running `nnunet-fedharm federate` (process {pid}) uses {home}. "
            f"Wait for that run, or stop it with `kill {pid}`."
        )
    record.unlink(missing_ok=True)


def is_superlink(pid: int) -> bool:
    """Whether this process id belongs to a running SuperLink."""
    shown = subprocess.run(["ps", "-ww", "-p", str(pid), "-o", "command="], capture_output=True, text=True, check=False)
    return "flower-superlink" in shown.stdout


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def stop_process(process: subprocess.Popen[Any]) -> None:
    """Ask a process to end, and make it end where it does not listen; with all its descendants.

    Flower and Ray start helpers in sessions of their own, so the process group is not enough.
    """
    family = descendants(process.pid)
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in _alive(family):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue  # it ended by itself just now
        end = time.monotonic() + _STOP_S / 4
        while _alive(family) and time.monotonic() < end:
            time.sleep(0.2)


def descendants(pid: int) -> dict[int, str]:
    """Process ids below a process, each with its start time, which tells it from a later process of the same number."""
    table = _process_table()
    found: dict[int, str] = {}
    front = [pid]
    while front:
        parent = front.pop()
        children = {child: born for child, (above, born) in table.items() if above == parent and child not in found}
        found |= children
        front += list(children)
    return found


def _alive(family: Mapping[int, str]) -> list[int]:
    table = _process_table()
    return [pid for pid, born in family.items() if pid in table and table[pid][1] == born]


def _process_table() -> dict[int, tuple[int, str]]:
    """Process id -> (parent, start time) of every process that is not a zombie."""
    listing = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid=,stat=,lstart="], capture_output=True, text=True, check=False
    )
    rows = (line.split(None, 3) for line in listing.stdout.splitlines())
    return {int(row[0]): (int(row[1]), row[3]) for row in rows if len(row) == 4 and not row[2].startswith("Z")}


def is_answering(port: int | str) -> bool:
    """Whether a SuperLink answers on loopback, asked directly: an exported proxy leads to no loopback of ours."""
    try:
        with build_opener(ProxyHandler({})).open(f"http://127.0.0.1:{port}/health", timeout=1.0):
            return True
    except (URLError, OSError, ValueError):  # ValueError: a port that is no number
        return False


def wait_until_ready(process: subprocess.Popen[bytes], port: int, log_file: Path) -> None:
    """Wait until a SuperLink answers on its port.

    Raises:
        SetupError: it ended, or did not answer within a minute.
    """
    end = time.monotonic() + _START_S
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        if is_answering(port):
            return
        time.sleep(0.2)
    raise SetupError(f"Flower's SuperLink did not start; {log_file} says why. Run `nnunet-fedharm doctor`.")


@contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """A SIGTERM (batch systems send it) stops the daemon like Ctrl-C does.

    Children that are forked meanwhile die of SIGTERM as ever: a pool ends its workers by it, and nnU-Net opens pools everywhere.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python allows signal handlers in the main thread only
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGTERM, interrupt)
    _Forks.guarded += 1
    try:
        yield
    finally:
        _Forks.guarded -= 1
        signal.signal(signal.SIGTERM, former)


class _Forks:
    """SIGTERM waits while a process forks, and a child takes back the system's way to handle it.

    A child that kept our handler could miss a SIGTERM for ever: Python's handler only notes a signal, and a new child forgets
    what was noted before it was complete. The parent then waits for a worker that waits for work.
    """

    guarded = 0
    """How many `terminate_as_interrupt` are open."""
    mask: ClassVar[set[int]] = set()

    @staticmethod
    def before() -> None:
        if _Forks.guarded:
            _Forks.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    @staticmethod
    def in_parent() -> None:
        if _Forks.guarded:
            signal.pthread_sigmask(signal.SIG_SETMASK, _Forks.mask)

    @staticmethod
    def in_child() -> None:
        if _Forks.guarded:
            _Forks.guarded = 0
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, _Forks.mask)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_Forks.before, after_in_parent=_Forks.in_parent, after_in_child=_Forks.in_child)
