"""A site's folder: its nnU-Net root, and what it knows of the consortium that it has joined."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_fedharm.errors import SetupError
from nnunet_fedharm.federation.deploy.consortium import CONSORTIUM_FILE, Consortium
from nnunet_fedharm.federation.deploy.settings_file import read_settings
from nnunet_fedharm.federation.policy import POLICY_FILE

_SETTINGS = "site.toml"


@dataclass(frozen=True)
class SiteFolder:
    """Paths of a site: its nnU-Net root, and what it knows of its consortium in `fedharm/consortium/`."""

    root: Path

    @property
    def home(self) -> Path:
        return self.root / "fedharm" / "consortium"

    @property
    def consortium_file(self) -> Path:
        return self.home / CONSORTIUM_FILE

    @property
    def ca_certificate(self) -> Path:
        return self.home / "ca.crt"

    @property
    def trusted_entities(self) -> Path:
        return self.home / "trusted-entities.yaml"

    @property
    def node_key(self) -> Path:
        return self.home / "node.key"

    @property
    def superexec_secret(self) -> Path:
        return self.home / "superexec.secret"

    @property
    def settings_file(self) -> Path:
        return self.home / _SETTINGS

    @property
    def policy_file(self) -> Path:
        return self.root / "fedharm" / POLICY_FILE

    @property
    def flower_home(self) -> Path:
        return self.home / "flower"

    @property
    def logs(self) -> Path:
        return self.root / "fedharm" / "logs"

    def consortium(self) -> Consortium:
        """The consortium that the site has joined.

        Raises:
            SetupError: none.
        """
        if not self.consortium_file.is_file():
            raise SetupError(f"{self.root} has not joined a consortium. Use `nnunet-fedharm site join` first.")
        return Consortium.load(self.consortium_file)

    def settings(self) -> dict[str, Any]:
        """Name, address, device, number of processes, proxy, and further keys of the node config.

        Raises:
            SetupError: the file is missing or damaged.
        """
        kinds = {
            "site": str,
            "address": str,
            "device": str,
            "num_processes": int,
            "proxy": str,
            "node_config": dict,
        }
        mend = "Use `nnunet-fedharm site join` again."
        return read_settings(self.settings_file, kinds, mend=mend, defaults={"proxy": "", "node_config": {}})
