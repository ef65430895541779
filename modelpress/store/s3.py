"""A store in an S3 bucket: AWS, Ceph RGW and every server with conditional creation (``If-None-Match: *``).

What is relied on is the least that such servers share: conditional creation, ranged reads, multipart uploads that
can be listed. Checks of content are ours (sha256), because not every server keeps the SDK's newer checksums.
"""
# ruff: noqa: D102  (methods are documented where the interface is, in base.py)

from __future__ import annotations

import contextlib
import hashlib
import itertools
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from botocore.exceptions import ClientError

from modelpress.errors import ConfigError, CorruptionError, NotFoundError, StoreUnavailableError, StoreUnfitError
from modelpress.settings import Settings
from modelpress.store.base import ObjectInfo, Store, Unfinished, check_digest, check_key, check_range
from modelpress.store.body import Body
from modelpress.store.local import file_sha256, local_errors
from modelpress.store.receive import Target, memory, receive
from modelpress.store.s3_client import Unanswered, back_off, connect
from modelpress.store.s3_errors import status_of, translated
from modelpress.store.s3_multipart import PART_BYTES, PARTS_IN_FLIGHT, Multipart
from modelpress.store.threads import ClosedError, DaemonPool, ahead
from modelpress.store.unlogged import unlogged

if TYPE_CHECKING:
    from typing_extensions import Buffer

RANGE_BYTES = 8 * 2**20
"""What one request brings into memory that is given: more cost more waiting for the first, fewer cost more CPU."""
MULTIPART_BYTES = 64 * 2**20
"""Larger objects travel in parts, and an interrupted upload continues."""

S = TypeVar("S")
T = TypeVar("T")


