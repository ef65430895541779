"""Large objects in parts: several at a time, from a fixed number of buffers, going on where an earlier run stopped.

Nothing is written down locally: the server's own list of unfinished uploads and of their parts is the state, so any
process on any machine goes on. A part counts as sent when its length and its md5 (the ETag of an unencrypted part) are
those of the bytes that would be sent; where a server encrypts parts and so has other ETags, they are sent again.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from botocore.exceptions import BotoCoreError, ClientError

from modelpress.errors import CorruptionError, StoreFullError, StoreUnavailableError
from modelpress.settings import Settings
from modelpress.store.base import Unfinished, check_digest
from modelpress.store.body import Body
from modelpress.store.local import local_errors
from modelpress.store.s3_client import back_off, body_digest
from modelpress.store.s3_errors import Where, code_of, translate, translated
from modelpress.store.threads import ClosedError, DaemonPool, ahead

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

PART_BYTES = 16 * 2**20
"""Least size of a part, and of a ranged read."""
MAX_PARTS = 10_000
PARTS_IN_FLIGHT = 4
"""Requests for parts at a time, per store object."""
PART_BUFFERS = PARTS_IN_FLIGHT + 1
"""Parts in memory at a time, per store object, however many uploads run: those on their way, and one being read."""
LOST_UPLOAD = {"NoSuchUpload", "InvalidPart"}
"""Another process was at the same upload: it completed or aborted it, or sent a part again."""


class Buffers:
    """A fixed number of buffers, made when first needed and used again; who finds none free waits.

    Nobody holds two while waiting, and every request ends by its deadline, so every wait ends.
    """

    def __init__(self, count: int) -> None:
        self._free: list[bytearray] = []
        self._count = self._left = count
        self._changed = threading.Condition()
        self._closed = False

    @property
    def held(self) -> int:
        """Buffers that exist."""
        return self._count - self._left

    def take(self, size: int) -> bytearray:
        """A buffer of `size` bytes; give it back.

        Raises:
            ClosedError: the buffers were closed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._free or self._left)
            if self._closed:
                raise ClosedError("the buffers were closed")
            for index, buffer in enumerate(self._free):
                if len(buffer) == size:
                    return self._free.pop(index)
            if not self._left:  # one of another size goes, and its memory before the new one's
                self._free.pop(0)
                self._left += 1
            try:
                buffer = bytearray(size)
            except MemoryError:
                self._changed.notify()  # the place is still free: somebody else may have more luck
                raise
            self._left -= 1
            return buffer

    def give_back(self, buffer: bytearray) -> None:
        """Let others use it."""
        with self._changed:
            self._free.append(buffer)
            self._changed.notify()

    def close(self) -> None:
        """Let nobody wait any longer."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


@dataclass(frozen=True)
class _Part:
    number: int
    buffer: bytearray
    size: int

    @property
    def view(self) -> memoryview:
        return memoryview(self.buffer)[: self.size]


class _State(NamedTuple):
    """What tells one write of an object from another."""

    size: int
    tag: str
    written: datetime.datetime


class Multipart:
    """Multipart uploads to one bucket, with at most `PART_BUFFERS` parts in memory."""

    def __init__(self, client: S3Client, where: Where, pool: DaemonPool, settings: Settings) -> None:
        self._client, self._where, self._pool, self._settings = client, where, pool, settings
        self.buffers = Buffers(PART_BUFFERS)

    def put(self, full: str, source: bytes | Path, size: int, sha256: str | None, doing: str) -> None:
        """Send an object under the key `full`; `doing` says in errors what that is.

        Another process may be at the same upload (same key, so same bytes): when it completes first, ours is gone and
        the object stands. An upload that another run began is never aborted.

        Raises:
            CorruptionError: the bytes do not have the digest `sha256`.
            StoreError: see `modelpress.store.Store`.
        """
        before = self._state(full, doing)
        for last in (False, True):
            upload, there, begun = self._open(full, size, doing)
            try:
                with translated(doing, self._where, passing=LOST_UPLOAD):
                    self._send(full, upload, there, source, size, sha256, doing)
                    return
            except (CorruptionError, StoreFullError):
                if begun:
                    with contextlib.suppress(BotoCoreError, ClientError):
                        self._client.abort_multipart_upload(Bucket=self._where.bucket, Key=full, UploadId=upload)
                raise
            except ClientError as error:
                if code_of(error) == "NoSuchUpload":
                    now = self._state(full, doing)
                    if now is not None and now != before and now.size == size:
                        return
                if last:
                    raise translate(doing, error, self._where) from error

    def unfinished(self, prefix: str, doing: str) -> Iterator[Unfinished]:
        """Every unfinished upload of keys that begin with `prefix`, with the bytes of its parts."""
        with translated(doing, self._where):
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._where.bucket, Prefix=prefix
            )
            for item in [item for page in pages for item in page.get("Uploads", [])]:
                size = sum(length for length, _ in self._parts(item["Key"], item["UploadId"]).values())
                yield Unfinished(item["Key"], item["UploadId"], item["Initiated"], size)

    def abort(self, full: str, upload: str, doing: str) -> None:
        """End an unfinished upload; one that has ended is no error."""
        with translated(doing, self._where), contextlib.suppress(self._client.exceptions.NoSuchUpload):
            self._client.abort_multipart_upload(Bucket=self._where.bucket, Key=full, UploadId=upload)

    def close(self) -> None:
        """Let nobody wait for a buffer any longer."""
        self.buffers.close()

    def _send(
        self,
        full: str,
        upload: str,
        there: dict[int, tuple[int, str]],
        source: bytes | Path,
        size: int,
        sha256: str | None,
        doing: str,
    ) -> None:
        digest = hashlib.sha256()

        def send(part: _Part) -> str:
            try:
                tag = there.get(part.number)
                if tag == (part.size, hashlib.md5(part.view, usedforsecurity=False).hexdigest() if tag else ""):
                    return tag[1]
                body = Body(part.view, body_digest(self._client, part.view))
                answer = self._client.upload_part(
                    Bucket=self._where.bucket,
                    Key=full,
                    UploadId=upload,
                    PartNumber=part.number,
                    Body=body,  # type: ignore[arg-type]  # what botocore asks of a body is there
                )
                return answer["ETag"].strip('"')
            finally:
                self.buffers.give_back(part.buffer)

        def parts() -> Iterator[_Part]:
            for part in self._cut(source, size):
                digest.update(part.view)
                yield part

        try:
            unused = lambda part: self.buffers.give_back(part.buffer)  # noqa: E731
            tags = list(ahead(self._pool, send, parts(), PARTS_IN_FLIGHT, unused))
        except (CancelledError, ClosedError) as error:
            raise StoreUnavailableError(doing, found="that the store was closed meanwhile") from error
        origin = f" from {source}" if isinstance(source, Path) else ""
        check_digest(f"{doing}{origin}", digest.hexdigest(), sha256)
        listed: list[CompletedPartTypeDef] = [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(tags, 1)]
        self._client.complete_multipart_upload(
            Bucket=self._where.bucket, Key=full, UploadId=upload, MultipartUpload={"Parts": listed}
        )

    def _cut(self, source: bytes | Path, size: int) -> Iterator[_Part]:
        """The bytes in parts, each in a buffer that whoever takes the part gives back."""
        part_bytes = part_size(size)
        with contextlib.ExitStack() as stack:
            if isinstance(source, Path):
                with local_errors(f"reading {source}"):
                    file = stack.enter_context(source.open("rb", buffering=0))
            for number, start in enumerate(range(0, size, part_bytes), 1):
                part = _Part(number, self.buffers.take(part_bytes), min(part_bytes, size - start))
                if isinstance(source, Path):
                    with local_errors(f"reading {source}"):
                        count = file.readinto(part.view)
                else:
                    part.view[:] = memoryview(source)[start : start + part.size]
                    count = part.size
                if count != part.size:
                    self.buffers.give_back(part.buffer)
                    raise CorruptionError(
                        f"reading {source!s:.200}", found=f"{start + count} bytes", expected=f"{size} bytes, as before"
                    )
                yield part

    def _open(self, full: str, size: int, doing: str) -> tuple[str, dict[int, tuple[int, str]], bool]:
        """An upload to go on with and its parts; True: it was begun here.

        Beginning one is the one request that leaves something behind when its answer is lost, so it is not sent again:
        the unfinished uploads are looked at again, and what it left is among them.
        """
        for attempt in itertools.count(1):
            upload, there = self._find(full, size, doing)
            if upload is not None:
                return upload, there, False
            try:
                with translated(doing, self._where):
                    answer = self._client.create_multipart_upload(Bucket=self._where.bucket, Key=full)
                    return answer["UploadId"], {}, True
            except StoreUnavailableError:
                if attempt >= self._settings.s3_attempts:
                    raise
            time.sleep(back_off(attempt, self._settings.s3_backoff_seconds))
        raise AssertionError("unreachable")

    def _find(self, full: str, size: int, doing: str) -> tuple[str | None, dict[int, tuple[int, str]]]:
        """The newest unfinished upload of this key that was cut as we cut, with its parts (number → size, md5). One
        that was cut otherwise is left to its owner, or to the bucket's lifecycle rule."""
        part_bytes = part_size(size)
        with translated(f"{doing}: looking for an unfinished upload of it", self._where):
            uploads = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._where.bucket, Prefix=full
            )
            mine = [item for page in uploads for item in page.get("Uploads", []) if item["Key"] == full]
            for item in sorted(mine, key=lambda item: item["Initiated"], reverse=True):
                parts = self._parts(full, item["UploadId"])
                if all(length == min(part_bytes, size - part_bytes * (n - 1)) for n, (length, _) in parts.items()):
                    return item["UploadId"], parts
        return None, {}

    def _parts(self, full: str, upload: str) -> dict[int, tuple[int, str]]:
        found: dict[int, tuple[int, str]] = {}
        with contextlib.suppress(self._client.exceptions.NoSuchUpload):  # ended since it was listed
            pages = self._client.get_paginator("list_parts")
            for page in pages.paginate(Bucket=self._where.bucket, Key=full, UploadId=upload):
                found |= {part["PartNumber"]: (part["Size"], part["ETag"].strip('"')) for part in page.get("Parts", [])}
        return found

    def _state(self, full: str, doing: str) -> _State | None:
        with translated(doing, self._where):
            try:
                found = self._client.head_object(Bucket=self._where.bucket, Key=full)
            except ClientError as error:
                if code_of(error) in ("404", "NoSuchKey"):
                    return None
                raise
        return _State(found["ContentLength"], found["ETag"], found["LastModified"])


def part_size(size: int) -> int:
    """Bytes of every part but the last: a function of the object's size alone, so that a later process cuts alike."""
    needed = -(-size // MAX_PARTS)
    return max(PART_BYTES, -(-needed // 2**20) * 2**20)
