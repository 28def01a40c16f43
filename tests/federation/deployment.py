"""A SuperLink and SuperNodes as real processes on loopback, one nnU-Net root each; started, killed and watched by tests."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnunet_fedharm.federation.config import FederateConfig
from nnunet_fedharm.federation.daemon import (
    app_folder,
    descendants,
    flower_environment,
    free_port,
    program,
    wait_until_ready,
)
from nnunet_fedharm.federation.events import ends_run, read_events
from nnunet_fedharm.federation.launch import write_run_config

Process = subprocess.Popen[bytes]


@dataclass
class Deployment:
    """The processes of one federation.

    Attributes:
        root: consortium folder; logs and Flower homes go to `root/flower`.
        processes: name ("superlink", a site's name) -> process.
    """

    root: Path
    port: int = field(default_factory=free_port)
    processes: dict[str, Process] = field(default_factory=dict)

    @property
    def events_file(self) -> Path:
        return self.root / "server" / "fedharm" / "events.jsonl"

    def start_superlink(self) -> None:
        # The database: without it a restarted SuperLink does not know its SuperNodes any more, and they give up.
        database = self._home("superlink") / "state.db"
        command = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(self.port)]
        self._start("superlink", [*command, "--database", str(database)])
        wait_until_ready(self.processes["superlink"], self.port, self._home("superlink") / "process.log")

    def start_site(self, site: str, *, also: str = "") -> None:
        """A SuperNode that knows its site by its node config; `flower-supernode` by hand takes the same words."""
        node_config = f'site="{site}" site-root="{self.root / "sites" / site}" {also}'.strip()
        command = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{self.port}"]
        command += ["--host", "127.0.0.1", "--port", str(free_port()), "--node-config", node_config]
        self._start(site, command)

    def run(self, config: FederateConfig) -> None:
        """`flwr run` on the shipped app."""
        home = self._home("client")
        (home / "config.toml").write_text(
            f'[superlink.deployment]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )
        run_config = home / "run.toml"
        write_run_config(config, run_config)
        command = ["flwr", "run", str(app_folder()), "deployment", "--stream", "-c", str(run_config)]
        self._start("flwr-run", command, home=home)

    def kill(self, name: str) -> None:
        """SIGKILL to a process and all that it started, like a power cut."""
        process = self.processes.pop(name)
        family = [process.pid, *descendants(process.pid)]
        subprocess.run(["kill", "-9", *map(str, family)], check=False, capture_output=True)
        process.wait()

    def stop(self) -> None:
        for name in list(self.processes):
            self.kill(name)

    def events(self) -> list[dict[str, Any]]:
        return read_events(self.events_file)[0]

    def wait_for(
        self, what: Callable[[dict[str, Any]], bool], *, after: int = 0, seconds: float = 180.0
    ) -> dict[str, Any]:
        """The first event from number `after` on that fits; an AssertionError with the last events where none comes."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for event in self.events()[after:]:
                if what(event):
                    return event
                if event["event"] == "failed" and ends_run(event):
                    raise AssertionError(f"the run failed: {event}")
            time.sleep(0.2)
        raise AssertionError(f"nothing came within {seconds} s; last events: {self.events()[-5:]}")

    def _home(self, name: str) -> Path:
        home = self.root / "flower" / name
        home.mkdir(parents=True, exist_ok=True)
        return home

    def _start(self, name: str, command: list[str], home: Path | None = None) -> None:
        home = home or self._home(name)
        environment = flower_environment(
            home, device="cpu", parallel_sites=2, look_every_s=1.0 if name == "superlink" else 0.3
        )
        with (home / "process.log").open("a") as stream:
            self.processes[name] = subprocess.Popen(
                [program(command[0]), *command[1:]],
                env=environment,
                cwd=home,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
