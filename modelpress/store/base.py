"""The interface of a store, and the one function that opens one."""

from __future__ import annotations

import abc
import contextlib
import copy
import threading
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Self

from modelpress.errors import ConfigError, ConflictError, CorruptionError, NotFoundError, StoreError, StoreUnfitError
from modelpress.settings import Settings, read_settings
from modelpress.store import observe

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from modelpress.nudge import Nudger
    from modelpress.trust import Signer, Trust

MAX_KEY_BYTES = 1024
MAX_SEGMENT_BYTES = 255
RESERVED = ".incoming"
"""First segment that no key may have: a local store keeps unfinished files there."""


@dataclass(frozen=True)
class ObjectInfo:
    """One stored object."""

    key: str
    size_bytes: int
    modified: datetime
    """When it was written, UTC, by the store's clock."""


@dataclass(frozen=True)
class Unfinished:
    """An upload in parts that was begun and not ended."""

    key: str
    upload: str
    """The store's name for it."""
    begun: datetime
    """When, UTC, by the store's clock."""
    size_bytes: int
    """Bytes of the parts that are there."""


class Store(abc.ABC):
    """Objects under keys. Keys are relative, `/`-separated, without `..`; every method is safe to call from threads.

    An object is visible whole or not at all.

    Raises (all methods):
        ConfigError: the key is not legal (see `check_key`).
        AccessDeniedError: wrong credentials, or a right is missing.
        StoreUnavailableError: no answer within the deadline, after retries.
        StoreFullError: no space left; nothing of the object remains.
    """

    uri: str
    """Canonical URI, without a trailing slash."""
    patience_seconds: float = 60.0
    """Longest time that a call on a small object takes, its repeats included."""
    trust: Trust | None
    """Whose signatures packs and pointers need that are read through it; None asks for none."""
    signer: Signer | None
    """Who signs what is published and pointed at through it; None signs nothing."""
    nudger: Nudger | None
    """Who tells servers of an alias that was moved through it; None tells nobody."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        for name in observe.OPERATIONS:
            if name in cls.__dict__:
                setattr(cls, name, observe.watched(cls.__dict__[name]))

    def __init__(self, uri: str) -> None:
        self.uri, self.trust, self.signer, self.nudger = uri, None, None, None
        self._fit = False
        self._fit_lock = threading.Lock()

    @abc.abstractmethod
    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """Bytes `[start, start + length)` of an object, or all of it from `start`.

        Raises:
            NotFoundError: no such object.
            CorruptionError: the object holds less than what was asked for.
        """

    @abc.abstractmethod
    def read_into(
        self, key: str, buffer: Buffer, start: int = 0, arrived: Callable[[memoryview], None] = lambda _: None
    ) -> None:
        """Fill `buffer`, writable memory of bytes, with the bytes of an object from `start` on.

        `arrived` is called in this thread, in order, with each run of bytes of `buffer` that has come and changes no
        more, while later ones are on their way, and now and then with none while nothing comes; what it raises ends the
        call. After the call, nothing is written to
        `buffer`, whether it returned or raised.

        Raises:
            NotFoundError: no such object.
            CorruptionError: the object holds less than what was asked for.
        """

    @abc.abstractmethod
    def download(self, key: str, path: Path) -> str:
        """Write an object to `path` (whole or not at all) and return the sha256 (hex) of what was received.

        Raises:
            NotFoundError: no such object.
        """

    @abc.abstractmethod
    def put(self, key: str, data: bytes | Path, *, if_absent: bool = False, sha256: str | None = None) -> bool:
        """Store bytes or a file. True: this call created the object.

        With `if_absent`, an object that exists is left as it is: False is returned and the caller compares. It is the
        one conditional write that every fit server has (`If-None-Match: *`); a 409 is a lost race and also False.

        `sha256` (hex) is what the bytes must hash to as they are sent; other bytes never become visible.

        Raises:
            CorruptionError: the bytes do not have the digest `sha256`.
            NotFoundError: `data` is a file that does not exist.
        """

    @abc.abstractmethod
    def info(self, key: str) -> ObjectInfo | None:
        """Size and time of an object, None where there is none."""

    @abc.abstractmethod
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """All objects whose key begins with `prefix` (any string, not only whole segments), sorted by the UTF-8 of
        the key."""

    def folders(self, prefix: str) -> Iterator[str]:
        """The segments that follow `prefix` (which ends with `/`) in keys that go on behind them, sorted; where the
        store can, without listing what lies below."""
        found = {info.key.removeprefix(prefix) for info in self.list(prefix)}
        yield from sorted({rest.partition("/")[0] for rest in found if "/" in rest}, key=str.encode)

    @abc.abstractmethod
    def delete(self, key: str) -> None:
        """Remove an object; none there is no error."""

    def unanswered_deletes(self) -> int:
        """How many requests to `delete` or `abort` were left without an answer since the store was opened, though it
        was asked again and answered then: it may still act on them, late."""
        return 0

    def unfinished(self, prefix: str = "") -> Iterator[Unfinished]:
        """Uploads in parts, of keys that begin with `prefix`, that were begun and not ended; a store without parts
        has none."""
        del prefix
        return iter(())

    def abort(self, upload: Unfinished) -> None:
        """End an unfinished upload and free its parts; one that has ended is no error."""
        raise NotImplementedError(upload)

    def link(self, key: str, seconds: int) -> str:
        """An address under which the object can be read for so many seconds, without credentials: a secret.

        Raises:
            StoreUnfitError: this kind of store has none.
        """
        raise StoreUnfitError(
            f"making a link to {self.uri}/{key}, for {seconds} s",
            found="a store without signed addresses",
            expected="a store on S3",
        )

    def check_fit(self) -> None:
        """Prove by real writes under `doctor/` that conditional creation works, and clean up.

        Raises:
            StoreUnfitError: a second conditional write succeeded, or what was written is not read back.
        """
        key = f"doctor/{uuid.uuid4().hex}"
        try:
            # Refused does not mean that it failed: a retry after a lost answer meets its own write. The key is new,
            # so the content tells.
            self.put(key, b"first", if_absent=True)
            created_again = self.put(key, b"second", if_absent=True)
            content = self.get(key)
        finally:
            with contextlib.suppress(StoreError):  # a write-only-once policy may forbid it; the proof stands
                self.delete(key)
        if created_again or content != b"first":
            raise StoreUnfitError(
                f"proving conditional creation on {self.uri}",
                found=f"a second write under the same key {'succeeded' if created_again else 'was refused'}, and the "
                f"object holds {content!r}",
                expected="a conditional write (If-None-Match: *) that leaves an existing object alone",
                fix="use a server with conditional writes (AWS S3, Ceph RGW, a local folder), and no proxy that drops "
                "the If-None-Match header; `modelpress doctor` repeats this test",
            )

    def held_to(self, trust: Trust | None) -> Self:
        """The same store, read with another trust. It shares everything else, and is not closed by itself."""
        if trust is self.trust:
            return self
        other = copy.copy(self)
        other.trust = trust
        return other

    def close(self) -> None:  # noqa: B027  most stores hold nothing
        """Let go of connections and threads, without waiting for calls that run. The store is not used after it."""

    def ensure_fit(self) -> None:
        """`check_fit`, once in the life of this object."""
        with self._fit_lock:
            if not self._fit:
                self.check_fit()
                self._fit = True


def check_key(key: str, *, prefix: bool = False) -> str:
    """Return `key` if every store can hold it.

    Legal: 1 to 1024 bytes of UTF-8, segments of 1 to 255 bytes parted by single `/`, none of them `.` or `..`, no
    control characters, no backslash, not under the reserved `.incoming/`. A listing `prefix` may be empty or end
    anywhere.

    Raises:
        ConfigError: it is not legal.
    """
    segments = key.split("/")
    if prefix:  # the last segment of a prefix is unfinished: empty or cut anywhere
        segments.pop()
    try:
        sizes = [len(segment.encode()) for segment in [*segments, key]]
    except UnicodeEncodeError:
        sizes = [0]
    legal = (
        (prefix or bool(key))
        and all(0 < size <= MAX_SEGMENT_BYTES for size in sizes[:-1])
        and (key == "" or 0 < sizes[-1] <= MAX_KEY_BYTES)
        and not any(segment in (".", "..") for segment in segments)
        and not any(character < " " or character in "\\\x7f" for character in key)
        and segments[:1] != [RESERVED]
    )
    if not legal:
        raise ConfigError(
            "checking an object key",
            found=repr(key),
            expected="relative `/`-separated segments without '.', '..', control characters or backslashes, "
            f"at most {MAX_SEGMENT_BYTES} bytes each and {MAX_KEY_BYTES} in all",
        )
    return key


def check_range(key: str, start: int, length: int | None) -> None:
    """Refuse a range that no object has.

    Raises:
        ConfigError: negative start or length.
    """
    if start < 0 or (length is not None and length < 0):
        raise ConfigError(f"reading {key}", found=f"start {start}, length {length}", expected="numbers from 0 up")


def get_capped(store: Store, key: str, most: int, doing: str) -> bytes:
    """An object of at most `most` bytes; a larger one is refused before anything is allocated for it.

    Raises:
        NotFoundError: no such object.
        CorruptionError: it is larger.
    """
    info = store.info(key)
    if info is None:
        raise NotFoundError(doing, found=f"no object {store.uri}/{key}")
    if info.size_bytes > most:
        raise CorruptionError(doing, found=f"{info.size_bytes} bytes", expected=f"at most {most} bytes")
    return store.get(key, 0, info.size_bytes)


def stands(store: Store, key: str, data: bytes) -> bool:
    """Whether these very bytes stand under a key; an object of another length is not read."""
    info = store.info(key)
    return info is not None and info.size_bytes == len(data) and store.get(key, 0, len(data)) == data


def put_once(store: Store, key: str, data: bytes, doing: str, *, expected: str, again: str) -> bool:
    """Write an object that is named by its content. One that stands there with these very bytes is as good: it is our
    own, from a lost answer or an earlier run.

    Args:
        store: where.
        key: its name.
        data: its bytes.
        doing: how errors begin.
        expected: what may stand there, for people.
        again: what to do once other bytes are gone: `publish`.

    Returns:
        Whether it was written by this call.

    Raises:
        ConflictError: other bytes stand there.
        StoreError: it can't be written.
    """
    if store.put(key, data, if_absent=True):
        return True
    if not stands(store, key, data):
        raise ConflictError(
            doing,
            found=f"other bytes under {store.uri}/{key}",
            expected=expected,
            fix=f"the object was damaged or tampered with: keep it for inquiry, delete it, and {again} again",
        )
    return False


def check_digest(doing: str, found: str, expected: str | None) -> None:
    """Compare the sha256 (hex) of what travelled with what should have.

    Raises:
        CorruptionError: they differ; both are given.
    """
    if expected is not None and found != expected:
        raise CorruptionError(
            doing, found=f"sha256 {found}", expected=f"sha256 {expected}", fix="restore the bytes from their source"
        )


def open_store(uri: str, settings: Settings | None = None) -> Store:
    """Open a store, with the trust and the key of the settings, and with those to tell when an alias moves.

    It is `s3://bucket/prefix`, a local folder (a path or `file://`), or a file of links (`links+file://`, only
    read).

    Raises:
        ConfigError: neither, or the trust file, the signing key or the secret of nudges can't be used.
    """
    settings = settings or read_settings()
    store = _opened(uri, settings)
    if settings.trust is not None:
        from modelpress.trust import Trust
        from modelpress.trust.seen import Seen

        store.trust = Trust(settings.trust, Seen(settings.seen))
        store.trust.policy()  # a wrong one is told here, and not after hours of work
    if settings.signing_key_file is not None:
        from modelpress.trust import Signer

        store.signer = Signer.load(settings.signing_key_file, settings.signing_key_passphrase.get_secret_value())
    if settings.nudge_urls:
        from modelpress.nudge import open_nudger

        store.nudger = open_nudger(settings)
    return store


def _opened(uri: str, settings: Settings) -> Store:
    if uri.startswith("s3://"):
        from modelpress.store.s3 import S3Store

        return S3Store(uri, settings)
    if uri.startswith("links+file://"):
        from modelpress.store.links import LinkStore

        return LinkStore(uri, settings)
    from modelpress.store.local import LocalStore

    if uri.startswith("file://"):
        return LocalStore(Path(urllib.parse.unquote(uri.removeprefix("file://"))))
    if "://" in uri or not uri:
        raise ConfigError(
            "opening a store", found=uri, expected="s3://bucket/prefix, file:///folder, links+file:///file or a folder"
        )
    return LocalStore(Path(uri))
