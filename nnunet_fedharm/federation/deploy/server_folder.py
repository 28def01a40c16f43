"""The consortium's folder at the server: what lies where, and how it is made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nnunet_fedharm.errors import SetupError
from nnunet_fedharm.federation.deploy import app_bundle, certificates, keys
from nnunet_fedharm.federation.deploy.consortium import CONSORTIUM_FILE, Consortium, installed_versions
from nnunet_fedharm.federation.deploy.settings_file import read_settings, writing
from nnunet_fedharm.federation.site_names import check_site_names
from nnunet_fedharm.nnunet_root import NnunetRoot

DEFAULT_PORT = 9092
_SETTINGS = "server.toml"


@dataclass(frozen=True)
class ServerFolder:
    """Paths below a consortium's folder.

    consortium.toml goes to the sites; `private/` goes nowhere; `server/` is the server's nnU-Net root with the results.
    """

    path: Path

    @property
    def consortium_file(self) -> Path:
        return self.path / CONSORTIUM_FILE

    @property
    def settings_file(self) -> Path:
        return self.path / _SETTINGS

    @property
    def private(self) -> Path:
        return self.path / "private"

    @property
    def ca_certificate(self) -> Path:
        return self.path / "tls" / "ca.crt"

    @property
    def ca_key(self) -> Path:
        return self.private / "ca.key"

    @property
    def certificate(self) -> Path:
        return self.path / "tls" / "server.crt"

    @property
    def certificate_key(self) -> Path:
        return self.private / "server.key"

    @property
    def signing_key(self) -> Path:
        return self.private / "signing.key"

    @property
    def operator_token(self) -> Path:
        return self.private / "operator.token"

    @property
    def superexec_secret(self) -> Path:
        return self.private / "superexec.secret"

    @property
    def app(self) -> Path:
        return self.path / "app" / "nnunet-fedharm.fab"

    @property
    def signature(self) -> Path:
        return self.path / "app" / "signature.json"

    @property
    def node_keys(self) -> Path:
        return self.path / "keys"

    @property
    def flower_home(self) -> Path:
        return self.path / "flower"

    @property
    def database(self) -> Path:
        return self.flower_home / "state.db"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def kept_run(self) -> Path:
        return self.path / "kept-run.json"

    @property
    def results(self) -> Path:
        return self.path / "server"

    def consortium(self) -> Consortium:
        """The public file.

        Raises:
            SetupError: this is no consortium's folder.
        """
        return Consortium.load(self.consortium_file)

    def settings(self) -> dict[str, Any]:
        """`host` and `port` that the SuperLink listens on.

        Raises:
            SetupError: the file is missing or damaged.
        """
        mend = f"`nnunet-fedharm server init {self.path}` makes it."
        return read_settings(self.settings_file, {"host": str, "port": int}, mend=mend)

    def registered(self) -> dict[str, str]:
        """Site -> line of its public key, of all sites that were registered."""
        found = sorted(self.node_keys.glob("*.pub"))
        return {path.stem: path.read_text(encoding="utf-8").strip() for path in found}

    def shut_out(self) -> set[str]:
        """Public keys that were removed or replaced, without their comments; Flower never takes one of them back."""
        lines = [line for path in self.node_keys.glob("*.removed") for line in path.read_text().splitlines()]
        return {" ".join(line.split()[:2]) for line in lines if line.strip()}

    def shut_out_key(self, site: str) -> None:
        """Move the key of a registered site to those that were removed."""
        path = self.node_keys / f"{site}.pub"
        with path.with_suffix(".removed").open("a", encoding="utf-8") as stream:
            stream.write(path.read_text(encoding="utf-8").strip() + "\n")
        path.unlink()


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """What `server init` is told.

    Attributes:
        hosts: names and IP addresses by which sites reach the server.
        bind: address that the SuperLink listens on.
    """

    name: str
    hosts: Sequence[str]
    sites: Sequence[str]
    port: int = DEFAULT_PORT
    bind: str = "0.0.0.0"


def init_server(path: Path, options: ServerOptions) -> ServerFolder:
    """Make a consortium's folder.

    Raises:
        SetupError: it is one already, an option cannot be used, or the folder cannot be written.
    """
    folder = ServerFolder(path.expanduser().resolve())
    with writing(folder.path):
        _make_folder(folder, options)
    return folder


def sign_again(folder: ServerFolder, signing_key: Path | None = None) -> Consortium:
    """Sign the app of the installed release, after an upgrade; the consortium file then has its hash and the versions.

    Raises:
        SetupError: the key is not this consortium's.
    """
    consortium, path = folder.consortium(), signing_key or folder.signing_key
    own = keys.public_line(keys.load_signing_key(path).public_key())
    if own.split()[:2] != consortium.signing_key.split()[:2]:
        raise SetupError(f"{path} is not this consortium's signing key, which the sites trust.")
    return _sign(folder, consortium, path)


def renew_certificate(folder: ServerFolder, hosts: Sequence[str] = ()) -> Consortium:
    """A new server certificate of the same authority, for the same addresses or for other ones.

    Raises:
        SetupError: the authority's key is not there.
    """
    consortium = folder.consortium()
    if hosts:
        addresses = tuple(_address(host, folder.settings()["port"]) for host in hosts)
        consortium = replace(consortium, addresses=addresses)
    _make_certificate(folder, [certificates.split_address(address)[0] for address in consortium.addresses])
    folder.consortium_file.write_text(consortium.to_toml(), encoding="utf-8")
    return consortium


def expect_sites(folder: ServerFolder, sites: Sequence[str]) -> list[str]:
    """Enter hospitals that come later into the consortium file; it is then theirs to join with.

    Returns:
        The names that were not in it.

    Raises:
        SetupError: a name cannot be used, or the file cannot be written.
    """
    check_site_names(sites, error=SetupError)
    consortium = folder.consortium()
    new = sorted(set(sites) - set(consortium.sites))
    if new:
        named = replace(consortium, sites=tuple(sorted((*consortium.sites, *new))))
        with writing(folder.path):
            half = folder.consortium_file.with_suffix(".writing")
            half.write_text(named.to_toml(), encoding="utf-8")
            half.replace(folder.consortium_file)
    return new


def _make_folder(folder: ServerFolder, options: ServerOptions) -> None:
    if folder.consortium_file.exists() or folder.private.exists():
        raise SetupError(
            f"{folder.path} is a consortium already. Its keys are never overwritten; `server sign` and `server renew` "
            "update it, another folder makes another consortium."
        )
    check_site_names(options.sites, error=SetupError)
    for host in options.hosts:
        certificates.check_host(host)
    for made in (folder.path / "tls", folder.path / "app", folder.node_keys, folder.flower_home, folder.logs):
        made.mkdir(parents=True, exist_ok=True)
    folder.path.chmod(0o700)
    folder.private.mkdir(mode=0o700)
    certificates.make_authority(options.name, folder.ca_certificate, folder.ca_key)
    _make_certificate(folder, options.hosts)
    signing_key = keys.make_signing_key(folder.signing_key)
    keys.make_secret(folder.operator_token)
    keys.make_secret(folder.superexec_secret)
    NnunetRoot(folder.results).create()
    folder.settings_file.write_text(f"host = {json.dumps(options.bind)}\nport = {options.port}\n", encoding="utf-8")
    consortium = Consortium(
        name=options.name,
        addresses=tuple(_address(host, options.port) for host in options.hosts),
        sites=tuple(sorted(set(options.sites))),
        ca_certificate=folder.ca_certificate.read_text(),
        signing_key=signing_key,
        app_sha256="",
        versions={},
    )
    _sign(folder, consortium, folder.signing_key)


def _sign(folder: ServerFolder, consortium: Consortium, signing_key: Path) -> Consortium:
    app = app_bundle.build_app()
    folder.app.write_bytes(app)
    signature = app_bundle.sign_app(app, keys.load_signing_key(signing_key))
    folder.signature.write_text(json.dumps(signature) + "\n", encoding="utf-8")
    signed = replace(consortium, app_sha256=app_bundle.app_hash(app), versions=installed_versions())
    folder.consortium_file.write_text(signed.to_toml(), encoding="utf-8")
    return signed


def _make_certificate(folder: ServerFolder, hosts: Sequence[str]) -> None:
    authority = (folder.ca_certificate, folder.ca_key)
    certificates.make_server_certificate(
        hosts, authority=authority, certificate=folder.certificate, key=folder.certificate_key
    )


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
