"""A consortium as real processes on loopback, by the commands that people type; the wire is recorded twice."""

from __future__ import annotations

import io
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

from nnunet_fedharm.cli import main
from nnunet_fedharm.federation.daemon import descendants, free_port
from nnunet_fedharm.federation.deploy.server_folder import ServerFolder, ServerOptions, init_server
from nnunet_fedharm.federation.deploy.site_folder import SiteFolder
from nnunet_fedharm.federation.deploy.site_join import JoinOptions, join
from nnunet_fedharm.federation.deploy.units import write_server_units, write_site_units
from tests.federation.deploy.recording import Proxy

TINY = (
    *("--iterations-per-epoch", "1", "--val-iterations", "1", "--base-features", "4", "--max-features", "8"),
    *("--batch-size", "2", "--patch-size", "24x24", "--deadline-s", "90", "--join-wait-s", "60"),
)


class RealConsortium:
    """Sites reach the server through `network` (what anybody sees) and `inside` (what the server sees), or directly.

    Args:
        recorded: whether by those two ways.
        host: by which sites reach the server, and where it listens if that is an address.

    Attributes:
        root: holds one folder a site and the server's `study`.
        server: the consortium's folder.
    """

    def __init__(self, root: Path, sites: tuple[str, ...], *, recorded: bool = True, host: str = "localhost") -> None:
        self.root = root
        self.recorded = recorded
        bind = "127.0.0.1" if host == "localhost" else host
        options = ServerOptions(name="Real", hosts=[host], sites=sites, port=free_port(), bind=bind)
        self.server = init_server(root / "study", options)
        tls = (self.server.certificate, self.server.certificate_key, self.server.ca_certificate)
        self.inside = Proxy(options.port, tls)
        self.network = Proxy(self.inside.port)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def join(
        self, site: str, *, file: Path | None = None, authority: ServerFolder | None = None, processes: int | None = 1
    ) -> SiteFolder:
        """Join, with the site's own door to the network.

        Args:
            processes: for fingerprint and preprocessing. More than one imports torch in each, which for a few tiny cases takes
                half of a run's time; None: what `site join` chooses.
        """
        options = JoinOptions(site=site, device="cpu", num_processes=processes)
        made = join(file or self.server.consortium_file, self.root / site, options)[0]
        if self.recorded:
            text = made.settings_file.read_text()
            own = f"localhost:{self.server.settings()['port']}"
            made.settings_file.write_text(text.replace(own, f"localhost:{self.network.port}"))
        if authority is not None:
            made.ca_certificate.write_bytes(authority.ca_certificate.read_bytes())
        return made

    def command(self, *words: str, seconds: float | None = None) -> tuple[int, str]:
        """Run a command to its end; status and output.

        Args:
            seconds: in a process of its own that may take so long; None: in this one, which has imported everything already.
        """
        if seconds is None:
            output = io.StringIO()
            with redirect_stdout(output), redirect_stderr(output):
                status = main(list(words))
            return status, output.getvalue()
        done = subprocess.run(
            [sys.executable, "-m", "nnunet_fedharm.cli", *words],
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    def start(self, name: str, *words: str) -> None:
        """Start a command of ours that stays; its output goes to NAME.out."""
        self.start_command(name, [sys.executable, "-m", "nnunet_fedharm.cli", *words])

    def start_command(self, name: str, command: list[str]) -> None:
        """The same for any command."""
        with (self.root / f"{name}.out").open("ab") as stream:
            self.processes[name] = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)

    def output(self, name: str) -> str:
        return (self.root / f"{name}.out").read_text(errors="replace")

    def wait_for(self, name: str, text: str, *, seconds: float = 90) -> None:
        """Wait until a command has written a text."""
        end = time.monotonic() + seconds
        while text not in self.output(name):
            if time.monotonic() > end:
                raise AssertionError(f"{name} did not write {text!r}: {self.output(name)}")
            time.sleep(0.2)

    def wait_for_count(self, log: Path, text: str, count: int, *, seconds: float = 90) -> None:
        """Wait until a log has a text so many times."""
        end = time.monotonic() + seconds
        while (found := log.read_text(errors="replace").count(text)) < count:
            assert time.monotonic() < end, f"{log} has {text!r} {found} times, not {count}"
            time.sleep(0.2)

    def wait_for_log(self, site: str, text: str, *, seconds: float = 90) -> None:
        """Wait until a site's output or its SuperNode's log has a text."""
        end = time.monotonic() + seconds
        log = self.root / site / "fedharm" / "logs" / "supernode.log"
        while text not in self.output(site) + (log.read_text(errors="replace") if log.exists() else ""):
            if time.monotonic() > end:
                raise AssertionError(f"{site} did not write {text!r}: {self.output(site)} {log.read_text()[-2000:]}")
            time.sleep(0.2)

    def register(self, folder: SiteFolder) -> None:
        """Let a site in, by the coordinator's command."""
        words = (str(self.server.path), folder.settings()["site"], str(folder.node_key.with_suffix(".pub")))
        status, text = self.command("server", "register", *words)
        assert status == 0, text

    def admit(self, site: str, *, min_patients: int = 2, processes: int | None = 1) -> None:
        """Join under a policy that takes so few patients, and be let in."""
        folder = self.join(site, processes=processes)
        folder.policy_file.write_text(f"[patients]\nmin_patients = {min_patients}\n")
        self.register(folder)

    def open(self, sites: tuple[str, ...]) -> None:
        """Start the server, and these sites once it lets them in."""
        self.start("server", "server", "start", str(self.server.path))
        self.wait_for("server", "sites may connect")
        for site in sites:
            self.start(site, "site", "start", str(self.root / site))

    def end(self, name: str, number: int = signal.SIGTERM, *, seconds: float = 60) -> int:
        """Signal a command and wait for its end; its status."""
        process = self.processes.pop(name)
        process.send_signal(number)
        return process.wait(seconds)

    def cut_the_power(self) -> None:
        """Everything that runs is killed, and no process has a word to say."""
        family = [number for process in self.processes.values() for number in (process.pid, *descendants(process.pid))]
        for number in family:
            with suppress(ProcessLookupError):  # ended with its parent
                os.kill(number, signal.SIGKILL)
        for process in self.processes.values():
            process.wait(30)
        self.processes.clear()

    def boot(self, sites: tuple[str, ...]) -> None:
        """What systemd does at boot: the commands of the units. It would start one that ends again; here none may end."""
        units = {"server": write_server_units(self.server)[0]}
        units |= {site: write_site_units(SiteFolder(self.root / site))[0] for site in sites}
        for name, unit in units.items():
            (line,) = [line for line in unit.read_text().splitlines() if line.startswith("ExecStart=")]
            self.start_command(name, shlex.split(line.removeprefix("ExecStart=")))

    def close(self) -> None:
        for process in self.processes.values():
            process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            process.wait(60)
        self.network.close()
        self.inside.close()


def listening(pid: int) -> list[tuple[str, int]]:
    """Address and port of every TCP socket on which a process and its descendants listen (Linux)."""
    inodes = set()
    for number in (pid, *descendants(pid)):
        for link in Path(f"/proc/{number}/fd").glob("*"):
            try:
                target = str(link.readlink())
            except OSError:
                continue  # closed just now
            if target.startswith("socket:"):
                inodes.add(target[8:-1])
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == "0A" and columns[9] in inodes:
                address, port = columns[1].split(":")
                found.append((address, int(port, 16)))
    return found
