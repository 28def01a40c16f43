"""Where the server of a run writes, and which sites it expects."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from nnunet_fedharm.errors import FederationError
from nnunet_fedharm.federation.config import FederateConfig
from nnunet_fedharm.federation.report.config import SiteReportConfig
from nnunet_fedharm.federation.site import site_folders

LOCK_WAIT_S = 30.0
"""The process of a killed SuperLink ends a few seconds later."""

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
