"""A site of a consortium: join it, and run Flower's SuperNode with the site's own key, policy and only outgoing connections."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_fedharm.errors import SetupError
from nnunet_fedharm.federation.daemon import flower_environment, free_port, program
from nnunet_fedharm.federation.deploy import app_bundle, keys
from nnunet_fedharm.federation.deploy.certificates import check_server
from nnunet_fedharm.federation.deploy.consortium import CONSORTIUM_FILE, Consortium, version_differences
from nnunet_fedharm.federation.deploy.door import Door, watch_door
from nnunet_fedharm.federation.deploy.processes import Children, alone, children, stop_signals
from nnunet_fedharm.federation.deploy.settings_file import read_settings
from nnunet_fedharm.federation.policy import POLICY_FILE, TEMPLATE, checked_policy
from nnunet_fedharm.federation.site_names import check_site_names
from nnunet_fedharm.nnunet_root import NnunetRoot

_SETTINGS = "site.toml"
_AGAIN_S = 10.0
_LOOK_EVERY_S = 0.3
_RESERVED = ("site", "site-root", "device", "num-processes")
Show = Callable[[str], None]


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
        """Name, address, device and further keys of the node config.

        Raises:
            SetupError: the file is missing or damaged.
        """
        kinds = {"site": str, "address": str, "device": str, "num_processes": int, "node_config": dict}
        mend = "Use `nnunet-fedharm site join` again."
        return read_settings(self.settings_file, kinds, mend=mend, defaults={"node_config": {}})


@dataclass(frozen=True, kw_only=True)
class JoinOptions:
    """What `site join` is told.

    Attributes:
        fingerprint: that the coordinator read out; empty where it is compared by eye.
        address: one of the consortium's; empty for the first.
        new_key: make a new node key though there is one.
    """

    site: str
    fingerprint: str = ""
    address: str = ""
    device: str = "cuda"
    num_processes: int = 2
    new_key: bool = False


def join(consortium_file: Path, root: Path, options: JoinOptions) -> tuple[SiteFolder, Consortium, str]:
    """Join a consortium, or take a new file of the same one; key, settings and policy that are there stay.

    Returns:
        The site's folder, the consortium, and the public key line for the coordinator.

    Raises:
        SetupError: the folder, the file, or the fingerprint is not as it has to be.
    """
    consortium = Consortium.load(consortium_file.expanduser())
    folder = SiteFolder(root.expanduser().resolve())
    _check_join(consortium, folder, options)
    folder.home.mkdir(parents=True, exist_ok=True, mode=0o700)
    for private in (folder.home.parent, folder.home):
        private.chmod(0o700)
    folder.consortium_file.write_text(consortium.to_toml(), encoding="utf-8")
    folder.ca_certificate.write_text(consortium.ca_certificate.strip() + "\n", encoding="utf-8")
    folder.trusted_entities.write_text(app_bundle.trusted_entities(consortium.signing_key), encoding="utf-8")
    if options.new_key or not folder.node_key.exists():
        keys.make_node_key(folder.node_key, comment=options.site)
    if not folder.superexec_secret.exists():
        keys.make_secret(folder.superexec_secret)
    if not folder.settings_file.exists():
        folder.settings_file.write_text(_settings_text(consortium, options), encoding="utf-8")
    if not folder.policy_file.exists():
        folder.policy_file.write_text(TEMPLATE, encoding="utf-8")
    return folder, consortium, folder.node_key.with_suffix(".pub").read_text(encoding="utf-8").strip()


def start_site(folder: SiteFolder, *, show: Show = print) -> None:
    """Run the SuperNode until a signal comes. It calls the server; nothing from outside can call it.

    Raises:
        SetupError: the site is not ready, or who answers is not the consortium's server.
        FederationError: Flower ended by itself.
    """
    consortium, settings = folder.consortium(), folder.settings()
    _check_ready(folder, consortium, settings)
    trouble = check_server(settings["address"], folder.ca_certificate)
    if trouble:
        show(f"{trouble} The site goes on trying.")
    environment = flower_environment(
        folder.flower_home, device=settings["device"], parallel_sites=1, look_every_s=_LOOK_EVERY_S
    )
    with (
        alone(folder.home / "running.lock", f"The site of {folder.root}"),
        stop_signals() as stopped,
        children(folder.logs, environment) as family,
    ):
        folder.flower_home.mkdir(parents=True, exist_ok=True)
        door = Door(settings["site"], folder.node_key.with_suffix(".pub"))
        while True:
            started = time.monotonic()
            _start_flower(folder, settings, family)
            show(f"Site {settings['site']} of {consortium.name} calls {settings['address']}. Ctrl-C stops it.")
            end = watch_door(family, stopped)
            if end is None:
                break
            family.stop()
            show(door.why_again(end, was_up_s=time.monotonic() - started))
            if stopped.wait(_AGAIN_S):
                break
        show("Stopping.")


def check_site(folder: SiteFolder) -> str:
    """An empty text where the site is ready and the server answers; else why it cannot be reached now.

    Raises:
        SetupError: the site is not ready, or who answers is not the consortium's server.
    """
    settings = folder.settings()
    _check_ready(folder, folder.consortium(), settings)
    return check_server(settings["address"], folder.ca_certificate)


def supernode_command(folder: SiteFolder, settings: dict[str, Any], port: int) -> list[str]:
    """Flower's SuperNode for this site. Its own door is on loopback, and gives work only to whom knows the site's secret."""
    return [
        program("flower-supernode"),
        *("--superlink", settings["address"]),
        *("--root-certificates", str(folder.ca_certificate)),
        *("--auth-supernode-private-key", str(folder.node_key)),
        *("--trusted-entities", str(folder.trusted_entities)),
        *("--isolation", "process"),
        *("--superexec-auth-secret-file", str(folder.superexec_secret)),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--node-config", node_config(folder, settings)),
    ]


def node_config(folder: SiteFolder, settings: dict[str, Any]) -> str:
    """Flower's `--node-config`. It stays at the site."""
    values = {
        **settings["node_config"],
        "site": settings["site"],
        "site-root": str(folder.root),
        "device": settings["device"],
        "num-processes": settings["num_processes"],
    }
    return " ".join(f"{key}={json.dumps(value)}" for key, value in values.items())


