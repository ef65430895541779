"""A verified copy, on this machine's disk, of what is served: a server starts with it when the store does not answer.

The folder is a store of its own with the very keys of the other (`modelpress.keys`), so that what is read from it goes
the same way and is held to the same digests and signatures; only the pointer's log is cut to the entry that was loaded.
Blobs lie where `BlobCache` puts them, which is where a local store looks for them: they are kept while they are
fetched, and verified whenever they are read.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Collection
from itertools import islice
from pathlib import Path
from typing import Self

from modelpress import keys, load, pointer
from modelpress.cache import BlobCache
from modelpress.cipher.secrets import MAX_ENTRY_BYTES as MAX_SECRET_BYTES
from modelpress.errors import ModelpressError, NotFoundError, SetupError
from modelpress.load.blobs import Blobs
from modelpress.manifest import Manifest, needs
from modelpress.pointer import Pointer
from modelpress.store import Store
from modelpress.store.base import get_capped
from modelpress.store.local import LocalStore
from modelpress.trust.dsse import MAX_ENVELOPE_BYTES

if sys.platform != "win32":
    import fcntl

log = logging.getLogger("modelpress.serving")

MAX_SIGNATURES = 100
"""Of one manifest; more are not kept."""
MAX_SECRETS = 1000
"""Entries of a model's log of secrets; more are not kept."""

Alias = tuple[str, str]
"""Name of a pack, and of the alias that is followed."""


class Kept:
    """One server's folder. It is that server's alone while the server runs.

    Args:
        folder: made where it is not there.
        origin: the store whose packs are kept; copies are held to its trust.

    Raises:
        SetupError: the folder can't be written, or another server keeps its packs there.
    """

    def __init__(self, folder: Path, origin: Store) -> None:
        doing = f"keeping what is served in {folder}, MODELPRESS_SERVING_KEEP_FOLDER"
        if sys.platform == "win32":
            raise SetupError(doing, found="Windows", expected="a system with flock", fix="unset the variable")
        self._origin = origin
        self._store = LocalStore(folder)
        self._changing = threading.Lock()
        """Held while copies are made whole or deleted, so that none is deleted that another thread counts on."""
        self.cache = BlobCache(self._store.folder / "blobs", sys.maxsize)
        """What blobs are fetched through, so that they stay."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = (folder / "lock").open("wb")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise SetupError(
                doing, found="another server that keeps its packs there", expected="a folder for each server"
            ) from error
        except OSError as error:
            raise SetupError(doing, found=str(error), expected="a folder that this process may write") from error

    @property
    def store(self) -> Store:
        """The copies, as a store that is read like the other."""
        return self._store.held_to(self._origin.trust)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another server have the folder."""
        self._lock.close()

    def aliases(self) -> list[Alias]:
        """What is kept."""
        owners = (keys.pointer_owner(info.key) for info in self._store.list(keys.PACKS))
        return sorted({owner for owner in owners if owner is not None})

    def entry(self, name: str, alias: str) -> Pointer | None:
        """The entry that was loaded last, its signature checked where there is a trust file; None where none is kept.

        Raises:
            CorruptionError: it is not what it was.
            TrustError: no key that counts now vouches for it.
        """
        numbers = self._numbers(name, alias)
        return pointer.entry(self.store, name, alias, max(numbers)) if numbers else None

    def keep(self, entry: Pointer) -> None:
        """Copy what one entry needs, the entry itself last. A disk or a store that refuses is a warning in the log.

        Most blobs are here already: `cache` got them when the pack was loaded.
        """
        name, alias = entry.name, entry.alias
        if self._numbers(name, alias) == [entry.number] and self._same(entry):
            return
        try:
            with self._changing:
                for manifest in self._manifests(self._origin, name, entry.pack):
                    self._keep_pack(manifest)
                self._store.put(keys.pointer(name, alias, entry.number), entry.to_bytes())
                for number in self._numbers(name, alias):
                    if number != entry.number:
                        self._store.delete(keys.pointer(name, alias, number))
        except (ModelpressError, OSError) as error:
            log.warning("%s@%s: pack %s is served and not kept: %s", name, alias, entry.pack[:12], error)

    def sweep(self, serving: Collection[Alias]) -> None:
        """Delete the copies that no alias of `serving` needs. What can't be deleted is met again at the next."""
        try:
            with self._changing:
                self._sweep(serving)
        except (ModelpressError, OSError) as error:
            log.warning("clearing up %s: %s", self._store.folder, error)

    def _sweep(self, serving: Collection[Alias]) -> None:
        manifests, blobs = set[str](), set[str]()
        for name, alias in self.aliases():
            numbers = self._numbers(name, alias)
            if (name, alias) not in serving:
                for number in numbers:
                    self._store.delete(keys.pointer(name, alias, number))
                continue
            entry = pointer.entry(self._store, name, alias, max(numbers))
            for manifest in self._manifests(self._store, name, entry.pack):
                manifests.add(manifest.digest)
                blobs |= needed_blobs(manifest)
        names = {name for name, _ in serving}
        for info in list(self._store.list(keys.PACKS)):
            place = keys.place(info.key)
            if place is None or place.name not in names or (place.digest and place.digest not in manifests):
                self._store.delete(info.key)
        for blob in self.cache.blobs():
            if blob.digest not in blobs:
                self._store.delete(keys.blob(blob.digest))

    def _same(self, entry: Pointer) -> bool:
        try:
            return pointer.entry(self._store, entry.name, entry.alias, entry.number).digest == entry.digest
        except ModelpressError:
            return False

    def _manifests(self, store: Store, name: str, pack: str) -> list[Manifest]:
        manifest = load.load_manifest(store, name, pack)
        return [manifest, *(load.load_manifest(store, name, other) for other in needs(manifest))]

    def _keep_pack(self, manifest: Manifest) -> None:
        name, digest, have = manifest.name, manifest.digest, {blob.digest for blob in self.cache.blobs()}
        blobs = Blobs(self._origin, manifest, cache=self.cache)
        for missing in sorted(needed_blobs(manifest) - have):  # the disk was full, or the pack was loaded before
            blobs.fetch(missing)
        have = {blob.digest for blob in self.cache.blobs()}
        if missing_ones := needed_blobs(manifest) - have:
            raise NotFoundError(
                f"keeping pack {name}@{digest[:12]} in {self._store.folder}",
                found=f"{len(missing_ones)} blobs that the disk did not take",
                expected="room for what is served, and once more while it changes",
            )
        self._copy(keys.signatures(name, digest), MAX_SIGNATURES, MAX_ENVELOPE_BYTES)
        if manifest.encryption is not None:
            self._copy(keys.secrets(name), MAX_SECRETS, MAX_SECRET_BYTES)
        self._store.put(keys.manifest(name, digest), manifest.to_bytes())

    def _copy(self, prefix: str, most: int, most_bytes: int) -> None:
        """The small objects under a prefix; others may have put anything there, which is left."""
        for info in islice(self._origin.list(prefix), most):
            if info.size_bytes <= most_bytes and keys.place(info.key) is not None:
                self._store.put(info.key, get_capped(self._origin, info.key, most_bytes, f"keeping {info.key}"))

    def _numbers(self, name: str, alias: str) -> list[int]:
        found = (keys.pointer_number(info.key) for info in self._store.list(keys.pointers(name, alias)))
        return sorted(number for number in found if number is not None)


def needed_blobs(manifest: Manifest) -> set[str]:
    """Digests of what a load reads: shards and files, and not the reports."""
    return {shard.sha256 for shard in manifest.shards} | {file.stored_sha256 for file in manifest.files}
