"""Keys that wrap a model's secrets: from files, from the environment, or kept by AWS KMS.

The settings name them. The first wraps what is new, all of them open what is there: so a key is replaced by naming the
new one before the old one, and wrapping anew. A key is never written, shown or logged; its id is.
"""

from __future__ import annotations

import base64
import binascii
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from modelpress.cipher.stream import KEY_BYTES, derive
from modelpress.errors import ConfigError, CorruptionError, EncryptionKeyError
from modelpress.manifest import canonical_json
from modelpress.settings import Settings
from modelpress.store.local import local_errors, write_secret

NONCE_BYTES = 12
ID_LABEL = b"modelpress wrapping key id v1"
MAX_KEY_FILE_BYTES = 4096
MISSING = (
    "set MODELPRESS_KEY_FILE (`modelpress keys make FILE` makes one), MODELPRESS_KEY or MODELPRESS_KMS_KEY_ID to the "
    "key; `modelpress keys show NAME` tells which"
)


class WrappingKey(Protocol):
    """Wraps a few bytes, and opens what it wrapped; `context` must be the same for both."""

    algorithm: str

    def wrap(self, data: bytes, context: Mapping[str, str]) -> tuple[str, bytes]:
        """Id of the key, and the wrapped bytes.

        Raises:
            AccessDeniedError: it may not be used for this.
            StoreUnavailableError: whoever keeps it does not answer.
        """

    def unwrap(self, key_id: str, wrapped: bytes, context: Mapping[str, str]) -> bytes | None:
        """The bytes; None where another key wrapped them.

        Raises:
            CorruptionError: they were wrapped by this key and changed since, or for another context.
            AccessDeniedError: it may not be used for this.
            StoreUnavailableError: whoever keeps it does not answer.
        """


class LocalKey:
    """A key in this process: AES-256-GCM with a random nonce, the context as associated data.

    Args:
        key: 32 random bytes.
    """

    algorithm = "AES-256-GCM"

    def __init__(self, key: bytes) -> None:
        self.id = derive(key, ID_LABEL, 16).hex()
        self._cipher = AESGCM(key)

    def __str__(self) -> str:
        return f"{self.algorithm} key {self.id}"

    def wrap(self, data: bytes, context: Mapping[str, str]) -> tuple[str, bytes]:
        """Id and wrapped bytes; see `WrappingKey`."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        return self.id, nonce + self._cipher.encrypt(nonce, data, canonical_json(dict(context)))

    def unwrap(self, key_id: str, wrapped: bytes, context: Mapping[str, str]) -> bytes | None:
        """The bytes, or None; see `WrappingKey`."""
        if key_id != self.id:
            return None
        try:
            return self._cipher.decrypt(wrapped[:NONCE_BYTES], wrapped[NONCE_BYTES:], canonical_json(dict(context)))
        except (InvalidTag, ValueError):
            raise CorruptionError(
                f"opening what key {self.id} wrapped",
                found="other bytes, or bytes that were wrapped for another place",
                expected=", ".join(f"{name} {value}" for name, value in context.items()),
            ) from None


def wrapping_keys(settings: Settings) -> list[WrappingKey]:
    """The keys that the settings name, those of KMS first, then files, then the environment; perhaps none.

    Raises:
        ConfigError: one is no key; where it came from is told, and nothing of it.
    """
    found: list[WrappingKey] = []
    if names := [name for one in settings.kms_key_id.split(",") if (name := one.strip())]:
        from modelpress.store.kms import KmsKey

        found += [KmsKey(name, settings) for name in names]
    for path in filter(None, settings.key_file.split(os.pathsep)):
        with local_errors(f"reading the key in {path}"), Path(path).open("rb") as file:
            found.append(LocalKey(_parse(file.read(MAX_KEY_FILE_BYTES), f"the file {path} of MODELPRESS_KEY_FILE")))
    texts = filter(None, settings.key.get_secret_value().split(","))
    return found + [LocalKey(_parse(text.encode(), "MODELPRESS_KEY")) for text in texts]


def first(keys: Sequence[WrappingKey], doing: str) -> WrappingKey:
    """The key that wraps.

    Raises:
        EncryptionKeyError: there is none.
    """
    if not keys:
        raise EncryptionKeyError(doing, found="no key in the settings", expected="one", fix=MISSING)
    return keys[0]


def make_key_file(path: Path) -> str:
    """Write a new key to a file that only its owner reads; its id.

    Raises:
        ConfigError: the file exists.
        StoreError: it cannot be written; nothing of it stays.
    """
    doing, key = f"making a key in {path}", secrets.token_bytes(KEY_BYTES)
    fix = "give another path: a key that is lost takes with it all that it wrapped"
    write_secret(path, base64.b64encode(key) + b"\n", doing, fix)
    return LocalKey(key).id


def _parse(text: bytes, origin: str) -> bytes:
    try:
        key = base64.b64decode(text.strip(), validate=True)
    except binascii.Error:
        key = b""
    if len(key) != KEY_BYTES:
        raise ConfigError(
            f"reading the key in {origin}",
            found="something else",
            expected=f"base64 of {KEY_BYTES} bytes, as `modelpress keys make FILE` writes it",
        ) from None
    return key
