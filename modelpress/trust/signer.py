"""Private keys: Ed25519, in a PEM file that nobody else may read."""

from __future__ import annotations

import base64
import hashlib
import os
import stat
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_public_key,
    load_pem_private_key,
)

from modelpress.errors import ConfigError
from modelpress.store.local import write_secret
from modelpress.trust.dsse import Envelope, pae

MAX_KEY_BYTES = 64 * 2**10
PRIVATE_MODE = 0o600
PASSPHRASE = "MODELPRESS_SIGNING_KEY_PASSPHRASE"


class Signer:
    """A private key, and the id that its signatures go by."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public_key = encode_public(key.public_key())
        """Base64 of the public key, as a trust file holds it."""
        self.key_id = key_id(key.public_key())

    def envelope(self, payload_type: str, payload: bytes) -> Envelope:
        """The payload, signed. The same payload always gives the same bytes."""
        return Envelope(payload_type, payload, self.key_id, self._key.sign(pae(payload_type, payload)))

    def save(self, path: Path, passphrase: str = "") -> None:
        """Write the key to a new file that only its owner may read.

        Raises:
            ConfigError: the file exists.
            StoreError: it can't be written; nothing of it stays.
        """
        protection: KeySerializationEncryption = NoEncryption()
        if passphrase:
            protection = BestAvailableEncryption(passphrase.encode())
        data = self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, protection)
        write_secret(path, data, f"writing a new key to {path}", "name a new file; keys are never written over")

    @classmethod
    def generate(cls) -> Signer:
        """A new key, in memory alone."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path, passphrase: str = "") -> Signer:
        """Read a private key.

        Raises:
            ConfigError: the file is not there, may be read or changed by others, holds no Ed25519 key, or the
                passphrase is missing or wrong.
        """
        doing = f"reading the signing key {path}"
        try:
            with path.open("rb") as file:
                _check_private(os.fstat(file.fileno()).st_mode, doing, path)
                data = file.read(MAX_KEY_BYTES)
        except OSError as error:
            raise ConfigError(doing, found=error.strerror, fix="modelpress trust new-key makes one") from error
        try:
            key = load_pem_private_key(data, passphrase.encode() if passphrase else None)
        except TypeError as error:  # cryptography's word for one that is missing, or not needed
            found = "a passphrase for a key that has none" if passphrase else "a key with a passphrase, and none given"
            raise ConfigError(doing, found=found, fix=f"set, or unset, {PASSPHRASE}") from error
        except (ValueError, UnsupportedAlgorithm) as error:
            found = "a wrong passphrase, or no private key" if passphrase else "no private key"
            raise ConfigError(doing, found=found, expected="Ed25519, PEM (PKCS8)") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigError(doing, found=type(key).__name__.lstrip("_"), expected="an Ed25519 key")
        return cls(key)


def new_key(path: Path, passphrase: str = "") -> Signer:
    """Make a private key in a new file that only its owner may read; see `Signer.save`."""
    signer = Signer.generate()
    signer.save(path, passphrase)
    return signer


def encode_public(key: Ed25519PublicKey) -> str:
    """Base64 of the key's SubjectPublicKeyInfo: the one line inside `openssl pkey -pubout`."""
    return base64.b64encode(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).decode()


def decode_public(text: str) -> Ed25519PublicKey:
    """Read what `encode_public` gives.

    Raises:
        ValueError: it is no such thing.
    """
    try:
        key = load_der_public_key(base64.b64decode(text, validate=True))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ValueError("not the base64 of a public key") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError("not an Ed25519 key")
    return key


def key_id(key: Ed25519PublicKey) -> str:
    """sha256 (hex) of the key's SubjectPublicKeyInfo."""
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def holds(key: Ed25519PublicKey, envelope: Envelope) -> bool:
    """Whether the envelope's signature is by this key."""
    try:
        key.verify(envelope.signature, pae(envelope.payload_type, envelope.payload))
    except InvalidSignature:
        return False
    return True


def _check_private(mode: int, doing: str, path: Path) -> None:
    if os.name == "posix" and stat.S_IMODE(mode) & 0o077:
        raise ConfigError(
            doing,
            found=f"mode {stat.S_IMODE(mode):04o}: others than its owner may use it",
            expected=f"mode {PRIVATE_MODE:04o}",
            fix=f"chmod 600 {path}; if others could read it, make a new key and revoke this one",
        )
