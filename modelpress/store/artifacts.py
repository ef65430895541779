"""Bytes by content: what tasks hand each other by reference instead of by value."""

from __future__ import annotations

import hashlib

from modelpress import keys
from modelpress.errors import ConfigError, CorruptionError
from modelpress.reports import ArtifactRef
from modelpress.settings import Settings
from modelpress.store.base import Store, open_store


def save_artifact(store: Store, data: bytes, *, replace: bool = False) -> ArtifactRef:
    """Store bytes under their own digest; what is there already is not sent again, unless `replace` mends it."""
    digest = hashlib.sha256(data).hexdigest()
    key = keys.blob(digest)
    info = None if replace else store.info(key)
    if info is None or info.size_bytes != len(data):
        # Without a condition: an object of another length under this digest is damaged, and writing mends it.
        store.put(key, data, sha256=digest)
    return ArtifactRef(uri=f"{store.uri}/{key}", sha256=digest, size_bytes=len(data))


def load_artifact(ref: ArtifactRef, settings: Settings | None = None) -> bytes:
    """Read the bytes behind a reference and check them.

    Raises:
        ConfigError: the reference does not lead to a blob with its digest.
        NotFoundError: the blob is gone.
        CorruptionError: it holds other bytes.
    """
    key = keys.blob(ref.sha256)
    if not ref.uri.endswith(f"/{key}"):
        raise ConfigError("loading an artifact", found=ref.uri, expected=f"a URI that ends with /{key}")
    data = open_store(ref.uri.removesuffix(f"/{key}"), settings).get(key)
    found = hashlib.sha256(data).hexdigest()
    if found != ref.sha256:
        raise CorruptionError(
            f"loading {ref.uri}",
            found=f"sha256 {found}",
            expected=f"sha256 {ref.sha256}",
            fix="delete this object and run again: the stage that made it makes it anew; or run once with "
            "MODELPRESS_REUSE=false, which writes over every output",
        )
    return data
