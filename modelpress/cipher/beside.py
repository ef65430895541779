"""What lies beside an encrypted pack and tells of it: sealed as the pack's blobs are, under the same secret."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence

from modelpress.cipher import secrets
from modelpress.cipher.stream import Opener, seal
from modelpress.cipher.wrapping import WrappingKey, wrapping_keys
from modelpress.manifest import Encryption, Plain
from modelpress.settings import read_settings
from modelpress.store.base import Store


def secret_of(store: Store, name: str, encryption: Encryption, wrapping: Sequence[WrappingKey] | None = None) -> bytes:
    """The secret that a pack of this name is encrypted with, opened by the keys that the settings name, or by these.

    Raises:
        EncryptionKeyError, CorruptionError, AccessDeniedError, StoreUnavailableError: see `secrets.find`.
    """
    keys = wrapping_keys(read_settings()) if wrapping is None else wrapping
    return secrets.find(store, name, encryption.secret, keys)


def seal_bytes(data: bytes, secret: bytes, encryption: Encryption, doing: str) -> tuple[Plain, bytes]:
    """Digest and length of some bytes, and the bytes sealed; the same bytes give the same ones."""
    plain = Plain(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
    return plain, b"".join(seal(io.BytesIO(data), plain, secret, encryption, doing))


def open_bytes(sealed: bytes, plain: Plain, secret: bytes, encryption: Encryption, doing: str) -> bytes:
    """What `seal_bytes` was given.

    Raises:
        CorruptionError: they are not what was sealed so, or under another secret.
    """
    return Opener(plain, secret, encryption, doing).open(sealed)
