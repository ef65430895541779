"""The blobs of one pack, wherever they lie: the store, or this machine's cache in front of it."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator

from modelpress import keys
from modelpress.cache import BlobCache
from modelpress.cipher import Opener, opener
from modelpress.errors import CorruptionError, NotFoundError, SetupError
from modelpress.load.names import MIN_PREFIX
from modelpress.manifest import Manifest
from modelpress.progress import Progress, silent
from modelpress.store.base import Store

FIX = "publish the pack again: it sends what is missing; a damaged blob must be deleted first"


class GivenUpError(Exception):
    """Whoever reads has ended: nobody wants the rest."""


class Blobs:
    """Reads blobs by their sha256, never more bytes than the manifest says; errors name the pack's part.

    Safe to use from threads. `progress` counts the bytes of whole blobs, in the thread that brought the last one.
    """

    def __init__(
        self, store: Store, manifest: Manifest, progress: Progress = silent, cache: BlobCache | None = None
    ) -> None:
        self._store, self._cache, self._progress = store, cache, progress
        self._sizes, self._openers = manifest.blobs(), opener(store, manifest)
        self._pack = f"{manifest.name}@{manifest.digest[:MIN_PREFIX]}"
        self._parts = {shard.sha256: f"shard {number} ({shard.sha256})" for number, shard in enumerate(manifest.shards)}
        self._parts |= {entry.stored_sha256: f"file {entry.name!r}" for entry in manifest.blob_files()}
        self._seen: set[str] = set()
        self._lock = threading.Lock()

    def size(self, digest: str) -> int:
        """Length of a blob."""
        return self._sizes[digest]

    def opener(self, digest: str) -> Opener | None:
        """What turns the stored bytes of a blob into plain ones; None where they are plain."""
        return self._openers(digest, f"reading {self._parts[digest]} of pack {self._pack}")

    def fetch(self, digest: str, stopped: threading.Event | None = None) -> bytes:
        """A whole blob, opened where the pack is encrypted.

        A plain one comes from the store as it is, for the caller to verify; any other is verified, and from the cache.
        `stopped`, when it is set, ends the call, however silent the store is.

        Raises:
            NotFoundError: there is none.
            CorruptionError: it holds less than the manifest says, or what its key does not open.
            SetupError: it is larger than this machine's memory.
            GivenUpError: `stopped` was set.
        """
        opening = self.opener(digest)
        if self._cache is None and opening is None and stopped is None:
            with self._named(digest):
                data = self._store.get(keys.blob(digest), 0, self._sizes[digest])
            self._count(digest)
            return data

        def arrived(_: memoryview) -> None:
            if stopped is not None and stopped.is_set():
                raise GivenUpError

        buffer = self._buffer(digest)
        if self._cache is not None or opening is not None:
            self.read_into(digest, memoryview(buffer), arrived)
        else:
            with self._named(digest):
                self._store.read_into(keys.blob(digest), buffer, 0, arrived)
            self._count(digest)
        return opening.open(buffer) if opening is not None else bytes(buffer)

    def read_into(self, digest: str, view: memoryview, arrived: Callable[[memoryview], None]) -> None:
        """Fill `view` with a blob; returns when its digest holds.

        `arrived` gets every byte in order, before that is known, and now and then none; what it raises ends the call.

        Raises:
            NotFoundError: there is none.
            CorruptionError: it holds other bytes, or less.
        """
        if self._cache is None:
            self._from_store(digest, view, arrived)
        elif self._cache.read_into(digest, view) or not self._fetched(self._cache, digest, view, arrived):
            arrived(view)
        self._count(digest)

    def _fetched(self, cache: BlobCache, digest: str, view: memoryview, arrived: Callable[[memoryview], None]) -> bool:
        """Fetch a blob from the store and keep it, unless another has kept it since the first look: then False."""
        with cache.fetching(digest, lambda: arrived(view[:0])):
            if cache.read_into(digest, view):
                return False
            self._from_store(digest, view, arrived)
            cache.keep(digest, view)
            return True

    def _from_store(self, digest: str, view: memoryview, arrived: Callable[[memoryview], None]) -> None:
        hashed = hashlib.sha256()

        def seen(data: memoryview) -> None:
            hashed.update(data)
            arrived(data)

        with self._named(digest):
            self._store.read_into(keys.blob(digest), view, 0, seen)
            if hashed.hexdigest() != digest:
                raise CorruptionError(f"reading {digest}", found=f"{len(view)} bytes, sha256 {hashed.hexdigest()}")

    def _buffer(self, digest: str) -> bytearray:
        try:
            return bytearray(self._sizes[digest])
        except (MemoryError, OverflowError) as error:
            raise SetupError(
                f"reading {self._parts[digest]} of pack {self._pack}",
                found=f"{self._sizes[digest]} bytes, and no memory for them",
                expected="a pack that this machine can hold",
            ) from error

    @contextlib.contextmanager
    def _named(self, digest: str) -> Iterator[None]:
        """Errors that name the part of the pack."""
        doing = f"reading {self._parts[digest]} of pack {self._pack}"
        try:
            yield
        except NotFoundError as error:
            found = f"no object {self._store.uri}/{keys.blob(digest)}"
            raise NotFoundError(doing, found=found, expected=f"{self._sizes[digest]} bytes", fix=FIX) from error
        except CorruptionError as error:
            raise CorruptionError(
                doing,
                found=f"{error.found} under {self._store.uri}/{keys.blob(digest)}",
                expected=f"{self._sizes[digest]} bytes with sha256 {digest}",
                fix=FIX,
            ) from error

    def _count(self, digest: str) -> None:
        with self._lock:
            self._seen.add(digest)
            done = sum(self._sizes[item] for item in self._seen)
            self._progress(done, sum(self._sizes.values()), self._parts[digest])
