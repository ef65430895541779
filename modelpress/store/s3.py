"""A store in an S3 bucket: AWS, Ceph RGW and every server with conditional creation (``If-None-Match: *``).

What is relied on is the least that such servers share: conditional creation, ranged reads, multipart uploads that
can be listed. Checks of content are ours (sha256), because not every server keeps the SDK's newer checksums.
"""
# ruff: noqa: D102  (methods are documented where the interface is, in base.py)

from __future__ import annotations

import contextlib
import hashlib
import itertools
import random
import time
import urllib.parse
import uuid
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import boto3.session
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    IncompleteReadError,
    ReadTimeoutError,
    ResponseStreamingError,
)

from modelpress.errors import (
    ConfigError,
    CorruptionError,
    NotFoundError,
    StoreFullError,
    StoreUnavailableError,
    StoreUnfitError,
)
from modelpress.settings import Settings
from modelpress.store.base import ObjectInfo, Store, check_digest, check_key, check_range
from modelpress.store.local import local_errors
from modelpress.store.s3_errors import Where, code_of, status_of, translate
from modelpress.store.threads import ClosedError, DaemonPool, ahead

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

MULTIPART_BYTES = 64 * 2**20
"""Larger objects travel in parts, and an interrupted upload continues."""
PART_BYTES = 16 * 2**20
"""Least size of a part, and of a ranged read."""
MAX_PARTS = 10_000
PARTS_IN_FLIGHT = 4
"""Requests for parts at a time, per store object. Each `put`, `get` or `download` that runs holds at most this many
parts in memory, so the calls that run at a time bound it."""
LOST_UPLOAD = {"NoSuchUpload", "InvalidPart"}
"""Another process was at the same upload: it completed or aborted it, or sent a part again."""

S = TypeVar("S")
T = TypeVar("T")