class S3Store(Store):
    """Objects in `s3://bucket/prefix`.

    Credentials follow the AWS SDK's chain. A request is given up after `Settings.s3_timeout_seconds` without a byte and
    sent again, with exponential backoff and full jitter, up to `Settings.s3_attempts` times and for
    `Settings.s3_deadline_seconds` in all. A `put` holds `body.BLOCK_BYTES` in memory beside what is given; puts of more
    than `MULTIPART_BYTES` hold `PART_BUFFERS` parts between them; a `get` holds `PARTS_IN_FLIGHT` parts, and a
    `download` as many ranges of `RANGE_BYTES`.

    Raises:
        ConfigError: the URI or the endpoint is not legal.
    """

    def __init__(self, uri: str, settings: Settings) -> None:
        bucket, _, prefix = uri.removeprefix("s3://").rstrip("/").partition("/")
        if not uri.startswith("s3://") or not bucket:
            raise ConfigError("opening a store", found=uri, expected="s3://bucket or s3://bucket/prefix")
        super().__init__(f"s3://{bucket}/{prefix}".rstrip("/"))
        self.bucket, self._prefix = bucket, f"{check_key(prefix)}/" if prefix else ""
        self.patience_seconds = settings.s3_deadline_seconds
        self._attempts, self._backoff = settings.s3_attempts, settings.s3_backoff_seconds
        self._client, self._where, self._wire = connect(bucket, settings)
        self._unanswered = Unanswered(self._client, ("DeleteObject", "AbortMultipartUpload"))
        self._pool = DaemonPool(PARTS_IN_FLIGHT, "s3-part")
        self._multipart = Multipart(self._client, self._where, self._pool, settings)
        self._bucket_seen = False

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        check_range(key, start, length)
        return b"".join(self._pieces(key, start, length))

    def read_into(
        self, key: str, buffer: Buffer, start: int = 0, arrived: Callable[[memoryview], None] = lambda _: None
    ) -> None:
        check_range(key, start, None)
        view = memoryview(buffer).cast("B")
        if not view:
            check_key(key)
            self._check_end(key, start)
        offsets = range(0, len(view), RANGE_BYTES)
        self._receive(key, start + len(view), ((start + at, view[at : at + RANGE_BYTES]) for at in offsets), arrived)

    def download(self, key: str, path: Path) -> str:
        doing, digest = f"downloading {self.uri}/{key} to {path}", hashlib.sha256()
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
        info = self.info(key)
        if info is None:
            raise NotFoundError(doing, found="no such object")
        size = info.size_bytes
        ring = [memory(RANGE_BYTES) for _ in range(min(PARTS_IN_FLIGHT, -(-size // RANGE_BYTES)))]
        places = (
            (at, ring[number % PARTS_IN_FLIGHT][: min(RANGE_BYTES, size - at)])
            for number, at in enumerate(range(0, size, RANGE_BYTES))
        )
        with local_errors(doing):
            try:
                with partial.open("xb", buffering=0) as target:

                    def arrived(data: memoryview) -> None:
                        digest.update(data)
                        while data:
                            data = data[target.write(data) :]

                    self._receive(key, size, places, arrived, whole=True)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
        return digest.hexdigest()

    def put(self, key: str, data: bytes | Path, *, if_absent: bool = False, sha256: str | None = None) -> bool:
        doing, full = f"storing {self.uri}/{check_key(key)}", self._prefix + key
        with local_errors(f"reading {data}") if isinstance(data, Path) else contextlib.nullcontext():
            size = data.stat().st_size if isinstance(data, Path) else len(data)
        if not if_absent and size > MULTIPART_BYTES:
            self._multipart.put(full, data, size, sha256, doing)
            return True
        if not isinstance(data, Path):
            digest = hashlib.sha256(data).hexdigest()
            check_digest(doing, digest, sha256)
        else:
            digest = sha256 or file_sha256(data)
        with contextlib.closing(Body(data, digest, size=size)) as body:
            if if_absent:
                return self._create(key, body)
            with self._translated(doing):
                self._client.put_object(Bucket=self.bucket, Key=full, Body=body)  # type: ignore[arg-type]
        return True

    def info(self, key: str) -> ObjectInfo | None:
        check_key(key)
        with self._translated(f"looking at {self.uri}/{key}"):
            try:
                answer = self._client.head_object(Bucket=self.bucket, Key=self._prefix + key)
            except ClientError as error:
                if status_of(error) != 404:
                    raise
                self._see_bucket(key)
                return None
            return ObjectInfo(key, answer["ContentLength"], answer["LastModified"])

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        check_key(prefix, prefix=True)
        with self._translated(f"listing {self.uri}/{prefix}"):
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.bucket, Prefix=self._prefix + prefix):
                for item in page.get("Contents", []):
                    yield ObjectInfo(item["Key"].removeprefix(self._prefix), item["Size"], item["LastModified"])

    def folders(self, prefix: str) -> Iterator[str]:
        check_key(prefix, prefix=True)
        with self._translated(f"listing {self.uri}/{prefix}"):
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.bucket, Prefix=self._prefix + prefix, Delimiter="/"):
                for item in page.get("CommonPrefixes", []):
                    yield item["Prefix"].removeprefix(self._prefix + prefix).rstrip("/")

    def delete(self, key: str) -> None:
        check_key(key)
        with self._translated(f"deleting {self.uri}/{key}"):
            self._client.delete_object(Bucket=self.bucket, Key=self._prefix + key)

    def unanswered_deletes(self) -> int:
        return self._unanswered.count

    def unfinished(self, prefix: str = "") -> Iterator[Unfinished]:
        check_key(prefix, prefix=True)
        for upload in self._multipart.unfinished(self._prefix + prefix, f"listing uploads to {self.uri}/{prefix}"):
            yield replace(upload, key=upload.key.removeprefix(self._prefix))

    def abort(self, upload: Unfinished) -> None:
        self._multipart.abort(self._prefix + check_key(upload.key), upload.upload, f"ending an upload of {upload.key}")

    def link(self, key: str, seconds: int) -> str:
        check_key(key)
        with self._translated(f"making a link to {self.uri}/{key}"), unlogged():
            place = {"Bucket": self.bucket, "Key": self._prefix + key}
            return self._client.generate_presigned_url("get_object", Params=place, ExpiresIn=seconds)

    def close(self) -> None:
        self._multipart.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._wire is not None:
            self._wire.close()
        self._client.close()

    # --- one object, conditionally

    def _create(self, key: str, body: Body) -> bool:
        """Create an object unless it exists. 412: it does. 409: another writer is at it; look, and try again if it
        left nothing."""
        for attempt in itertools.count(1):
            with self._translated(f"creating {self.uri}/{key} only if absent"):
                try:
                    self._client.put_object(
                        Bucket=self.bucket,
                        Key=self._prefix + key,
                        Body=body,  # type: ignore[arg-type]  # what botocore asks of a body is there
                        IfNoneMatch="*",
                    )
                    return True
                except ClientError as error:
                    if status_of(error) == 412:
                        return False
                    if status_of(error) != 409 or attempt >= self._attempts:
                        raise
            if self.info(key) is not None:
                return False
            time.sleep(back_off(attempt, self._backoff))
        raise AssertionError("unreachable")

    # --- reading

    def _pieces(self, key: str, start: int, length: int | None) -> Iterator[bytes]:
        """The bytes of a range, in order, read ahead in parallel when there are many."""
        check_key(key)
        first = None if length == 0 else self._range(key, start, min(PART_BYTES, length or PART_BYTES))
        if first is None:
            self._check_end(key, start + (length or 0))
            return
        data, total, version = first
        yield data
        end = total if length is None else start + length
        if end > total:
            raise CorruptionError(f"reading {self.uri}/{key}", found=f"{total} bytes", expected=f"at least {end} bytes")

        def fetch(offset: int) -> bytes:
            answer = self._range(key, offset, min(PART_BYTES, end - offset))
            if answer is None or answer[1:] != (total, version):
                raise CorruptionError(
                    f"reading {self.uri}/{key}", found="another writer changed it meanwhile", fix="read it again"
                )
            return answer[0]

        offsets = iter(range(start + len(data), end, PART_BYTES))
        yield from self._ahead(f"reading {self.uri}/{key}", fetch, offsets)

    def _receive(
        self,
        key: str,
        end: int,
        places: Iterator[tuple[int, memoryview]],
        arrived: Callable[[memoryview], None],
        *,
        whole: bool = False,
    ) -> None:
        """Ranges of an object up to `end`, in parallel, each to its place; `whole`: it must hold no more than that."""
        doing, seen = f"reading {self.uri}/{check_key(key)}", set[tuple[int, str]]()

        def fetch(offset: int, target: Target) -> None:
            found = self._range(key, offset, len(target.view), target)
            if found is None:
                self._check_end(key, offset + len(target.view))
            elif found[1] < end:
                raise CorruptionError(doing, found=f"{found[1]} bytes", expected=f"at least {end} bytes")
            seen.add(found[1:] if found else (-1, ""))
            if len(seen) > 1 or found is None or (whole and found[1] != end):
                raise CorruptionError(doing, found="another writer changed it meanwhile", fix="read it again")

        try:
            receive(self._pool, fetch, places, PARTS_IN_FLIGHT, arrived)
        except (CancelledError, ClosedError) as error:
            raise StoreUnavailableError(doing, found="that the store was closed meanwhile") from error

    def _check_end(self, key: str, end: int) -> None:
        info = self.info(key)
        if info is None:
            raise NotFoundError(f"reading {self.uri}/{key}", found="no such object")
        if end > info.size_bytes:
            raise CorruptionError(
                f"reading {self.uri}/{key}", found=f"{info.size_bytes} bytes", expected=f"at least {end} bytes"
            )

    def _range(self, key: str, start: int, length: int, into: Target | None = None) -> tuple[bytes, int, str] | None:
        """One ranged GET: its bytes (none where they went `into` a target), the object's size and its ETag; None where
        `start` is not before its end."""
        doing, asked = f"reading {self.uri}/{key}", f"bytes={start}-{start + length - 1}"
        direct = into is not None and self._wire is not None
        receiving = self._wire.receiving(into) if into and self._wire else contextlib.nullcontext()
        with self._translated(doing), receiving:
            try:
                answer = self._client.get_object(Bucket=self.bucket, Key=self._prefix + key, Range=asked)
            except ClientError as error:
                if status_of(error) == 416:
                    return None
                raise
            data = b"" if direct else answer["Body"].read()
        if "ContentRange" not in answer:
            raise StoreUnfitError(doing, found="an answer without Content-Range", expected="ranged reads")
        if into is not None and not direct and len(data) <= length:
            into.fill(data)
        count = into.received if into is not None and direct else len(data)
        size = answer["ContentRange"].rpartition("/")[2]
        if not size.isdecimal():
            raise StoreUnfitError(doing, found=f"Content-Range {answer['ContentRange'][:100]!r}", expected="its size")
        total = int(size)
        if count != min(length, total - start):
            raise StoreUnavailableError(
                doing, found=f"{count} bytes of {asked}, of {total}", fix="run it again; find out who cuts answers"
            )
        return data, total, answer["ETag"]

    def _ahead(self, doing: str, work: Callable[[S], T], items: Iterator[S]) -> Iterator[T]:
        try:
            yield from ahead(self._pool, work, items, PARTS_IN_FLIGHT)
        except (CancelledError, ClosedError) as error:
            raise StoreUnavailableError(doing, found="that the store was closed meanwhile") from error

    # --- errors

    def _see_bucket(self, key: str) -> None:
        """A missing object and a missing bucket answer HEAD alike: tell them apart, once."""
        if not self._bucket_seen:
            # By the key: a right to list may be bound to a prefix.
            self._client.list_objects_v2(Bucket=self.bucket, Prefix=self._prefix + key, MaxKeys=1)
            self._bucket_seen = True

    def _translated(self, doing: str) -> contextlib.AbstractContextManager[None]:
        return translated(doing, self._where)
