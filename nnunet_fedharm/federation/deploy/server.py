"""The server of a consortium: start it, register sites, run a training or a site report."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from nnunet_fedharm.errors import FederationError, SetupError
from nnunet_fedharm.federation.config import FederateConfig
from nnunet_fedharm.federation.daemon import flower_environment, program
from nnunet_fedharm.federation.deploy.app_bundle import app_hash, build_app
from nnunet_fedharm.federation.deploy.certificates import check_server, days_left, split_address
from nnunet_fedharm.federation.deploy.consortium import version_differences
from nnunet_fedharm.federation.deploy.control import Operator, ServerOffError, local_address, operator
from nnunet_fedharm.federation.deploy.kept_run import alone_with, keep, kept_run, let_go
from nnunet_fedharm.federation.deploy.keys import parse_node_key
from nnunet_fedharm.federation.deploy.processes import Children, alone, children, stop_signals, watch
from nnunet_fedharm.federation.deploy.resuming import choose_sites
from nnunet_fedharm.federation.deploy.server_folder import ServerFolder
from nnunet_fedharm.federation.events import EVENTS_FILE, ends_run, is_turned_away, last_start, read_events
from nnunet_fedharm.federation.progress import describe
from nnunet_fedharm.federation.registered import write_registered
from nnunet_fedharm.federation.report.config import SiteReportConfig
from nnunet_fedharm.federation.server_root import is_at_work
from nnunet_fedharm.federation.site_names import check_site_names

RunConfig = FederateConfig | SiteReportConfig
_START_S = 90.0
_FORMER_S = 90.0
_GRACE_S = 10.0
_POLL_S = 0.5
_ASK_S = 5.0
_TELL_S = 15.0
_WARN_DAYS = 30
Show = Callable[[str], None]


def start_server(folder: ServerFolder, *, each: Callable[[], None] | None = None, show: Show = print) -> None:
    """Run the SuperLink until a signal comes. Everything that it needs after a crash is in the folder.

    Args:
        each: called twice a second while it runs; looks after the kept run.

    Raises:
        SetupError: the folder is not whole, or its server runs already.
        FederationError: Flower ended by itself.
    """
    consortium = folder.consortium()
    differences = version_differences(consortium)
    if not differences and app_hash(build_app()) != consortium.app_sha256:
        differences = ["The installed nnunet_fedharm is another build than the one that was signed."]
    if differences:
        raise SetupError(f"{' '.join(differences)} After an upgrade run `nnunet-fedharm server sign {folder.path}`.")
    left = days_left(folder.certificate)
    if left < 0:
        raise SetupError(f"The server's certificate has ended. Run `nnunet-fedharm server renew {folder.path}`.")
    if left < _WARN_DAYS:
        show(
            f"The server's certificate ends in {left} days: `nnunet-fedharm server renew {folder.path}`, then restart."
        )
    own = split_address(local_address(folder))[0]
    environment = flower_environment(folder.flower_home, device="cpu", parallel_sites=1, look_every_s=2.0, hosts=[own])
    with (
        alone(folder.flower_home / "server.lock", f"The server of {folder.path}"),
        stop_signals() as stopped,
        children(folder.logs, environment) as family,
    ):
        module = "nnunet_fedharm.federation.deploy.superlink"
        family.start("superlink", [sys.executable, "-m", module, str(folder.path)])
        if not _wait_until_ready(folder, family, stopped):
            return
        with operator(folder) as connection:
            _show_sync(connection, folder, show)
        family.start(
            "superexec",
            [
                program("flower-superexec"),
                *("--runtime-api-address", local_address(folder)),
                *("--root-certificates", str(folder.ca_certificate)),
                *("--superexec-auth-secret-file", str(folder.superexec_secret)),
                *("--parent-pid", str(os.getpid())),
            ],
        )
        show(f"{consortium.name}: sites may connect to {' or '.join(consortium.addresses)}. Ctrl-C stops the server.")
        watch(family, stopped, each)
        show("Stopping.")


def register_site(folder: ServerFolder, site: str, key_file: Path, *, replace_key: bool = False) -> bool:
    """Let a site in: keep its public key, and tell the SuperLink where it runs.

    Returns:
        Whether the SuperLink runs and knows the site now; else it will when it starts.

    Raises:
        SetupError: nobody expects the site, the file is no public key, or the site or the key is registered already.
    """
    check_site_names([site], error=SetupError)
    consortium = folder.consortium()
    if site not in consortium.sites:
        # A key that was registered under a wrong name cannot be registered again under the right one.
        raise SetupError(
            f"{site} is not among the expected sites of {consortium.name}: {', '.join(consortium.sites) or 'none'}. Use the "
            "name that the site joined by; one that comes later is entered by "
            f"`nnunet-fedharm server add {folder.path} {site}`."
        )
    try:
        line = key_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"Cannot read the public key {key_file}.") from error
    parse_node_key(line, source=str(key_file))
    known = folder.registered()
    twin = [name for name, other in known.items() if other.split()[:2] == line.split()[:2] and name != site]
    if twin:
        raise SetupError(f"The key of {site} is that of {twin[0]}. Each site needs a key of its own.")
    if " ".join(line.split()[:2]) in folder.shut_out():
        raise SetupError(
            f"This key of {site} was shut out before, and such a key is never let in again. Have the site make a new one "
            "(`nnunet-fedharm site join … --new-key`) and send its node.pub."
        )
    if site in known and known[site].split()[:2] != line.split()[:2]:
        if not replace_key:
            raise SetupError(
                f"{site} is registered with another key. Ask the site by telephone whether it made a new one, then use "
                "--replace."
            )
        folder.shut_out_key(site)
    (folder.node_keys / f"{site}.pub").write_text(line + "\n", encoding="utf-8")
    return _sync_if_running(folder)


def remove_site(folder: ServerFolder, site: str) -> bool:
    """Shut a site out: its key opens the door no more. Its name stays in the consortium file's list.

    Raises:
        SetupError: it is not registered.
    """
    if site not in folder.registered():
        raise SetupError(f"{site} is not registered; registered are {', '.join(folder.registered()) or 'none'}.")
    folder.shut_out_key(site)
    return _sync_if_running(folder)


def run(
    folder: ServerFolder, config: RunConfig, *, detach: bool = False, kept: bool = False, show: Show = print
) -> Mapping[str, Any]:
    """Submit a run and follow it to its end; the same configuration once more resumes it.

    Args:
        kept: `server start` submits it again after a crash, a reboot or a failure, until it has ended well. Another run, kept
            or not, takes its place.

    Returns:
        The last event; an empty one where nobody waited for it.

    Raises:
        SetupError: the server does not run, or a site is not registered.
        FederationError: another run goes on, or this one stopped; its sentence.
    """
    with operator(folder) as connection:
        _wait_for_former_run(folder, connection, show)
        with alone_with(folder):
            run_id, offset = submit(folder, connection, config, show)
            if isinstance(config, FederateConfig):  # only now: a run that is refused takes no other one's place
                if kept:
                    keep(folder, config, offset)
                else:
                    let_go(folder)
        if kept:
            show(
                f"Kept: `server start` resumes it until it has ended; `nnunet-fedharm server stop {folder.path}` lets go."
            )
        if detach:
            show(f"Submitted. `nnunet-fedharm server watch {folder.path}` shows it.")
            return {}
        show("Flower starts its server app.")
        return follow(folder, connection, run_id, folder.results / "fedharm" / EVENTS_FILE, offset, show)


def submit(folder: ServerFolder, connection: Operator, config: RunConfig, show: Show) -> tuple[int, int]:
    """Submit a run for the sites that it is for.

    Returns:
        Flower's number of the run, and the byte of the event log at which its events begin.

    Raises:
        SetupError: a site is not registered.
        FederationError: Flower refused.
    """
    consortium, fedharm = folder.consortium(), folder.results / "fedharm"
    mend = f"`nnunet-fedharm server register {folder.path} SITE KEYFILE`."
    sites = choose_sites(config, fedharm, folder.registered(), mend, show)
    config = replace(config, root="", server_root=str(folder.results), sites=sites)
    events = fedharm / EVENTS_FILE
    offset = events.stat().st_size if events.exists() else 0
    missing = sorted(set(consortium.sites) - set(folder.registered()))
    if missing:
        show(f"expected but not registered: {', '.join(missing)}")
    run_id = connection.start_run(consortium.app_sha256, config.to_run_config())
    show(f"Submitted for {', '.join(site for site in config.site_names if site in folder.registered())}.")
    return run_id, offset


def watch_run(folder: ServerFolder, *, show: Show = print) -> Mapping[str, Any]:
    """Follow the run that is going on, from its start.

    Raises:
        FederationError: there is none, or it stopped.
    """
    events = folder.results / "fedharm" / EVENTS_FILE
    with operator(folder) as connection:
        active = connection.active_runs()
        if not active:
            waits = " The kept run waits for its next try; `server start` says when." if kept_run(folder) else ""
            raise FederationError(f"No run is going on.{waits} `nnunet-fedharm server run` starts one.")
        run_id, submitted = next(iter(active.items()))
        return follow(folder, connection, run_id, events, last_start(events, since=submitted), show)


def stop_runs(folder: ServerFolder) -> int:
    """Stop every run, and keep none; returns how many. The same `server run` resumes at the round that was not completed."""
    with alone_with(folder):
        let_go(folder)
    with operator(folder) as connection:
        active = connection.active_runs()
        for number in active:
            connection.stop_run(number)
    return len(active)


def follow(
    folder: ServerFolder, connection: Operator, run_id: int, events: Path, offset: int, show: Show
) -> Mapping[str, Any]:
    """Show events until the run is over. Ctrl-C stops the showing, not the run.

    Raises:
        FederationError: the run failed, or ended without a word.
    """
    ended: float | None = None
    began = asked = told = time.monotonic()
    silent = True
    why = f"The run ended without a result; {folder.logs}/superexec.log says why."
    with stop_signals() as stopped:
        while not stopped.wait(_POLL_S):
            new, offset = read_events(events, offset) if events.exists() else ([], offset)
            for event in new:
                line = describe(event)
                if line is not None:
                    show(line)
                if is_turned_away(event):
                    why = str(event["error"])  # this run's end only where Flower says that it is over
                elif ends_run(event):
                    if event["event"] == "failed":
                        raise FederationError(str(event["error"]))
                    return event
            now, silent = time.monotonic(), silent and not new
            if silent and now - told > _TELL_S:
                told = now
                show(f"  waiting for Flower's server app to start ({now - began:.0f} s)")
            if ended is None and now - asked > _ASK_S:
                active, asked = connection.is_active(run_id), time.monotonic()
                if active is None:
                    show("  the server is too busy to say whether the run goes on; asking again")
                ended = asked if active is False else None
            if ended is not None and time.monotonic() - ended > _GRACE_S:
                raise FederationError(why)
    show(f"The run goes on. `nnunet-fedharm server watch {folder.path}` shows it, `server stop` ends it.")
    return {}


def _wait_for_former_run(folder: ServerFolder, connection: Operator, show: Show) -> None:
    """Wait while Flower lists a run whose process is gone: after a crash it takes about a minute to notice.

    Raises:
        FederationError: a run is going on.
    """
    end, told = time.monotonic() + _FORMER_S, False
    while connection.active_runs():
        if is_at_work(folder.results / "fedharm") or time.monotonic() > end:
            raise FederationError(
                f"A run is going on here. `nnunet-fedharm server watch {folder.path}` shows it, `server stop` ends it."
            )
        if not told:
            told = True
            show(
                f"Flower lists a run that has no process, as after a crash; waiting up to {_FORMER_S:.0f} s for its end."
            )
        time.sleep(_POLL_S)


def _show_sync(connection: Operator, folder: ServerFolder, show: Show) -> None:
    added, removed = _sync(connection, folder)
    for text, names in (("let in", added), ("shut out", removed)):
        if names:
            show(f"{text}: {', '.join(names)}")


def _sync(connection: Operator, folder: ServerFolder) -> tuple[list[str], list[str]]:
    changed = connection.sync(folder.registered())
    write_registered(folder.results / "fedharm", {node.node_id: node.site for node in connection.nodes()})
    return changed


def _sync_if_running(folder: ServerFolder) -> bool:
    try:
        with operator(folder) as connection:
            _sync(connection, folder)
    except ServerOffError:
        return False
    return True


def _wait_until_ready(folder: ServerFolder, family: Children, stopped: threading.Event) -> bool:
    """Whether the SuperLink answers; False where a signal came first."""
    end = time.monotonic() + _START_S
    while time.monotonic() < end:
        if stopped.wait(0.2):
            return False
        family.check()
        with suppress(OSError):
            if not check_server(local_address(folder), folder.ca_certificate, seconds=1.0):
                return True
    raise SetupError(f"The SuperLink did not start within {_START_S:.0f} s; {family.log('superlink')} says why.")
