"""The consortium's own certificate authority and the server's certificate. No public authority, no network."""

from __future__ import annotations

import ipaddress
import re
import ssl
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from nnunet_fedharm.errors import SetupError
from nnunet_fedharm.federation.deploy.keys import write_private
from nnunet_fedharm.federation.deploy.proxies import connect

CA_YEARS, SERVER_DAYS = 10, 397
"""The server's certificate is renewed once a year; the authority outlives the study."""
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*")
_LOCAL = ("localhost", "127.0.0.1")
"""Flower's own processes at the server speak TLS with the SuperLink too."""
_NOT_YET, _ENDED = 9, 10
"""OpenSSL's codes of a certificate outside of its time (X509_V_ERR_…)."""


def make_authority(name: str, certificate: Path, key: Path) -> None:
    """Write a new certificate authority; its key is needed again only to renew the server's certificate."""
    private = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name[:50]} authority")])
    own = x509.SubjectKeyIdentifier.from_public_key(private.public_key())
    built = (
        _builder(subject, subject, private, days=365 * CA_YEARS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign=True), critical=True)
        .add_extension(own, critical=False)
        .sign(private, hashes.SHA384())
    )
    write_private(key, _pem(private))
    certificate.write_bytes(built.public_bytes(serialization.Encoding.PEM))


def make_server_certificate(
    hosts: Sequence[str], *, authority: tuple[Path, Path], certificate: Path, key: Path
) -> None:
    """Write a new key and certificate of the server.

    Args:
        hosts: names and IP addresses by which sites reach it.
        authority: certificate and key of `make_authority`.

    Raises:
        SetupError: the authority's key is not there, or a host is no name.
    """
    if not authority[1].is_file():
        raise SetupError(f"{authority[1]} is missing. Put the authority's key back for this command.")
    issuer = x509.load_pem_x509_certificate(authority[0].read_bytes())
    signer = serialization.load_pem_private_key(authority[1].read_bytes(), password=None)
    if not isinstance(signer, ec.EllipticCurvePrivateKey):
        raise SetupError(f"{authority[1]} is not the key that `nnunet-fedharm server init` made.")
    private = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
    names = [check_host(host) for host in dict.fromkeys((*hosts, *_LOCAL))]
    built = (
        _builder(subject, issuer.subject, private, days=SERVER_DAYS)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(private.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA384())
    )
    write_private(key, _pem(private))
    certificate.write_bytes(built.public_bytes(serialization.Encoding.PEM))


def days_left(certificate: Path) -> int:
    """Days until a certificate ends; negative afterwards."""
    ends = x509.load_pem_x509_certificate(certificate.read_bytes()).not_valid_after_utc
    return (ends - datetime.now(UTC)).days


def check_server(address: str, authority: Path, *, seconds: float = 10.0, proxy: str = "") -> str:
    """Make a TLS connection to the server as a site does.

    Args:
        proxy: HTTP proxy of the site's settings; empty for none, whatever is exported.

    Returns:
        An empty text, or why the server cannot be reached now; it may be reachable later.

    Raises:
        SetupError: somebody answers who is not this consortium's server, or whose certificate is not valid now.
    """
    host, port = split_address(address)
    context = ssl.create_default_context(cafile=str(authority))
    try:
        with connect(host, port, proxy=proxy, seconds=seconds) as plain:
            context.wrap_socket(plain, server_hostname=host).close()
    except ssl.SSLCertVerificationError as error:
        raise SetupError(_why_not_believed(address, error)) from error
    except (OSError, ssl.SSLError) as error:
        way, guard = (" through the site's proxy", "proxy") if proxy else ("", "firewall")
        return (
            f"{address} does not answer{way} ({error}). Is the server running, and does the {guard} let TCP {port} out?"
        )
    return ""


def _why_not_believed(address: str, error: ssl.SSLCertVerificationError) -> str:
    clock = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    if error.verify_code == _ENDED:
        return (
            f"The server's certificate has ended: the coordinator runs `nnunet-fedharm server renew FOLDER` and restarts the "
            f"server. (This machine's clock says {clock}; if that is wrong, set it.)"
        )
    if error.verify_code == _NOT_YET:
        return f"The server's certificate is not valid yet: this machine's clock says {clock}; set it (NTP)."
    return (
        f"Who answers at {address} is not this consortium's server ({error.verify_message}). Ask the coordinator for the "
        "present consortium file, and compare its fingerprint by telephone."
    )


def split_address(address: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[IPv6]:port".

    Raises:
        SetupError: it is something else.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise SetupError(f"{address!r} is no address; write host:port, for example fed.example.org:9092.")
    return host.strip("[]"), int(port)


def check_host(host: str) -> x509.GeneralName:
    """A host as certificates name it.

    Raises:
        SetupError: it is neither a name nor an address.
    """
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if len(host) > 253 or not _HOST.fullmatch(host):
            raise SetupError(
                f"{host!r} is neither a host name nor an IP address, for example fed.example.org."
            ) from None
    return x509.DNSName(host)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, *, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))  # clocks differ
        .not_valid_after(now + timedelta(days=days))
    )


def _usage(*, sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign,
        key_cert_sign=sign,
        crl_sign=sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
