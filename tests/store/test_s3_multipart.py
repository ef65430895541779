"""Large objects in parts, on the S3 server: sent, killed, aborted, changed by others, and continued."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from modelpress.errors import CorruptionError
from modelpress.store.s3 import MULTIPART_BYTES, S3Store
from modelpress.store.s3_multipart import PART_BYTES, part_size
from tests.conftest import OpenS3, S3Server

pytestmark = pytest.mark.s3
MIB = 2**20


UPLOAD = """
import sys
from pathlib import Path
from modelpress.store import open_store
open_store(sys.argv[1]).put("large", Path(sys.argv[2]))
"""


def unfinished(store: S3Store) -> dict[str, int]:
    """Unfinished uploads of "large": id → parts that the server has."""
    client, key = store._client, store._prefix + "large"
    uploads = client.list_multipart_uploads(Bucket=store.bucket, Prefix=key).get("Uploads", [])
    return {
        upload["UploadId"]: len(
            client.list_parts(Bucket=store.bucket, Key=key, UploadId=upload["UploadId"]).get("Parts", [])
        )
        for upload in uploads
    }


def test_large_bytes_go_in_parts(open_s3: OpenS3) -> None:
    store = open_s3("writer")
    sent: list[str] = []
    for operation in ("PutObject", "UploadPart"):
        store._client.meta.events.register(f"before-call.s3.{operation}", lambda model, **_: sent.append(model.name))
    data = os.urandom(MIB) * (MULTIPART_BYTES // MIB) + b"rest"
    with pytest.raises(CorruptionError):
        store.put("large", data, sha256="0" * 64)
    assert store.info("large") is None
    assert unfinished(store) == {}
    sent.clear()
    assert store.put("large", data, sha256=hashlib.sha256(data).hexdigest())
    assert sent == ["UploadPart"] * (MULTIPART_BYTES // PART_BYTES + 1)
    assert store.get("large") == data


@pytest.mark.faults
def test_a_part_that_another_process_changed_is_sent_again(open_s3: OpenS3) -> None:
    store = open_s3("writer")
    data = os.urandom(MIB) * 65
    client, changed = open_s3("writer")._client, list[str]()

    def change(params: dict[str, object], **_: object) -> None:
        if not changed:
            (upload,) = unfinished(store)
            changed.append(upload)
            client.upload_part(
                Bucket=store.bucket, Key=store._prefix + "large", UploadId=upload, PartNumber=2, Body=b"x" * PART_BYTES
            )

    store._client.meta.events.register("before-call.s3.CompleteMultipartUpload", change)
    assert store.put("large", data, sha256=hashlib.sha256(data).hexdigest())
    assert changed
    assert store.get("large") == data


@pytest.mark.parametrize("size", [1, PART_BYTES, 100 * MIB, 200 * 2**30, 5 * 2**40])
def test_parts_are_few_enough_and_not_too_large(size: int) -> None:
    part = part_size(size)
    assert part >= 5 * MIB
    assert -(-size // part) <= 10_000
    assert part <= 5 * 2**30
    assert part == PART_BYTES or size > PART_BYTES * 9_999


def test_a_large_object_in_parts(open_s3: OpenS3, tmp_path: Path) -> None:
    store = open_s3("writer")
    path = tmp_path / "large"
    path.write_bytes(os.urandom(MIB) * 65 + b"rest")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(CorruptionError, match="0" * 64):
        store.put("large", path, sha256="0" * 64)
    assert unfinished(store) == {}
    assert store.info("large") is None
    assert store.put("large", path, sha256=digest)
    assert store.download("large", tmp_path / "again") == digest
    assert store.get("large", 65 * MIB - 2) == path.read_bytes()[-6:]


@pytest.mark.faults
def test_an_upload_that_was_killed_continues(open_s3: OpenS3, s3_server: S3Server, tmp_path: Path) -> None:
    store = open_s3("writer")
    path = tmp_path / "large"
    path.write_bytes(b"".join(os.urandom(MIB) * 16 for _ in range(12)))
    command = [sys.executable, "-c", UPLOAD, store.uri, str(path)]
    with subprocess.Popen(command, env=os.environ | s3_server.environment()) as process:
        while process.poll() is None and sum(unfinished(store).values()) < 3:
            time.sleep(0.02)
        process.kill()
    before = unfinished(store)
    assert len(before) == 1, "the upload ended before it could be killed"
    assert store.info("large") is None

    sent: list[str] = []
    store._client.meta.events.register("before-call.s3.UploadPart", lambda params, **_: sent.append(params["url"]))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert store.put("large", path, sha256=digest)
    assert len(sent) <= 12 - sum(before.values())
    assert unfinished(store) == {}
    assert store.download("large", tmp_path / "again") == digest


def test_an_upload_that_somebody_aborted_is_not_taken_for_an_older_object(open_s3: OpenS3, tmp_path: Path) -> None:
    """A repair sends other bytes of the same length over an object that stands."""
    store = open_s3("writer")
    damaged, whole = tmp_path / "damaged", tmp_path / "whole"
    damaged.write_bytes(bytes(MULTIPART_BYTES + 1))
    whole.write_bytes(os.urandom(MULTIPART_BYTES + 1))
    assert store.put("large", damaged)
    aborted: list[str] = []

    def abort(params: dict[str, Any], **_: object) -> None:
        if not aborted:
            for upload in store._client.list_multipart_uploads(Bucket=store.bucket).get("Uploads", []):
                aborted.append(upload["UploadId"])
                store._client.abort_multipart_upload(
                    Bucket=store.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                )

    store._client.meta.events.register("before-call.s3.UploadPart", abort)
    digest = hashlib.sha256(whole.read_bytes()).hexdigest()
    store.put("large", whole, sha256=digest)
    assert aborted
    assert store.download("large", tmp_path / "again") == digest


@pytest.mark.faults
def test_an_interrupted_upload_of_other_bytes_is_not_continued_blindly(open_s3: OpenS3, tmp_path: Path) -> None:
    store = open_s3("writer")
    full = store._prefix + "large"
    upload = store._client.create_multipart_upload(Bucket=store.bucket, Key=full)["UploadId"]
    for number, data in ((1, b"x" * PART_BYTES), (2, b"short" * MIB), (9, b"beyond the end")):
        store._client.upload_part(Bucket=store.bucket, Key=full, UploadId=upload, PartNumber=number, Body=data)
    path = tmp_path / "large"
    path.write_bytes(os.urandom(MIB) * 65)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert store.put("large", path, sha256=digest)
    assert store.download("large", tmp_path / "again") == digest
