"""A store in a local folder, or on a network file system with hard links."""
# ruff: noqa: D102  (methods are documented where the interface is, in base.py)

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from modelpress.errors import (
    AccessDeniedError,
    ConfigError,
    ConflictError,
    CorruptionError,
    NotFoundError,
    StoreFullError,
    StoreUnavailableError,
    StoreUnfitError,
)
from modelpress.store.base import RESERVED, ObjectInfo, Store, check_digest, check_key, check_range

if TYPE_CHECKING:
    from typing_extensions import Buffer

BLOCK_BYTES = 4 * 2**20
STALE_SECONDS = 24 * 3600.0
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS}


class LocalStore(Store):
    """Objects as files below `folder`.

    A file is written under `.incoming/`, synced to the disk, and then renamed (or hard-linked, which fails where the
    name exists) to its place, so no reader and no crash ever sees a part of it. What a killed writer leaves under
    `.incoming/` is swept after a day.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(os.path.abspath(folder))
        super().__init__(self.folder.as_uri())

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        check_range(key, start, length)
        with local_errors(f"reading {self._path(key)}"), self._path(key).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            end = size if length is None else start + length
            if start > size or end > size:
                raise CorruptionError(
                    f"reading {self.uri}/{key}", found=f"{size} bytes", expected=f"at least {max(start, end)} bytes"
                )
            file.seek(start)
            return file.read(end - start)

    def read_into(
        self, key: str, buffer: Buffer, start: int = 0, arrived: Callable[[memoryview], None] = lambda _: None
    ) -> None:
        check_range(key, start, None)
        view, position = memoryview(buffer).cast("B"), 0
        with local_errors(f"reading {self._path(key)}"), self._path(key).open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(start)
            while position < len(view) or start > size:
                count = file.readinto(view[position : position + BLOCK_BYTES])
                if not count:
                    raise CorruptionError(
                        f"reading {self.uri}/{key}",
                        found=f"{min(size, start + position)} bytes",
                        expected=f"at least {start + len(view)} bytes",
                    )
                position += count
                arrived(view[position - count : position])

    def download(self, key: str, path: Path) -> str:
        with local_errors(f"downloading {self._path(key)} to {path}"), self._path(key).open("rb") as source:
            partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
            try:
                with partial.open("xb") as target:
                    digest = _copy(source, target)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
        return digest

    def put(self, key: str, data: bytes | Path, *, if_absent: bool = False, sha256: str | None = None) -> bool:
        path = self._path(key)
        incoming = self.folder / RESERVED / uuid.uuid4().hex
        with local_errors(f"writing {path}", writing=True):
            if if_absent and path.is_file():
                return False
            incoming.parent.mkdir(parents=True, exist_ok=True)
            try:
                digest = _write(incoming, data)
                check_digest(f"storing {self.uri}/{key}", digest, sha256)
                path.parent.mkdir(parents=True, exist_ok=True)
                if if_absent and not self._link(incoming, path):
                    return False
                if not if_absent:
                    incoming.replace(path)
                _sync_folder(path.parent)
            finally:
                incoming.unlink(missing_ok=True)
        return True

    def info(self, key: str) -> ObjectInfo | None:
        path = self._path(key)
        with local_errors(f"looking at {path}"):
            try:
                return _info(key, path.stat()) if path.is_file() else None
            except (FileNotFoundError, NotADirectoryError):
                return None

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        check_key(prefix, prefix=True)
        base = self.folder / prefix.rpartition("/")[0]
        with local_errors(f"listing {base}"):
            found = sorted(self._walk(base, prefix), key=lambda info: info.key.encode())
        yield from found

    def folders(self, prefix: str) -> Iterator[str]:
        base = self.folder / check_key(prefix, prefix=True)
        with local_errors(f"listing {base}"), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            yield from sorted(
                (name for path in base.iterdir() if path.is_dir() and (name := path.name) != RESERVED), key=os.fsencode
            )

    def delete(self, key: str) -> None:
        path = self._path(key)
        missing = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
        with local_errors(f"deleting {path}"), contextlib.suppress(*missing):
            path.unlink()

    def check_fit(self) -> None:
        super().check_fit()
        self._sweep()

    def _path(self, key: str) -> Path:
        return self.folder / check_key(key)

    def _walk(self, base: Path, prefix: str) -> Iterator[ObjectInfo]:
        for folder, names, files in os.walk(base, onerror=_raise_unless_missing):
            if Path(folder) == self.folder and RESERVED in names:
                names.remove(RESERVED)
            for name in files:
                path = Path(folder, name)
                key = path.relative_to(self.folder).as_posix()
                if key.startswith(prefix):
                    with contextlib.suppress(FileNotFoundError):  # deleted since it was listed
                        yield _info(key, path.stat())

    def _link(self, incoming: Path, path: Path) -> bool:
        try:
            os.link(incoming, path)
        except FileExistsError:
            if path.is_dir():
                raise
            return False
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            raise StoreUnfitError(
                f"creating {path} only if absent",
                found=f"this file system has no hard links ({error.strerror})",
                fix="use a store folder on a file system with hard links, or S3",
            ) from error
        return True

    def _sweep(self) -> None:
        """Remove what writers that were killed long ago left behind."""
        limit = time.time() - STALE_SECONDS
        for path in (self.folder / RESERVED).glob("*"):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < limit:
                    path.unlink()


def _info(key: str, found: os.stat_result) -> ObjectInfo:
    return ObjectInfo(key, found.st_size, datetime.fromtimestamp(found.st_mtime, UTC))


def file_sha256(path: Path) -> str:
    """Digest (hex) of a file's bytes."""
    with local_errors(f"reading {path}"), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, data: bytes | Path) -> str:
    """Write and sync a new file; return its sha256."""
    with path.open("xb") as target:
        if isinstance(data, Path):
            with data.open("rb") as source:
                digest = _copy(source, target)
        else:
            target.write(data)
            digest = hashlib.sha256(data).hexdigest()
        target.flush()
        os.fsync(target.fileno())
    return digest