def _start_flower(folder: SiteFolder, settings: dict[str, Any], family: Children) -> None:
    port = free_port()
    node = family.start("supernode", supernode_command(folder, settings, port))
    family.start(
        "superexec",
        [
            *superexec(),
            "--insecure",  # over loopback, to the SuperNode above
            *("--runtime-api-address", f"127.0.0.1:{port}"),
            *("--superexec-auth-secret-file", str(folder.superexec_secret)),
            *("--parent-pid", str(node.pid)),
        ],
    )


def superexec() -> list[str]:
    """The helper that runs a process for every message: the quick one where forking is safe, else Flower's own."""
    forking = [sys.executable, "-m", "nnunet_fedharm.federation.deploy.superexec"]
    return forking if sys.platform == "linux" else [program("flower-superexec")]


def _check_join(consortium: Consortium, folder: SiteFolder, options: JoinOptions) -> None:
    check_site_names([options.site], error=SetupError)
    if options.site not in consortium.sites:
        raise SetupError(
            f"{options.site} is not among the sites of {consortium.name}: {', '.join(consortium.sites) or 'none'}. Use the name "
            "that the coordinator gave you."
        )
    given = options.fingerprint.replace(" ", "").lower()
    if given and given.replace("-", "") != consortium.fingerprint.replace("-", ""):
        raise SetupError(
            f"The file's fingerprint is {consortium.fingerprint}, not what the coordinator read out. Do not use this file."
        )
    if options.address and options.address not in consortium.addresses:
        raise SetupError(
            f"{options.address} is not among the consortium's addresses: {', '.join(consortium.addresses)}."
        )
    if not folder.root.is_dir():
        raise SetupError(
            f"The site's nnU-Net root {folder.root} does not exist. Make it, with nnUNet_raw/DatasetXXX_Name."
        )
    if folder.consortium_file.exists():
        former = Consortium.load(folder.consortium_file)
        if former.fingerprint != consortium.fingerprint:
            raise SetupError(
                f"This site belongs to {former.name} ({former.fingerprint}), and the file is of {consortium.name} "
                f"({consortium.fingerprint}). If it shall leave the former one, move {folder.home} away."
            )
        if folder.settings()["site"] != options.site:
            raise SetupError(
                f"This site is {folder.settings()['site']}, not {options.site}. Move {folder.home} away first."
            )
    _check_release(consortium)


def _check_release(consortium: Consortium) -> None:
    differences = version_differences(consortium)
    if differences:
        raise SetupError(f"{' '.join(differences)} Install the same releases as the server.")
    if app_bundle.app_hash(app_bundle.build_app()) != consortium.app_sha256:
        raise SetupError(
            "The installed nnunet_fedharm is another build than the server's (its app differs). Install the same release, or "
            "ask the coordinator for the present consortium file."
        )


def _check_ready(folder: SiteFolder, consortium: Consortium, settings: dict[str, Any]) -> None:
    _check_release(consortium)
    for path in (folder.node_key, folder.superexec_secret, folder.ca_certificate, folder.trusted_entities):
        if not path.is_file():
            raise SetupError(f"{path} is missing. Use `nnunet-fedharm site join` again.")
        if os.name == "posix" and path.stat().st_mode & 0o077 and path in (folder.node_key, folder.superexec_secret):
            raise SetupError(f"Others can read {path}. Run `chmod 600 {path}`; if somebody did, join with --new-key.")
    odd = sorted(set(settings["node_config"]) & set(_RESERVED))
    if odd:
        raise SetupError(f"{folder.settings_file} has {odd[0]} under [node_config]; it stands at the top there.")
    checked_policy(folder.policy_file, site=settings["site"])
    if not any(NnunetRoot(folder.root).raw.glob("Dataset*")):
        raise SetupError(f"{NnunetRoot(folder.root).raw} holds no dataset. Put DatasetXXX_Name there.")


def _settings_text(consortium: Consortium, options: JoinOptions) -> str:
    lines = [
        f"site = {json.dumps(options.site)}",
        f"address = {json.dumps(options.address or consortium.addresses[0])}",
        f"device = {json.dumps(options.device)}  # cuda, cuda:1, mps or cpu",
        f"num_processes = {options.num_processes}  # for fingerprints and preprocessing",
        "",
        "[node_config]  # further keys of the node config, for example warm-minutes = 30.0",
    ]
    return "\n".join(lines) + "\n"
