"""A site of a consortium: run Flower's SuperNode with the site's own key, policy and only outgoing connections."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from nnunet_fedharm.errors import DataError, SetupError
from nnunet_fedharm.federation.daemon import flower_environment, free_port, program
from nnunet_fedharm.federation.deploy.certificates import check_server, split_address
from nnunet_fedharm.federation.deploy.consortium import Consortium
from nnunet_fedharm.federation.deploy.device import device_trouble
from nnunet_fedharm.federation.deploy.door import Door, watch_door
from nnunet_fedharm.federation.deploy.processes import Children, alone, children, stop_signals
from nnunet_fedharm.federation.deploy.proxies import exported_proxy
from nnunet_fedharm.federation.deploy.site_folder import SiteFolder
from nnunet_fedharm.federation.deploy.site_join import check_release
from nnunet_fedharm.federation.policy import checked_policy
from nnunet_fedharm.federation.site import Site
from nnunet_fedharm.nnunet_root import NnunetRoot

_AGAIN_S = 10.0
_LOOK_EVERY_S = 0.3
_RESERVED = ("site", "site-root", "device", "num-processes")
Show = Callable[[str], None]


def start_site(folder: SiteFolder, *, show: Show = print) -> None:
    """Run the SuperNode until a signal comes. It calls the server; nothing from outside can call it.

    Raises:
        SetupError: the site is not ready, or who answers is not the consortium's server.
        PrivacyError: its policy promises patients a delta that is too large for so many.
        FederationError: Flower ended by itself.
    """
    consortium, settings = folder.consortium(), folder.settings()
    _check_ready(folder, consortium, settings)
    trouble = _call_server(folder, settings)
    if trouble:
        show(f"{trouble} The site goes on trying.")
    environment = flower_environment(
        folder.flower_home,
        device=settings["device"],
        parallel_sites=1,
        look_every_s=_LOOK_EVERY_S,
        hosts=[split_address(settings["address"])[0]],
        proxy=settings["proxy"],
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
        PrivacyError: its policy promises patients a delta that is too large for so many.
    """
    settings = folder.settings()
    _check_ready(folder, folder.consortium(), settings)
    return _call_server(folder, settings)


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


def _check_ready(folder: SiteFolder, consortium: Consortium, settings: dict[str, Any]) -> None:
    check_release(consortium)
    for path in (folder.node_key, folder.superexec_secret, folder.ca_certificate, folder.trusted_entities):
        if not path.is_file():
            raise SetupError(f"{path} is missing. Use `nnunet-fedharm site join` again.")
        if os.name == "posix" and path.stat().st_mode & 0o077 and path in (folder.node_key, folder.superexec_secret):
            raise SetupError(f"Others can read {path}. Run `chmod 600 {path}`; if somebody did, join with --new-key.")
    odd = sorted(set(settings["node_config"]) & set(_RESERVED))
    if odd:
        raise SetupError(f"{folder.settings_file} has {odd[0]} under [node_config]; it stands at the top there.")
    policy = checked_policy(folder.policy_file, site=settings["site"])
    root = NnunetRoot(folder.root)
    datasets = [path.name for path in sorted(root.raw.glob("Dataset*")) if path.is_dir()]
    if not datasets:
        raise SetupError(f"{root.raw} holds no dataset. Put DatasetXXX_Name there.")
    _check_delta(Site(settings["site"], root, settings["device"], 1, policy=policy), datasets, folder.policy_file)
    trouble = device_trouble(settings["device"], file=folder.settings_file)
    if trouble:
        raise SetupError(trouble)


def _check_delta(site: Site, datasets: list[str], file: Path) -> None:
    """Refuse a delta of the site's own trainings that is too large for one of its datasets."""
    from nnunet_fedharm.privacy.releases import check_delta  # its accountant brings scipy

    policy = site.policy
    for name in datasets if policy.private_epsilon else ():
        if not policy.datasets or name in policy.datasets:
            with suppress(DataError):  # a damaged dataset is refused by the run that asks for it
                who, mend = f"Site {site.name}, {name}", f"Set patients.delta in {file}"
                check_delta(policy.delta, site.patients_of(name), who=who, mend=mend)


def _call_server(folder: SiteFolder, settings: dict[str, Any]) -> str:
    """`check_server` on the way that Flower will take; the text also names an exported proxy, which is not that way."""
    trouble = check_server(settings["address"], folder.ca_certificate, proxy=settings["proxy"])
    exported = exported_proxy()
    if trouble and exported and not settings["proxy"]:
        return (
            f"{trouble} {exported} is exported here, and not used. If the server is reached through a proxy only, write "
            f'proxy = "http://HOST:PORT" in {folder.settings_file}.'
        )
    return trouble