class S3Store(Store):
    """Objects in `s3://bucket/prefix`.

    Credentials follow the AWS SDK's chain. A request that gets no answer for `Settings.s3_timeout_seconds` is sent
    again, with exponential backoff and jitter, up to `Settings.s3_attempts` times in all.

    Raises:
        ConfigError: the URI or the endpoint is not legal.
    """

    def __init__(self, uri: str, settings: Settings) -> None:
        bucket, _, prefix = uri.removeprefix("s3://").rstrip("/").partition("/")
        if not uri.startswith("s3://") or not bucket:
            raise ConfigError("opening a store", found=uri, expected="s3://bucket or s3://bucket/prefix")
        super().__init__(f"s3://{bucket}/{prefix}".rstrip("/"))
        self.bucket, self._prefix = bucket, f"{check_key(prefix)}/" if prefix else ""
        self._attempts = settings.s3_attempts
        self._client, self._where = _connect(bucket, settings)
        self._pool = DaemonPool(PARTS_IN_FLIGHT, "s3-part")
        self._bucket_seen = False

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        check_range(key, start, length)
        return b"".join(self._pieces(key, start, length))

    def download(self, key: str, path: Path) -> str:
        digest = hashlib.sha256()
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
        with local_errors(f"downloading {self.uri}/{key} to {path}"):
            try:
                with partial.open("xb") as target:
                    for piece in self._pieces(key, 0, None):
                        digest.update(piece)
                        target.write(piece)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
        return digest.hexdigest()

    def put(self, key: str, data: bytes | Path, *, if_absent: bool = False, sha256: str | None = None) -> bool:
        doing = f"storing {self.uri}/{check_key(key)}"
        with local_errors(f"reading {data}") if isinstance(data, Path) else contextlib.nullcontext():
            size = data.stat().st_size if isinstance(data, Path) else len(data)
            if not if_absent and size > MULTIPART_BYTES:
                self._put_parts(key, data, size, sha256)
                return True
            data = data.read_bytes() if isinstance(data, Path) else data
        if sha256 is not None:
            check_digest(doing, hashlib.sha256(data).hexdigest(), sha256)
        if if_absent:
            return self._create(key, data)
        with self._translated(doing):
            self._client.put_object(Bucket=self.bucket, Key=self._prefix + key, Body=data)
        return True

    def info(self, key: str) -> ObjectInfo | None:
        check_key(key)
        with self._translated(f"looking at {self.uri}/{key}"):
            try:
                answer = self._client.head_object(Bucket=self.bucket, Key=self._prefix + key)
            except ClientError as error:
                if status_of(error) != 404:
                    raise
                self._see_bucket()
                return None
            return ObjectInfo(key, answer["ContentLength"])

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        check_key(prefix, prefix=True)
        with self._translated(f"listing {self.uri}/{prefix}"):
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.bucket, Prefix=self._prefix + prefix):
                for item in page.get("Contents", []):
                    yield ObjectInfo(item["Key"].removeprefix(self._prefix), item["Size"])

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

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    # --- one object, conditionally

    def _create(self, key: str, data: bytes) -> bool:
        """Create an object unless it exists. 412: it does. 409: another writer is at it; look, and try again if it
        left nothing."""
        for attempt in itertools.count():
            with self._translated(f"creating {self.uri}/{key} only if absent"):
                try:
                    self._client.put_object(Bucket=self.bucket, Key=self._prefix + key, Body=data, IfNoneMatch="*")
                    return True
                except ClientError as error:
                    if status_of(error) == 412:
                        return False
                    if status_of(error) != 409 or attempt + 1 >= self._attempts:
                        raise
            if self.info(key) is not None:
                return False
            _back_off(attempt)
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

    def _check_end(self, key: str, end: int) -> None:
        info = self.info(key)
        if info is None:
            raise NotFoundError(f"reading {self.uri}/{key}", found="no such object")
        if end > info.size_bytes:
            raise CorruptionError(
                f"reading {self.uri}/{key}", found=f"{info.size_bytes} bytes", expected=f"at least {end} bytes"
            )

    def _range(self, key: str, start: int, length: int) -> tuple[bytes, int, str] | None:
        """One ranged GET: its bytes, the object's size and its ETag; None where `start` is not before its end.

        A stream that breaks off is read again.
        """
        doing, asked = f"reading {self.uri}/{key}", f"bytes={start}-{start + length - 1}"
        for attempt in itertools.count(1):
            with self._translated(doing):
                try:
                    answer = self._client.get_object(Bucket=self.bucket, Key=self._prefix + key, Range=asked)
                except ClientError as error:
                    if status_of(error) == 416:
                        return None
                    raise
                if "ContentRange" not in answer:
                    raise StoreUnfitError(doing, found="an answer without Content-Range", expected="ranged reads")
                total = int(answer["ContentRange"].rpartition("/")[2])
                try:
                    data = answer["Body"].read()
                    if len(data) == min(length, total - start):
                        return data, total, answer["ETag"]
                    found = f"{len(data)} bytes"
                except (IncompleteReadError, ResponseStreamingError, ReadTimeoutError) as error:
                    found = str(error)
            if attempt >= self._attempts:
                raise StoreUnavailableError(
                    doing,
                    found=f"the stream of {asked} broke off {attempt} times: {found}",
                    fix=f"check the network and the server behind {self._where.endpoint}",
                )
            _back_off(attempt)
        raise AssertionError("unreachable")

    # --- writing in parts

    def _put_parts(self, key: str, source: bytes | Path, size: int, sha256: str | None) -> None:
        """Multipart upload that continues where an earlier one stopped.

        Another process may be at the same upload (same key, so same bytes): when it completes first, ours is gone and
        the object stands.
        """
        doing = f"storing {self.uri}/{key}"
        for last in (False, True):
            upload, there = self._open_upload(key, size)
            try:
                with self._translated(doing, passing=LOST_UPLOAD):
                    self._send_parts(key, upload, there, source, size, sha256)
                    return
            except (CorruptionError, StoreFullError):
                with contextlib.suppress(BotoCoreError, ClientError):
                    self._client.abort_multipart_upload(Bucket=self.bucket, Key=self._prefix + key, UploadId=upload)
                raise
            except ClientError as error:
                info = self.info(key) if code_of(error) == "NoSuchUpload" else None
                if info is not None and info.size_bytes == size:
                    return
                if last:
                    raise translate(doing, error, self._where) from error

    def _send_parts(
        self,
        key: str,
        upload: str,
        there: dict[int, tuple[int, str]],
        source: bytes | Path,
        size: int,
        sha256: str | None,
    ) -> None:
        full = self._prefix + key
        digest = hashlib.sha256()

        def send(part: tuple[int, bytes]) -> str:
            number, data = part
            if number in there and there[number] == (len(data), hashlib.md5(data, usedforsecurity=False).hexdigest()):
                return there[number][1]
            return self._client.upload_part(
                Bucket=self.bucket, Key=full, UploadId=upload, PartNumber=number, Body=data
            )["ETag"].strip('"')

        def parts() -> Iterator[tuple[int, bytes]]:
            for number, data in enumerate(_cut(source, part_size(size)), 1):
                digest.update(data)
                yield number, data

        tags = list(self._ahead(f"storing {self.uri}/{key}", send, parts()))
        origin = f" from {source}" if isinstance(source, Path) else ""
        check_digest(f"storing {self.uri}/{key}{origin}", digest.hexdigest(), sha256)
        listed: list[CompletedPartTypeDef] = [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(tags, 1)]
        self._client.complete_multipart_upload(
            Bucket=self.bucket, Key=full, UploadId=upload, MultipartUpload={"Parts": listed}
        )

    def _open_upload(self, key: str, size: int) -> tuple[str, dict[int, tuple[int, str]]]:
        """The newest unfinished upload of this key that was cut as we cut, with its parts (number → size, md5); else
        a new one. One that was cut otherwise is left to its owner, or to the bucket's lifecycle rule."""
        full, part_bytes = self._prefix + key, part_size(size)
        with self._translated(f"looking for an unfinished upload of {self.uri}/{key}"):
            uploads = self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket, Prefix=full)
            mine = [item for page in uploads for item in page.get("Uploads", []) if item["Key"] == full]
            for item in sorted(mine, key=lambda item: item["Initiated"], reverse=True):
                parts = self._parts(full, item["UploadId"])
                if all(length == min(part_bytes, size - part_bytes * (n - 1)) for n, (length, _) in parts.items()):
                    return item["UploadId"], parts
            return self._client.create_multipart_upload(Bucket=self.bucket, Key=full)["UploadId"], {}

    def _parts(self, full: str, upload: str) -> dict[int, tuple[int, str]]:
        found: dict[int, tuple[int, str]] = {}
        with contextlib.suppress(self._client.exceptions.NoSuchUpload):  # ended since it was listed
            pages = self._client.get_paginator("list_parts")
            for page in pages.paginate(Bucket=self.bucket, Key=full, UploadId=upload):
                found |= {part["PartNumber"]: (part["Size"], part["ETag"].strip('"')) for part in page.get("Parts", [])}
        return found

    def _ahead(self, doing: str, work: Callable[[S], T], items: Iterator[S]) -> Iterator[T]:
        try:
            yield from ahead(self._pool, work, items, PARTS_IN_FLIGHT)
        except (CancelledError, ClosedError) as error:
            raise StoreUnavailableError(doing, found="that the store was closed meanwhile") from error

    # --- errors

    def _see_bucket(self) -> None:
        """A missing object and a missing bucket answer HEAD alike: tell them apart, once."""
        if not self._bucket_seen:
            self._client.list_objects_v2(Bucket=self.bucket, Prefix=self._prefix, MaxKeys=1)
            self._bucket_seen = True

    @contextlib.contextmanager
    def _translated(self, doing: str, *, passing: Collection[str] = ()) -> Iterator[None]:
        """Turn the SDK's errors into the store's, except refusals with the codes `passing`."""
        try:
            yield
        except ClientError as error:
            if code_of(error) in passing:
                raise
            raise translate(doing, error, self._where) from error
        except BotoCoreError as error:
            raise translate(doing, error, self._where) from error


