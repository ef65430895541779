"""The interface of a store, and the one function that opens one."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from modelpress.errors import ConfigError
from modelpress.settings import Settings


@dataclass(frozen=True)
class ObjectInfo:
    """One stored object."""

    key: str
    size_bytes: int


class Store(abc.ABC):
    """Objects under keys. Keys are relative, `/`-separated, without `..`; every method is safe to call from threads.

    An object is visible whole or not at all.

    Raises (all methods):
        AccessDeniedError: wrong credentials, or a right is missing.
        StoreUnavailableError: no answer within the deadline, after retries.
        StoreFullError: no space left.
    """

    uri: str
    """Canonical URI, without a trailing slash."""

    @abc.abstractmethod
    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """Bytes `[start, start + length)` of an object, or all of it from `start`.

        Raises:
            NotFoundError: no such object.
            CorruptionError: the answer is shorter than what was asked for.
        """

    @abc.abstractmethod
    def download(self, key: str, path: Path) -> str:
        """Write an object to `path` (whole or not at all) and return the sha256 (hex) of what was received."""

    @abc.abstractmethod
    def put(self, key: str, data: bytes | Path, *, if_absent: bool = False) -> bool:
        """Store bytes or a file. True: this call created the object.

        With `if_absent`, an object that exists is left as it is: False is returned and the caller compares. It is the
        one conditional write that every fit server has (`If-None-Match: *`); a 409 is a lost race and also False.
        """

    @abc.abstractmethod
    def info(self, key: str) -> ObjectInfo | None:
        """Size of an object, None where there is none."""

    @abc.abstractmethod
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """All objects whose key begins with `prefix`, sorted by key."""

    @abc.abstractmethod
    def delete(self, key: str) -> None:
        """Remove an object; none there is no error."""

    @abc.abstractmethod
    def check_fit(self) -> None:
        """Prove by a real write under `doctor/` that conditional creation works, and clean up.

        Raises:
            StoreUnfitError: a second conditional write succeeded.
        """


def open_store(uri: str, settings: Settings | None = None) -> Store:
    """Open `s3://bucket/prefix` or a local folder (a path or `file://`).

    Raises:
        ConfigError: neither.
    """
    if uri.startswith("s3://"):
        from modelpress.store.s3 import S3Store

        return S3Store(uri, settings or Settings())
    from modelpress.store.local import LocalStore

    if "://" in uri and not uri.startswith("file://"):
        raise ConfigError("opening a store", found=uri, expected="s3://bucket/prefix, file:///folder or a folder")
    return LocalStore(Path(uri.removeprefix("file://")))
