"""Examples for running server and site for weeks: systemd units and container files with the right paths in them."""

from __future__ import annotations

import getpass
import sys
from pathlib import Path

import nnunet_fedharm
from nnunet_fedharm.federation.deploy.server_folder import ServerFolder
from nnunet_fedharm.federation.deploy.settings_file import writing
from nnunet_fedharm.federation.deploy.site_folder import SiteFolder

_UNIT = """\
# {what}. Look it over, then:
#   sudo cp {file} /etc/systemd/system/ && sudo systemctl daemon-reload && sudo systemctl enable --now {name}
[Unit]
Description={what}
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=0

[Service]
User={user}
# Caches of torch and triton go below HOME; the rest of the machine is read-only.
Environment="HOME={folder}"
ExecStart="{program}" {command} start "{folder}"
Restart=always
RestartSec=30
KillSignal=SIGTERM
KillMode=mixed
TimeoutStopSec=90

# It needs its own folder and nothing else of this machine.
UMask=0077
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome={home}
ReadWritePaths="{folder}"
PrivateTmp=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectControlGroups=yes
ProtectProc=invisible
RestrictSUIDSGID=yes
RestrictNamespaces=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
LockPersonality=yes
CapabilityBoundingSet=
{limits}
[Install]
WantedBy=multi-user.target
"""

_CONTAINER = """\
# {what} in a container; podman and docker read this file. Build it in a folder that holds the wheel of nnunet_fedharm:
#   podman build -t {image} -f {file} .
# Run it{note}:
#   podman run --rm --name {image} --userns=keep-id:uid=1000,gid=1000 {options} \\
#     --env "HOME={folder}" -v "{folder}:{folder}:Z" {image}
FROM docker.io/library/python:3.11-slim

RUN apt-get update \\
    && apt-get install --yes --no-install-recommends procps \\
    && rm -rf /var/lib/apt/lists/*

COPY nnunet_fedharm-{version}-py3-none-any.whl constraints.txt /install/
RUN pip install --no-cache-dir -c /install/constraints.txt /install/nnunet_fedharm-{version}-py3-none-any.whl \\
    && useradd --uid 1000 --create-home fedharm

USER fedharm
STOPSIGNAL SIGTERM
ENTRYPOINT ["nnunet-fedharm", "{command}", "start", "{folder}"]
"""


def write_server_units(folder: ServerFolder) -> list[Path]:
    """Write `deploy/` in a consortium's folder.

    Raises:
        SetupError: the folder cannot be written.
    """
    port = folder.settings()["port"]
    # `server start` resumes the kept run too: one unit brings back all that the server's machine had.
    return _write(
        folder.path / "deploy",
        name="nnunet-fedharm-server",
        command="server",
        folder=folder.path,
        what=f"Server of the consortium {_plain(folder.consortium().name)}",
        limits="MemoryMax=80%\n",
        note="; the port has to be reachable from the sites",
        options=f"--publish {port}:{port}",
    )


def write_site_units(folder: SiteFolder) -> list[Path]:
    """Write `deploy/` beside a site's keys.

    Raises:
        SetupError: the folder cannot be written.
    """
    settings = folder.settings()
    gpu = settings["device"].startswith("cuda")
    # A site opens no port; the root file system is read-only, so that nothing but its own folder can change.
    options = "--read-only --tmpfs /tmp --shm-size 8g" + (" --device nvidia.com/gpu=all" if gpu else "")
    return _write(
        folder.home / "deploy",
        name=f"nnunet-fedharm-site-{settings['site']}",
        command="site",
        folder=folder.root,
        what=f"Site {settings['site']} of the consortium {_plain(folder.consortium().name)}",
        limits="MemoryMax=80%\n" if gpu else "MemoryMax=80%\nPrivateDevices=yes\n",
        note="; no port is published, because a site only calls out",
        options=options,
    )


def _write(
    target: Path, *, name: str, command: str, folder: Path, what: str, limits: str, note: str, options: str
) -> list[Path]:
    unit, container = target / f"{name}.service", target / f"Containerfile.{command}"
    own = Path(sys.executable).parent / "nnunet-fedharm"
    # A virtual environment anywhere may use a Python below somebody's home (pyenv, conda, uv).
    needed = (folder, own, Path(sys.executable).resolve(), Path(sys.base_prefix).resolve())
    inside_home = any(path.is_relative_to(home) for path in needed for home in ("/home", "/root"))
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
        unit.write_text(
            _UNIT.format(
                what=what,
                file=unit,
                name=name,
                user=getpass.getuser(),
                program=own,
                command=command,
                folder=folder,
                home="no" if inside_home else "yes",
                limits=limits,
            ),
            encoding="utf-8",
        )
        container.write_text(
            _CONTAINER.format(
                what=what,
                image=name.lower(),
                file=container,
                folder=folder,
                version=nnunet_fedharm.__version__,
                command=command,
                note=note,
                options=options,
            ),
            encoding="utf-8",
        )
    return [unit, container]


def _plain(name: str) -> str:
    """Without what systemd would read as its own sign."""
    return "".join(sign for sign in name if sign.isalnum() or sign in " -_.,")
