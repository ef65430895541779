"""Secrecy: the blobs of a pack, encrypted with keys that are derived from a secret of the model.

`wrapping` has the keys that the settings name, `secrets` the model's secrets that stand wrapped by them in the store,
`stream` the encryption of one blob, `pack` that of a whole pack, `beside` that of what tells of one. See
`container/FORMAT.md`, "Encryption", for the bytes and docs/decisions/0022-encryption.md for the reasons.
"""

from modelpress.cipher.beside import open_bytes, seal_bytes, secret_of
from modelpress.cipher.pack import opener, seal_pack
from modelpress.cipher.stream import Opener
from modelpress.cipher.wrapping import LocalKey, WrappingKey, wrapping_keys

__all__ = [
    "LocalKey",
    "Opener",
    "WrappingKey",
    "open_bytes",
    "opener",
    "seal_bytes",
    "seal_pack",
    "secret_of",
    "wrapping_keys",
]
