"""The app that runs at every site, signed once by the coordinator.

Flower ships an app to each site and loads what it names. With `--trusted-entities` a SuperNode takes only apps that somebody it
knows has signed. Flower 1.41 gets such signatures from its Hub; here the coordinator signs, offline, and the SuperLink's store of
apps holds app and signature together, from where Flower hands both to the sites. The app holds no code, it names the installed
nnunet_fedharm; any other app is refused, whoever submits it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Mapping
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ed25519
from flwr.cli.build import build_fab_from_disk
from flwr.supercore.primitives.asymmetric_ed25519 import create_message_to_sign, decode_base64url

from nnunet_fedharm.errors import SetupError
from nnunet_fedharm.federation.daemon import app_folder
from nnunet_fedharm.federation.deploy.keys import parse_signing_key

APP_ID = "@nnunet-fedharm/nnunet-fedharm"
"""Publisher and name in the app's pyproject.toml."""
_LICENSE = "valid_license"
"""A SuperNode looks for this word of the Hub before it reads signatures."""


def build_app() -> bytes:
    """The app of the installed nnunet_fedharm, the same bytes wherever the same release is installed."""
    return bytes(build_fab_from_disk(app_folder()))


def app_hash(app: bytes) -> str:
    """SHA-256 by which Flower knows an app."""
    return hashlib.sha256(app).hexdigest()


def sign_app(app: bytes, key: ed25519.Ed25519PrivateKey) -> dict[str, Any]:
    """The coordinator's signature: over the time and the app's hash."""
    signed_at = int(time.time())
    signature = key.sign(create_message_to_sign(hashlib.sha256(app).digest(), signed_at))
    return {"signed_at": signed_at, "signature": base64.urlsafe_b64encode(signature).decode()}


def check_signature(app: bytes, signature: Mapping[str, Any], signing_key: str) -> None:
    """Refuse an app that the coordinator has not signed.

    Raises:
        SetupError: it is not signed by that key.
    """
    try:
        message = create_message_to_sign(hashlib.sha256(app).digest(), int(signature["signed_at"]))
        parse_signing_key(signing_key).verify(decode_base64url(str(signature["signature"])), message)
    except (InvalidSignature, KeyError, ValueError, TypeError) as error:
        raise SetupError(
            "The app is not signed by this consortium's signing key. Run `nnunet-fedharm server sign` with that key."
        ) from error


def key_id(signing_key: str) -> str:
    """Name of the signing key for Flower."""
    return "fpk_" + hashlib.sha256(" ".join(signing_key.split()[:2]).encode()).hexdigest()[:32]


def verifications(signature: Mapping[str, Any], signing_key: str) -> dict[str, str]:
    """The signature as Flower carries it to the sites."""
    return {key_id(signing_key): json.dumps(dict(signature)), _LICENSE: "Valid"}


def trusted_entities(signing_key: str) -> str:
    """Content of a SuperNode's `--trusted-entities` file."""
    return f"{key_id(signing_key)}: '{' '.join(signing_key.split()[:2])} coordinator'\n"
