"""Where the server of a run writes, and which sites it expects."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from nnunet_fedharm.errors import CheckpointError, FederationError, FedHarmError
from nnunet_fedharm.federation.config import FederateConfig
from nnunet_fedharm.federation.durable import file_lock
from nnunet_fedharm.federation.events import EVENTS_FILE, EventLog
from nnunet_fedharm.federation.report.config import SiteReportConfig
from nnunet_fedharm.federation.site import site_folders
from nnunet_fedharm.nnunet_root import NnunetRoot

LOCK_WAIT_S = 30.0
"""The process of a killed SuperLink ends a few seconds later."""

_LOCK = "server.lock"

LOCAL_GROUPS_FILE = "local_groups.json"
"""In the fold's folder of a model that stays untrained in the groups that each site keeps for itself."""

_FULL = (errno.ENOSPC, errno.EDQUOT)

Config = TypeVar("Config", bound=FederateConfig | SiteReportConfig)


def server_folder(config: FederateConfig | SiteReportConfig) -> Path:
    """The server's nnU-Net root.

    Raises:
        FederationError: neither root nor server-root is given.
    """
    if not config.root and not config.server_root:
        raise FederationError(
            "Say where the server may write: set root (with sites/ and server/ inside) or server-root."
        )
    return Path(config.server_root or Path(config.root) / "server").expanduser().resolve()


def resolve_sites(config: Config) -> Config:
    """The configuration with the sites' names filled in from ROOT/sites where none are given.

    Raises:
        FederationError: no names and no such folder, or quorum and reference do not fit the names.
    """
    if config.site_names:
        return replace(config, sites=",".join(config.site_names))
    if not config.root:
        raise FederationError("Name the expected sites, for example sites='A,B,C'.")
    return replace(config, sites=",".join(site_folders(Path(config.root).expanduser())))


def with_start(config: Config) -> Config:
    """The configuration with the whole path of the model that it starts from: the server's process has another working folder.

    Raises:
        CheckpointError: no checkpoint is there.
    """
    if not isinstance(config, FederateConfig) or not config.start_from:
        return config
    from nnunet_fedharm.planning.start import find_checkpoint

    # A link stays one: the path is part of what makes a run the same.
    path = Path(config.start_from).expanduser().absolute()
    find_checkpoint(path)
    return replace(config, start_from=str(path))


def is_at_work(fedharm: Path) -> bool:
    """Whether the process of a run's server is there: it holds the lock of this folder as long as it lives."""
    with file_lock(fedharm / _LOCK, wait_s=0.0) as free:
        return not free


@contextmanager
def locked_server(config: FederateConfig | SiteReportConfig) -> Iterator[tuple[NnunetRoot, EventLog]]:
    """The server's root for one run alone, and its event log, where the reason of a failure is written too.

    Raises:
        FederationError: another run is using the root, or there is none.
        CheckpointError: the disk is full.
    """
    root = NnunetRoot(server_folder(config)).create()
    log = EventLog(root.path / "fedharm" / EVENTS_FILE)
    turned_away: dict[str, bool] = {"other_run": True}
    try:
        with file_lock(root.path / "fedharm" / _LOCK, wait_s=LOCK_WAIT_S) as held:
            if not held:
                raise FederationError(
                    f"Another run is using {root.path}. Wait for its end, or give this one a server-root."
                )
            turned_away.clear()
            yield root, log
    except FedHarmError as error:
        # A run that is turned away must not look like the end of the one that goes on.
        log.write("failed", error=str(error), **turned_away)
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _FULL:
            text = f"The disk of {root.path} is full. Free space, then run the same command again: no complete round is lost."
            log.write("failed", error=text)
            raise CheckpointError(text) from error
        # Unforeseen: the text may hold anything, so the event names the kind only; Flower's log has the traceback.
        log.write("failed", error=f"The server stopped with {type(error).__name__}; the traceback is in Flower's log.")
        raise