def _copy(source: BinaryIO, target: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := source.read(BLOCK_BYTES):
        digest.update(block)
        target.write(block)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def write_secret(path: Path, data: bytes, doing: str, fix: str) -> None:
    """Write a new file that only its owner reads, whole or not at all.

    Raises:
        ConfigError: there is one; `fix` is what to do then.
        StoreError: it cannot be written.
    """
    with local_errors(doing, writing=True):
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise ConfigError(doing, found="a file of this name", expected="none", fix=fix) from None
        try:
            with open(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def read_secret(path: Path, doing: str) -> str:
    """A file of ASCII text that not everybody may read.

    Raises:
        ConfigError: it can't be read, everybody may read it, or it holds something else.
    """
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & 0o007:
                raise ConfigError(doing, found="everybody can read it", fix=f"chmod o-rwx {path}")
            return file.read().decode("ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(doing, found=type(error).__name__, expected="a file of ASCII text") from error


def check_free(folder: Path, files: Iterable[Path], doing: str) -> None:
    """Refuse to write files into a folder over others, before minutes are spent on what they will hold.

    Raises:
        ConfigError: one of this name is there, or the folder is no folder.
    """
    standing = [str(path) for path in files if os.path.lexists(path)]
    if standing or (os.path.lexists(folder) and not folder.is_dir()):
        raise ConfigError(
            doing,
            found=", ".join(standing) or f"{folder}, which is no folder",
            expected="nothing of this name",
            fix="name another folder with --to",
        )


def check_new_folder(folder: Path, doing: str) -> None:
    """Refuse a folder that another one, made beside it, cannot be renamed to, before hours are spent on that one.

    Raises:
        ConfigError: it is there and is no empty folder, is a symbolic link (also to nothing), or a mount point.
    """
    if not os.path.lexists(folder):
        return
    found, fix = "something there already", "name another folder"
    if folder.is_symlink():
        found, fix = f"{found}: a symbolic link", f"name the folder itself, {os.path.realpath(folder)}, or another"
    elif folder.is_dir() and os.path.ismount(folder):
        found, fix = f"{found}: a mount point", f"name a folder in it, such as {folder / 'model'}"
    elif folder.is_dir() and not any(folder.iterdir()):
        return
    raise ConfigError(doing, found=found, expected="a new or empty folder", fix=fix)


@contextlib.contextmanager
def local_errors(doing: str, *, writing: bool = False) -> Iterator[None]:
    """Turn the operating system's errors into the store's; `writing` says that a name is being taken."""
    try:
        yield
    except PermissionError as error:
        fix = f"give user id {os.geteuid()} the right, or point the store elsewhere"
        raise AccessDeniedError(doing, found=str(error), fix=fix) from error
    except (FileExistsError, IsADirectoryError, NotADirectoryError) as error:
        if writing:
            found = f"an object and a folder of objects under one name ({error})"
            raise ConflictError(doing, found=found, fix="use another key") from error
        raise NotFoundError(doing, found=f"no object ({error.strerror})") from error
    except FileNotFoundError as error:
        raise NotFoundError(doing, found=str(error)) from error
    except OSError as error:
        if error.errno in FULL:
            fix = "free space, raise the quota, or point the store or MODELPRESS_HOME elsewhere, then run it again"
            raise StoreFullError(doing, found=str(error), fix=fix) from error
        if error.errno == errno.ENAMETOOLONG:
            raise ConfigError(doing, found=str(error), expected="a shorter key") from error
        raise StoreUnavailableError(doing, found=str(error)) from error
