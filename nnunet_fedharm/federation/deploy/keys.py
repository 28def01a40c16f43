"""Keys of a consortium: each site's node key (EC P-384, as Flower wants), the coordinator's signing key (Ed25519), secrets."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from nnunet_fedharm.errors import SetupError


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner can read, from its first byte on."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
        stream.write(content)


def make_secret(path: Path) -> None:
    """Write 32 random bytes as text."""
    write_private(path, secrets.token_hex(32).encode())


def make_node_key(path: Path, *, comment: str) -> str:
    """Write a site's private key and, with the ending .pub, its public line; returns the line."""
    key = ec.generate_private_key(ec.SECP384R1())
    write_private(path, _openssh(key))
    line = f"{public_line(key.public_key())} {comment}"
    path.with_suffix(".pub").write_text(line + "\n", encoding="utf-8")
    return line


def make_signing_key(path: Path) -> str:
    """Write the coordinator's signing key; returns its public line."""
    key = ed25519.Ed25519PrivateKey.generate()
    write_private(path, _openssh(key))
    return public_line(key.public_key())


def load_signing_key(path: Path) -> ed25519.Ed25519PrivateKey:
    """The coordinator's signing key.

    Raises:
        SetupError: it is not there, or something else.
    """
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), password=None)
    except FileNotFoundError as error:
        raise SetupError(f"The signing key {path} is not there. Say where it is: --signing-key FILE.") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SetupError(f"{path} is not the signing key that `nnunet-fedharm server init` made.") from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise SetupError(f"{path} is not the signing key that `nnunet-fedharm server init` made.")
    return key


def public_line(key: ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey) -> str:
    """A public key as one line of text, without a comment."""
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def parse_node_key(text: str, *, source: str) -> ec.EllipticCurvePublicKey:
    """A site's public key from its line.

    Raises:
        SetupError: it is another kind of key, or a private one.
    """
    if "PRIVATE KEY" in text:
        raise SetupError(
            f"{source} holds a private key. It must never leave its site: have the site make a new one "
            "(`nnunet-fedharm site join … --new-key`), and send the line from node.pub."
        )
    try:
        key = serialization.load_ssh_public_key(text.strip().encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SetupError(
            f"{source} holds no public key; it is one line that begins with ecdsa-sha2-nistp384."
        ) from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise SetupError(f"{source} holds another kind of key; it is one line that begins with ecdsa-sha2-nistp384.")
    return key


def parse_signing_key(line: str) -> ed25519.Ed25519PublicKey:
    """The coordinator's public key from its line.

    Raises:
        SetupError: it is something else.
    """
    damaged = "The consortium file's signing_key is damaged. Ask the coordinator for the file again."
    try:
        key = serialization.load_ssh_public_key(line.strip().encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SetupError(damaged) from error
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise SetupError(damaged)
    return key


def key_to_flower(key: ec.EllipticCurvePublicKey) -> bytes:
    """A public key as Flower's registry keeps it."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _openssh(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
