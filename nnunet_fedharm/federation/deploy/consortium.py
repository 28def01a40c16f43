"""The consortium file: everything public that a site needs to know whom to trust. The coordinator sends it to each hospital."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import serialization

import nnunet_fedharm
from nnunet_fedharm.errors import SetupError
from nnunet_fedharm.federation.deploy.certificates import split_address
from nnunet_fedharm.federation.deploy.keys import parse_signing_key
from nnunet_fedharm.federation.site_names import check_site_names

CONSORTIUM_FILE = "consortium.toml"
_PACKAGES = ("nnunetv2", "torch", "flwr")


@dataclass(frozen=True, kw_only=True)
class Consortium:
    """Who belongs together, and what everybody can check.

    Attributes:
        name: of the study.
        addresses: host:port of the server, as sites reach it; the first one is used.
        sites: names of the expected sites.
        ca_certificate: PEM of the consortium's own authority, the only one that a site believes.
        signing_key: public line of the key that signs the app.
        app_sha256: hash of that app.
        versions: package -> release that the server runs (torch without its patch number).
    """

    name: str
    addresses: tuple[str, ...]
    sites: tuple[str, ...]
    ca_certificate: str
    signing_key: str
    app_sha256: str
    versions: Mapping[str, str]

    def __post_init__(self) -> None:
        if not self.addresses:
            raise SetupError("A consortium needs an address by which sites reach its server.")
        for address in self.addresses:
            split_address(address)
        check_site_names(self.sites, error=SetupError)
        parse_signing_key(self.signing_key)

    @property
    def fingerprint(self) -> str:
        """Whom to trust, short enough to be read on the telephone: of the authority and the signing key."""
        try:
            certificate = x509.load_pem_x509_certificate(self.ca_certificate.encode())
        except ValueError as error:
            raise SetupError("The consortium file's ca_certificate is damaged. Ask for the file again.") from error
        key = " ".join(self.signing_key.split()[:2]).encode()
        digest = hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER) + key).hexdigest()[:32]
        return "-".join(digest[start : start + 4] for start in range(0, 32, 4))

    def to_toml(self) -> str:
        """The file's text."""
        lines = [
            "# Send this file to every site. It holds no secret; the site compares the fingerprint with you by telephone.",
            f"name = {json.dumps(self.name)}",
            f"fingerprint = {json.dumps(self.fingerprint)}",
            f"addresses = {json.dumps(list(self.addresses))}",
            f"sites = {json.dumps(list(self.sites))}",
            f"app_sha256 = {json.dumps(self.app_sha256)}",
            f"signing_key = {json.dumps(self.signing_key)}",
            f"ca_certificate = '''\n{self.ca_certificate.strip()}\n'''",
            "",
            "[versions]",
            *(f"{name} = {json.dumps(text)}" for name, text in sorted(self.versions.items())),
        ]
        return "\n".join(lines) + "\n"

    @classmethod
    def from_toml(cls, text: str, *, source: str) -> Consortium:
        """Inverse of `to_toml`.

        Raises:
            SetupError: it is something else, or was damaged on its way.
        """
        try:
            data = tomllib.loads(text)
        except ValueError as error:
            raise SetupError(f"{source} is no consortium file: {error}.") from error
        wanted = {item.name for item in fields(cls)} | {"fingerprint"}
        if set(data) != wanted:
            odd = sorted(set(data) ^ wanted)[0]
            raise SetupError(f"{source} is no consortium file of this release: it {_state(odd, wanted)} {odd!r}.")
        return _from_data(cls, data, source)

    @classmethod
    def load(cls, path: Path) -> Consortium:
        """Read a file.

        Raises:
            SetupError: it is missing or damaged.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SetupError(
                f"Cannot read the consortium file {path}. `nnunet-fedharm server init` makes it."
            ) from error
        return cls.from_toml(text, source=str(path))


def installed_versions() -> dict[str, str]:
    """Releases that have to agree everywhere."""
    found = {"nnunet_fedharm": nnunet_fedharm.__version__}
    for package in _PACKAGES:
        try:
            text = version(package)
        except PackageNotFoundError:
            text = "missing"
        found[package] = ".".join(text.split("+")[0].split(".")[:2]) if package in ("torch", "flwr") else text
    return found


def version_differences(consortium: Consortium) -> list[str]:
    """One sentence for each package whose release differs here."""
    own = installed_versions()
    return [
        f"{package} is {own.get(package, 'missing')} here and {wanted} at the server."
        for package, wanted in sorted(consortium.versions.items())
        if own.get(package) != wanted
    ]


def _state(odd: str, wanted: set[str]) -> str:
    return "lacks" if odd in wanted else "has the unknown key"


def _from_data(cls: type[Consortium], data: Mapping[str, Any], source: str) -> Consortium:
    lists = {"addresses", "sites"}
    for name, value in data.items():
        kind: type = dict if name == "versions" else list if name in lists else str
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
        if not isinstance(value, kind) or not all(isinstance(item, str) for item in inner):
            raise SetupError(f"{source} has {name} = {value!r}; {kind.__name__} of texts belongs there.")
    values: dict[str, Any] = {
        name: tuple(value) if name in lists else value for name, value in data.items() if name != "fingerprint"
    }
    found = cls(**values)
    if found.fingerprint != data["fingerprint"]:
        raise SetupError(
            f"{source} was changed on its way: its fingerprint is {found.fingerprint}, not {data['fingerprint']}. "
            "Ask the coordinator for the file again."
        )
    return found