def part_size(size: int) -> int:
    """Bytes of every part but the last: a function of the object's size alone, so that a later process cuts alike."""
    needed = -(-size // MAX_PARTS)
    return max(PART_BYTES, -(-needed // 2**20) * 2**20)


def _cut(source: bytes | Path, part_bytes: int) -> Iterator[bytes]:
    """The bytes in parts, one in memory at a time beside what was given."""
    if isinstance(source, Path):
        with local_errors(f"reading {source}"), source.open("rb") as file:
            while data := file.read(part_bytes):
                yield data
    else:
        view = memoryview(source)
        for start in range(0, len(view), part_bytes):
            yield bytes(view[start : start + part_bytes])


def _connect(bucket: str, settings: Settings) -> tuple[S3Client, Where]:
    """A client of its own session, and what error messages may say about it."""
    session = boto3.session.Session()
    endpoint = settings.s3_endpoint_url or None
    timeout = settings.s3_timeout_seconds
    config = Config(
        connect_timeout=min(5.0, timeout),
        read_timeout=timeout,
        retries={"mode": "standard", "total_max_attempts": settings.s3_attempts},
        max_pool_connections=64,
        tcp_keepalive=True,
        # The newer default checksums are refused or dropped by other servers; signing the payload's sha256 makes
        # every server check what it receives, over HTTPS as well.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"payload_signing_enabled": True, "addressing_style": "path" if endpoint else "auto"},
    )
    try:
        client = session.client("s3", endpoint_url=endpoint, region_name=settings.s3_region, config=config)
        credentials = session.get_credentials()
    except (ValueError, BotoCoreError) as error:
        found = f"endpoint {endpoint!r}, region {settings.s3_region!r}: {error}"
        fix = "set MODELPRESS_S3_ENDPOINT_URL to http://host:port or https://host"
        raise ConfigError(f"opening s3://{bucket}", found=found, fix=fix) from error
    source = credentials.method if credentials else ""
    return client, Where(endpoint=_without_login(client.meta.endpoint_url), bucket=bucket, credentials=source)


def _without_login(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _back_off(attempt: int) -> None:
    time.sleep(random.uniform(0, min(10.0, 0.2 * 2**attempt)))
