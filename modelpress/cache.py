"""Verified blobs on this machine's disk, shared by all its readers, so that a second load asks the store for none.

::

    <folder>/sha256/<digest>        a blob, named by its content
    <folder>/incoming/<unique>      one that is being written; locked by its writer
    <folder>/locks/<digest>         locked by who fetches the blob, so that others wait for it
    <folder>/lock                   locked by who makes room

Nothing in it is trusted: a blob is verified before it is written and each time it is read, and a damaged one is
dropped. A blob takes its name when it is whole. Locks are flock's, which end with their process, however that ends.
Whatever the disk refuses costs speed and never the load: the cache says so once, and is done without.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from modelpress import keys
from modelpress.errors import SetupError
from modelpress.settings import Settings, read_settings

if sys.platform != "win32":
    import fcntl

log = logging.getLogger("modelpress.cache")

BLOCK_BYTES = 4 * 2**20
LOOK_SECONDS = 0.05
"""How often somebody who waits for another's fetch looks."""
MAX_WAIT_SECONDS = 120.0
"""Longer than this nobody waits for another: it fetches for itself."""


@dataclass(frozen=True)
class CachedBlob:
    """One blob of the cache."""

    digest: str
    size_bytes: int
    used_at: float
    """When it was last read or written, in seconds since 1970."""


class BlobCache:
    """A folder of verified blobs. Safe to use from threads and from processes on one machine.

    Args:
        folder: made when the first blob is kept.
        max_bytes: what the blobs may take, those being written included.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = Path(os.path.abspath(folder)), max_bytes
        self._writes, self._telling = True, threading.Lock()

    def read_into(self, digest: str, view: memoryview) -> bool:
        """Fill `view` with a blob, if it is here and its digest holds; else False, and `view` holds anything."""
        path = self._path(digest)
        hashed, position = hashlib.sha256(), 0
        try:
            with path.open("rb", buffering=0) as file:
                while position < len(view) and (count := file.readinto(view[position : position + BLOCK_BYTES])):
                    hashed.update(view[position : position + count])
                    position += count
                whole = position == len(view) and not file.read(1)
        except FileNotFoundError:
            return False
        except OSError as error:
            log.warning("cannot read %s from the cache, the store is asked: %s", path, error)
            return False
        if not whole or hashed.hexdigest() != digest:
            log.warning("dropping %s from the cache: its bytes are not those of its name", path)
            self._drop(path)
            return False
        with contextlib.suppress(OSError):  # a folder that may only be read: others keep its order
            os.utime(path)
        return True

    def keep(self, digest: str, view: memoryview) -> None:
        """Keep a blob that was verified; what was read longest ago makes room. A disk that refuses is no error, nor is
        a bound that others fill with what they are writing: then it is not kept."""
        if not self._writes or len(view) > self.max_bytes:
            return
        path, incoming = self._path(digest), self.folder / "incoming" / uuid.uuid4().hex
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            incoming.parent.mkdir(exist_ok=True)
            file = self._begin(incoming, len(view))
            if file is None:
                return
            with file:
                try:
                    rest = view
                    while rest:
                        rest = rest[file.write(rest[:BLOCK_BYTES]) :]
                    incoming.replace(path)
                finally:
                    incoming.unlink(missing_ok=True)
        except OSError as error:
            self._read_only("cannot write to the cache %s, going on without: %s", error)

    @contextlib.contextmanager
    def fetching(self, digest: str, look: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Be the one process, and thread, that fetches a blob; look for it again inside: another may have kept it.

        `look` is called while waiting; what it raises ends that. Where no lock can be had, everybody fetches.
        """
        until = time.monotonic() + MAX_WAIT_SECONDS
        path = self.folder / "locks" / digest
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("wb")
        except OSError as error:
            self._read_only("the cache %s is read and not written: %s", error)
            yield
            return
        with file:
            while time.monotonic() < until:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError as error:
                    if error.errno not in (errno.EAGAIN, errno.EACCES):
                        break  # a file system without locks
                look()
                time.sleep(LOOK_SECONDS)
            yield

    def blobs(self) -> list[CachedBlob]:
        """What is kept, the longest unused first."""
        found = []
        for path in _files(self.folder / "sha256"):
            if not keys.is_digest(path.name):  # what a file system leaves there: nothing of ours
                continue
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                found.append(CachedBlob(path.name, status.st_size, status.st_mtime))
        return sorted(found, key=lambda blob: blob.used_at)

    def prune(self, to_bytes: int = 0) -> int:
        """Drop what is longest unused until at most `to_bytes` are left, and what dead writers left; bytes freed.

        Raises:
            OSError: the folder may not be changed.
        """
        if not self.folder.is_dir():
            return 0
        with (self.folder / "lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            before = self._taken()
            self._sweep()
            self._evict(to_bytes)
            for path in _files(self.folder / "locks"):
                with path.open("rb") as file, contextlib.suppress(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink(missing_ok=True)
            return before - self._taken()

    def _read_only(self, text: str, error: OSError) -> None:
        """Write no more, and say so once."""
        with self._telling:
            told, self._writes = not self._writes, False
        if not told:
            log.warning(text, self.folder, error)

    def _begin(self, incoming: Path, size: int) -> FileIO | None:
        """A new file, locked, that takes `size` bytes of the bound; None where others are writing too much for it."""
        with (self.folder / "lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._sweep()
            if self._taken() - sum(blob.size_bytes for blob in self.blobs()) > self.max_bytes - size:
                return None
            self._evict(self.max_bytes - size)
            file = incoming.open("xb", buffering=0)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)  # before another makes room, and takes it for a dead writer's
                file.truncate(size)  # a hole: from now on others count it
            except BaseException:
                file.close()
                incoming.unlink()
                raise
            return file

    def _sweep(self) -> None:
        """Drop what dead writers left."""
        for path in _files(self.folder / "incoming"):
            with contextlib.suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # its writer is dead
                path.unlink()

    def _evict(self, most: int) -> None:
        taken = self._taken()
        for blob in self.blobs():
            if taken <= most:
                return
            self._path(blob.digest).unlink(missing_ok=True)
            (self.folder / "locks" / blob.digest).unlink(missing_ok=True)  # who holds it now fetches beside another
            taken -= blob.size_bytes

    def _taken(self) -> int:
        total = 0
        for name in ("incoming", "sha256"):  # in this order, what moves from one to the other is not missed
            for path in _files(self.folder / name):
                with contextlib.suppress(FileNotFoundError):
                    total += path.stat().st_size
        return total

    def _path(self, digest: str) -> Path:
        keys.blob(digest)  # refuses what is no digest
        return self.folder / "sha256" / digest

    def _drop(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("cannot drop %s, it will be met again: %s", path, error)


def open_cache(settings: Settings | None = None) -> BlobCache | None:
    """The cache that the settings name; None where they name none.

    Raises:
        ConfigError: a setting is not legal.
        SetupError: this system has no `flock`.
    """
    settings = settings or read_settings()
    if not settings.cache:
        return None
    if sys.platform == "win32":
        raise SetupError(
            "opening the cache", found="Windows", expected="a system with flock", fix="unset MODELPRESS_CACHE"
        )
    return BlobCache(Path(settings.cache), settings.cache_bytes)


def _files(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_file()]
    except FileNotFoundError:
        return []
