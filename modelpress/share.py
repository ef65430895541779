"""Short-lived access to one pack, for a process without credentials: a file of links."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from pydantic import SecretStr

from modelpress import keys, pointer
from modelpress.errors import ConfigError, NotFoundError
from modelpress.load.base import load_base
from modelpress.load.names import load_manifest, resolve
from modelpress.store.base import Store

if TYPE_CHECKING:
    from modelpress.store.links import Links

MAX_SECONDS = 7 * 24 * 3600
"""What a signature of S3 is good for at most."""
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 24 * 3600}


def share(store: Store, name: str, ref: str, seconds: int) -> Links:
    """Links to all objects that loading a pack needs.

    They are its manifest, signatures and blobs; the same of its base, where it is stored as the difference to one; the
    model's wrapped secrets, where one is encrypted (who loads it needs the key that opens them); and where `ref` is an
    alias, the entry that it stands on.

    Whoever has the links reads the pack until they end: nothing takes them back but the credentials that signed them.

    Raises:
        ConfigError: `seconds` is not between 1 and `MAX_SECONDS`.
        StoreUnfitError: the store has no links.
        NotFoundError: no such pack, or an object of it is missing.
        and see `load.resolve` and `load.load_manifest`.
    """
    from modelpress.store.links import Link, Links

    if not 1 <= seconds <= MAX_SECONDS:
        raise ConfigError(f"sharing {name}@{ref}", found=f"{seconds} seconds", expected=f"1 to {MAX_SECONDS} (7 days)")
    digest = resolve(store, name, ref)
    manifest = load_manifest(store, name, digest)
    packs = [manifest] if manifest.base is None else [manifest, load_base(store, manifest, manifest.base)]
    wanted = [keys.manifest(name, pack.digest) for pack in packs]
    wanted += sorted({keys.blob(blob) for pack in packs for blob in pack.blobs()})
    wanted += [info.key for pack in packs for info in store.list(keys.signatures(name, pack.digest))]
    if any(pack.encryption for pack in packs):
        wanted += [info.key for info in store.list(keys.secrets(name))]
    if keys.is_alias(ref) and (entry := pointer.current(store, name, ref)) is not None and entry.pack == digest:
        wanted.append(keys.pointer(name, ref, entry.number))
    expires = datetime.now(UTC) + timedelta(seconds=seconds)
    objects = {}
    for key in wanted:
        info = store.info(key)
        if info is None:
            raise NotFoundError(f"sharing {name}@{ref}", found=f"no object {store.uri}/{key}", fix="publish it again")
        url = SecretStr(store.link(key, seconds))
        objects[key] = Link(url=url, size_bytes=info.size_bytes, modified=info.modified)
    return Links(name=name, pack=digest, expires=expires, objects=objects)


def parse_duration(text: str) -> int:
    """Seconds of `90s`, `30m`, `1h`, `7d`.

    Raises:
        ConfigError: it is none.
    """
    match = re.fullmatch(r"([0-9]{1,9})([smhd])", text)
    if match is None:
        raise ConfigError("reading how long links work", found=repr(text), expected="such as 90s, 30m, 1h or 7d")
    return int(match[1]) * UNITS[match[2]]
