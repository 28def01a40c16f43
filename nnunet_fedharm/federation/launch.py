"""A whole federation on this machine through the real `flwr run`, in simulation, on loopback, offline."""

from __future__ import annotations

import json
import logging
import math
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from nnunet_fedharm.errors import FederationError
from nnunet_fedharm.federation.config import FederateConfig
from nnunet_fedharm.federation.daemon import (
    CONNECTION,
    app_folder,
    flower_environment,
    local_superlink,
    program,
    stop_process,
    terminate_as_interrupt,
)
from nnunet_fedharm.federation.events import EVENTS_FILE, GOOD_ENDS, ends_run, is_turned_away, read_events
from nnunet_fedharm.federation.progress import describe
from nnunet_fedharm.federation.report.config import SiteReportConfig
from nnunet_fedharm.federation.server_root import resolve_sites, server_folder, with_start
from nnunet_fedharm.federation.site import SITE_LOG
from nnunet_fedharm.nnunet_root import NnunetRoot

RunConfig = FederateConfig | SiteReportConfig

_POLL_S = 0.3
RUN_LOG = "run.log"
"""What `flwr run` and the simulation print, in ROOT/flower."""
_OUT_OF_MEMORY = re.compile(r"^ray\.exceptions\.OutOfMemoryError: .*?was ([\d.]+ ?GB) / ([\d.]+ ?GB)", re.MULTILINE)
_GRACE_S = 10.0
"""How long after the end of `flwr run` the server's last event may still come."""


def federate(config: FederateConfig, *, show: Callable[[str], None] | None = None) -> Path:
    """Run a federation of the sites in ROOT/sites on this machine.

    Args:
        config: `root` and `dataset` have to be given.
        show: receives one line per event; None prints it.

    Returns:
        The server's nnU-Net results folder, ready for `nnUNetv2_predict`.

    Raises:
        SetupError: Flower cannot start.
        FedHarmError: the run stopped; its sentence.
    """
    return Path(str(launch(config, show=show)["results"]))


def launch(config: RunConfig, *, show: Callable[[str], None] | None = None) -> Mapping[str, Any]:
    """Run what a configuration asks for, a training or a site report, and wait for its end; returns the last event.

    Raises:
        SetupError: Flower cannot start.
        FedHarmError: the run stopped; its sentence.
    """
    config = _checked(config)
    home = Path(config.root) / "flower"
    environment = flower_environment(home, device=config.device, parallel_sites=config.parallel_sites)
    events = server_folder(config) / "fedharm" / EVENTS_FILE
    offset = events.stat().st_size if events.exists() else 0
    logs = {site: _size(_site_log(config, site)) for site in config.site_names}
    with (
        terminate_as_interrupt(),
        local_superlink(home, environment) as superlink,
        _flwr_run(config, home, environment) as process,
    ):
        last = _follow(events, offset, (superlink, process), show or _print)
        if last:
            _let_end(process)
    if last.get("event") in GOOD_ENDS:
        return last
    for line in (*_site_reasons(config, logs), *memory_reason(home / RUN_LOG)):
        (show or _print)(line)
    if last.get("event") == "failed":
        raise FederationError(str(last["error"]))
    raise FederationError(f"Flower ended the run without a result; {home / RUN_LOG} and superlink.log say why.")


def run_arguments(config: RunConfig, run_config: Path) -> list[str]:
    """Arguments of `flwr` for this run in simulation."""
    resources: dict[str, Any] = {
        "num-supernodes": len(config.site_names),
        "client-resources-num-cpus": 1,
        "init-args-num-cpus": config.parallel_sites,
    }
    if config.device.startswith("cuda"):
        # Ray gives a site its share of one GPU: as many equal shares of each as are needed for all to train at once.
        gpus = config.gpus if isinstance(config, FederateConfig) else 1
        shares = math.ceil(config.parallel_sites / gpus)
        resources |= {"client-resources-num-gpus": 1.0 / shares, "init-args-num-gpus": gpus}
    options = " ".join(f"{key}={value}" for key, value in resources.items())
    return ["run", str(app_folder()), CONNECTION, "--stream", "-c", str(run_config), "--federation-config", options]


def write_run_config(config: RunConfig, path: Path) -> None:
    """Flower's run config as TOML; JSON strings, numbers and lower-case booleans are TOML too."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in config.to_run_config().items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _checked(config: RunConfig) -> RunConfig:
    if not config.root:
        raise FederationError("Say where the sites are: --root FOLDER with sites/<SITE>/ in it.")
    if not config.dataset:
        raise FederationError("Say which dataset: -d 910, or its name.")
    config = resolve_sites(replace(config, root=str(Path(config.root).expanduser().resolve())))
    for site in config.site_names:
        if not (Path(config.root) / "sites" / site).is_dir():
            raise FederationError(f"The site {site} has no folder {Path(config.root) / 'sites' / site}.")
    config = with_start(config)
    NnunetRoot(server_folder(config)).create()
    return config


@contextmanager
def _flwr_run(config: RunConfig, home: Path, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    run_config = home / "run_config.toml"
    write_run_config(config, run_config)
    command = [program("flwr"), *run_arguments(config, run_config)]
    with (home / RUN_LOG).open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            command, env=dict(environment), stdout=stream, stderr=subprocess.STDOUT, cwd=home, start_new_session=True
        )
    try:
        yield process
    finally:
        stop_process(process)


def _follow(
    events: Path, offset: int, processes: tuple[subprocess.Popen[bytes], ...], show: Callable[[str], None]
) -> Mapping[str, Any]:
    """Show events until the run is over; returns the last one that ends it, or an empty one.

    Where another run goes on in the same folder, both write into one log: who is turned away ends with its own processes.
    """
    ended: float | None = None
    turned_away: Mapping[str, Any] = {}
    while True:
        new, offset = read_events(events, offset)
        for event in new:
            line = describe(event)
            if line is not None:
                show(line)
            if ends_run(event):
                return event
            if is_turned_away(event):
                turned_away = event
        if any(process.poll() is not None for process in processes):
            ended = ended or time.monotonic()
            if time.monotonic() - ended > _GRACE_S:
                return turned_away
        time.sleep(_POLL_S)


def _let_end(process: subprocess.Popen[bytes]) -> None:
    """Let Flower close the run in order; whoever hangs is stopped afterwards."""
    try:
        process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        logging.getLogger(__name__).debug("flwr run did not end within %s s of the last event", _GRACE_S)


def _site_log(config: RunConfig, site: str) -> Path:
    return Path(config.root) / "sites" / site / "fedharm" / SITE_LOG


def _site_reasons(config: RunConfig, before: Mapping[str, int]) -> Iterator[str]:
    """What the sites wrote in their own logs in this run: here all sites are on this machine, so it may be shown."""
    for site, size in before.items():
        path = _site_log(config, site)
        if _size(path) > size:
            yield f"from {path}:\n{path.read_bytes()[size:].decode(errors='replace').rstrip()}"


def memory_reason(log: Path) -> Iterator[str]:
    """One sentence if Ray ended a site's process for want of memory, of which Flower says nothing to the server."""
    found = _OUT_OF_MEMORY.findall(log.read_text(encoding="utf-8", errors="replace")) if log.exists() else []
    if found:
        used, whole = found[-1]
        yield (
            f"A site's process was ended because this machine was short of memory ({used} of {whole} used, {log}). "
            "Close other programs, take fewer --parallel-sites or a smaller patch, and run the same command again."
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _print(line: str) -> None:
    print(line, flush=True)
