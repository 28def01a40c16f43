"""Cryptography of the secure sum: Flower's primitives, and a stream cipher where Flower's own generator is too weak.

This is the only module of the room that imports flwr. Key agreement is ECDH on P-384 with HKDF-SHA256, shares are encrypted with
Fernet (AES-128-CBC and HMAC-SHA256), secrets are shared by Shamir's scheme over GF(2^128): all three as Flower's own legacy
SecAgg+ uses them. Its `pseudo_rand_gen` is not used: it folds the key to 32 bits for a Mersenne Twister and never draws the
largest value, so its masks can be found by trial and are not uniform. Masks here are ChaCha20's key stream under the whole key.

References:
    Shamir, "How to Share a Secret", CACM 1979. RFC 7539 (ChaCha20). RFC 5869 (HKDF).
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from itertools import combinations, islice

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.fernet import InvalidToken
from cryptography.hazmat.primitives import hashes, hmac
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt, encrypt, generate_shared_key
from flwr.common.secure_aggregation.secaggplus_utils import share_keys_plaintext_concat as address
from flwr.common.secure_aggregation.secaggplus_utils import share_keys_plaintext_separate as read_address
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, generate_key_pairs, public_key_to_bytes

from nnunet_fedharm.errors import PrivacyError
from nnunet_fedharm.privacy.fixed_point import Ring

PrivateKey = ec.EllipticCurvePrivateKey
Check = Callable[[bytes], bool]
"""Tells a secret from anything else."""
SEED_BYTES = 32
_KEY_BYTES = 48
"""A private key of P-384 as a number."""
_CHUNK = 2**18
_SUBSETS = 200
"""Sets of shares that are tried where one of them is false."""

__all__ = [
    "Check",
    "PrivateKey",
    "add_mask",
    "address",
    "commitment",
    "create_shares",
    "is_tag",
    "key_from_bytes",
    "key_to_bytes",
    "lock",
    "narrow",
    "new_key",
    "open_sealed",
    "public_bytes",
    "read_address",
    "recover",
    "seal",
    "shared_seed",
    "tag",
    "unlock",
    "widen",
]


def new_key() -> PrivateKey:
    """A fresh private key."""
    return generate_key_pairs()[0]


def key_to_bytes(key: PrivateKey) -> bytes:
    """The private number alone: what is shared among the neighbours, six times shorter than PEM."""
    return key.private_numbers().private_value.to_bytes(_KEY_BYTES, "big")


def key_from_bytes(data: bytes) -> PrivateKey:
    """Inverse of `key_to_bytes`.

    Raises:
        PrivacyError: it is no private key.
    """
    try:
        return ec.derive_private_key(int.from_bytes(data, "big"), ec.SECP384R1())
    except ValueError as error:
        raise PrivacyError("A recovered key of the secure sum is none.") from error


def public_bytes(key: PrivateKey) -> bytes:
    """Its public key as PEM."""
    return public_key_to_bytes(key.public_key())


def _shared(key: PrivateKey, public: bytes) -> bytes:
    try:
        other = bytes_to_public_key(public)
        if not isinstance(other, ec.EllipticCurvePublicKey) or not isinstance(other.curve, ec.SECP384R1):
            raise ValueError(type(other))
        return generate_shared_key(key, other)
    except ValueError as error:
        raise PrivacyError("A public key of the secure sum is no point of P-384.") from error


def shared_seed(key: PrivateKey, public: bytes) -> bytes:
    """The 32 bytes that two sites agree on; the same from both sides.

    Raises:
        PrivacyError: the public key is none.
    """
    return base64.urlsafe_b64decode(_shared(key, public))


def seal(key: PrivateKey, public: bytes, plain: bytes) -> bytes:
    """Encrypted for the owner of the public key."""
    return encrypt(_shared(key, public), plain)


def open_sealed(key: PrivateKey, public: bytes, sealed: bytes) -> bytes:
    """Inverse of `seal`.

    Raises:
        PrivacyError: it was changed on the way, or is for somebody else.
    """
    try:
        return decrypt(_shared(key, public), sealed)
    except InvalidToken as error:
        raise PrivacyError("was changed on its way or is for somebody else") from error


def lock(key: bytes, plain: bytes) -> bytes:
    """Encrypted under 32 bytes that somebody may show later."""
    return encrypt(base64.urlsafe_b64encode(key), plain)


def unlock(key: bytes, locked: bytes) -> bytes:
    """Inverse of `lock`.

    Raises:
        PrivacyError: it is another key.
    """
    try:
        return decrypt(base64.urlsafe_b64encode(key), locked)
    except (InvalidToken, ValueError) as error:
        raise PrivacyError("was locked with another key") from error


def commitment(seed: bytes) -> bytes:
    """Binds a site to its seed without showing it: SHA-256 of 32 random bytes."""
    return hashlib.sha256(seed).digest()


def tag(secret: bytes, message: bytes) -> bytes:
    """HMAC-SHA256."""
    mac = hmac.HMAC(secret, hashes.SHA256())
    mac.update(message)
    return mac.finalize()


def is_tag(secret: bytes, message: bytes, found: bytes) -> bool:
    """Whether `found` is the message's tag; compared in constant time."""
    mac = hmac.HMAC(secret, hashes.SHA256())
    mac.update(message)
    try:
        mac.verify(found)
    except InvalidSignature:
        return False
    return True


def recover(shares: Sequence[bytes], threshold: int, holds: Check) -> bytes:
    """A secret from its shares, some of which may be false.

    Args:
        shares: of one secret, from different holders.
        threshold: how many make the secret.
        holds: tells the secret from anything else.

    Raises:
        PrivacyError: too few shares, or no set of them makes the secret.
    """
    if len(shares) < threshold:
        raise PrivacyError(f"has {len(shares)} shares, {threshold} are needed")
    for chosen in islice(combinations(shares, threshold), _SUBSETS):
        try:
            secret = combine_shares(list(chosen))
        except (ValueError, IndexError):  # the padding is wrong, or a share has another length
            continue
        if holds(secret):
            return secret
    raise PrivacyError("has shares that make another secret than it promised: one was changed")


def add_mask(total: Ring, seed: bytes, width: int, *, sign: int) -> None:
    """Add to (sign 1) or take from (-1) every entry its part of the seed's key stream, in place, a chunk at a time."""
    stream = Cipher(algorithms.ChaCha20(seed, bytes(16)), mode=None).encryptor()
    zeros = bytes(_CHUNK * width)
    for start in range(0, len(total), _CHUNK):
        part = total[start : start + _CHUNK]
        mask = widen(stream.update(zeros[: len(part) * width]), width)
        if sign > 0:
            part += mask
        else:
            part -= mask


def widen(data: bytes, width: int) -> Ring:
    """Entries of `width` bytes, little-endian, as 64-bit numbers."""
    if width == 8:
        return np.frombuffer(data, dtype="<u8").astype(np.uint64)
    if width == 4:
        return np.frombuffer(data, dtype="<u4").astype(np.uint64)
    count = len(data) // width
    whole = np.zeros((count, 8), dtype=np.uint8)
    whole[:, :width] = np.frombuffer(data, dtype=np.uint8).reshape(count, width)
    return whole.view("<u8").reshape(-1).astype(np.uint64, copy=False)


def narrow(ring: Ring, width: int) -> bytes:
    """Inverse of `widen`; what is above the width is dropped, which is the reduction to the ring."""
    whole = np.ascontiguousarray(ring, dtype="<u8").view(np.uint8).reshape(-1, 8)
    return whole[:, :width].tobytes()
