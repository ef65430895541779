"""The body of a request: bytes that are hashed while they are sent, and never sent whole where they are wrong."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from modelpress.errors import CorruptionError
from modelpress.store.base import check_digest
from modelpress.store.local import local_errors

if TYPE_CHECKING:
    from typing_extensions import Buffer

BLOCK_BYTES = 2**20
"""What a body of a file holds in memory at a time."""


class Body(io.RawIOBase):
    """The bytes of one request: a view of memory, or a file that is read and hashed block by block while it is sent.

    A file whose bytes do not have the digest is found out before its last block is sent, so the server never has it
    whole; and the server compares what it receives with the same digest, which the signature carries.

    Args:
        source: the bytes, or the file.
        sha256: their digest (hex), which is signed; None signs no digest (``UNSIGNED-PAYLOAD``), for bytes that TLS
            protects and that are checked otherwise.
        size: bytes of the file.

    Raises (while it is read):
        CorruptionError: the file holds other bytes, or fewer.
        StoreError: the file cannot be read.
    """

    def __init__(self, source: Buffer | Path, sha256: str | None, *, size: int | None = None) -> None:
        super().__init__()
        self.sha256, self._source = sha256, source
        self._view = None if isinstance(source, Path) else memoryview(source).cast("B")
        self._size = (size or 0) if self._view is None else len(self._view)
        self._file: io.FileIO | None = None
        self._position, self._hash = 0, hashlib.sha256()

    def __len__(self) -> int:
        return self._size

    def readable(self) -> bool:  # noqa: D102
        return True

    def seekable(self) -> bool:  # noqa: D102
        return True

    def tell(self) -> int:  # noqa: D102
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go back to the start, for another attempt; nowhere else."""
        if offset or whence != io.SEEK_SET:
            raise io.UnsupportedOperation("a body starts anew or goes on")
        self._position, self._hash = 0, hashlib.sha256()
        if self._file is not None:
            self._file.seek(0)
        return 0

    def readinto(self, buffer: Buffer) -> int:
        """The next bytes."""
        target = memoryview(buffer).cast("B")[: self._size - self._position]
        if self._view is not None:
            target[:] = self._view[self._position : self._position + len(target)]
            self._position += len(target)
            return len(target)
        return self._read_file(target)

    def blocks(self) -> Iterator[memoryview]:
        """All bytes, from the start; a block is good until the next one is asked for."""
        self.seek(0)
        if self._view is not None:
            for start in range(0, self._size, BLOCK_BYTES):
                yield self._view[start : start + BLOCK_BYTES]
            return
        block = memoryview(bytearray(min(BLOCK_BYTES, self._size)))
        while self._position < self._size:
            yield block[: self.readinto(block)]

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
        super().close()

    def _read_file(self, target: memoryview) -> int:
        assert isinstance(self._source, Path)
        if not target:
            return 0
        with local_errors(f"reading {self._source}"):
            if self._file is None:
                self._file = self._source.open("rb", buffering=0)
            count = self._file.readinto(target)
        self._position += count
        if not count:
            raise CorruptionError(
                f"sending {self._source}", found=f"{self._position} bytes", expected=f"{self._size} bytes"
            )
        self._hash.update(target[:count])
        if self._position == self._size:
            check_digest(f"sending {self._source}", self._hash.hexdigest(), self.sha256)
        return count
