"""Large objects through a line that breaks, and processes and servers that die: what is there is not sent again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from modelpress.errors import CorruptionError, StoreUnavailableError
from modelpress.store import s3_multipart
from modelpress.store.s3 import S3Store
from tests.conftest import ROOT, OpenS3, S3Server
from tests.faults.conftest import MIB, QUICK, SMALL_PART, file_of
from tests.faults.proxy import FOREVER, FaultProxy

pytestmark = [pytest.mark.faults, pytest.mark.s3]


@pytest.fixture
def patient(open_s3: OpenS3, proxy: FaultProxy) -> Iterator[S3Store]:
    """A store behind the proxy that takes no slow answer for a lost one, so that what was sent can be counted."""
    changes = QUICK | {"s3_timeout_seconds": 20, "s3_deadline_seconds": 60}
    with closing(open_s3("writer", s3_endpoint_url=proxy.endpoint, **changes)) as store:
        yield store


def unfinished(store: S3Store) -> list[str]:
    answer = store._client.list_multipart_uploads(Bucket=store.bucket, Prefix=store._prefix)
    return [upload["UploadId"] for upload in answer.get("Uploads", [])]


def test_a_broken_upload_in_parts_sends_only_what_is_missing(
    open_s3: OpenS3, patient: S3Store, proxy: FaultProxy, small_parts: None, tmp_path: Path
) -> None:
    path, digest = file_of(tmp_path, 6 * SMALL_PART + 1000)
    proxy.inject("slow_down", "PUT", "partNumber=5", times=FOREVER)
    with pytest.raises(StoreUnavailableError):
        patient.put("large", path, sha256=digest)
    buffers = patient._multipart.buffers
    wait_for(lambda: len(buffers._free) == buffers.held)  # parts behind the broken one were on their way
    assert patient.info("large") is None
    upload = unfinished(patient)
    assert len(upload) == 1
    parts = patient._client.list_parts(Bucket=patient.bucket, Key=patient._prefix + "large", UploadId=upload[0])
    there = sum(part["Size"] for part in parts["Parts"])
    assert there >= 4 * SMALL_PART
    proxy.heal()
    before = proxy.sent("PUT")
    assert patient.put("large", path, sha256=digest)
    assert proxy.sent("PUT") - before == path.stat().st_size - there
    assert unfinished(patient) == []
    assert open_s3("writer").download("large", tmp_path / "back") == digest


@pytest.mark.parametrize(
    ("kind", "method", "address"),
    [
        ("lost", "POST", "uploadId"),  # complete: the second one meets no upload, and the object stands
        ("twice", "POST", "uploadId"),
        ("error_500", "POST", "uploadId"),
        ("lost", "POST", "uploads"),  # create: what it left is found and used
        ("slow_down", "POST", "uploads"),
        ("twice", "PUT", "partNumber=2"),
        ("lost", "PUT", "partNumber=2"),
        ("flip_request", "PUT", "partNumber=2"),
        ("cut_request", "PUT", "partNumber=1"),
        ("garbage", "GET", "uploads"),
    ],
)
def test_one_fault_among_parts_is_healed(
    patient: S3Store, proxy: FaultProxy, small_parts: None, kind: str, method: str, address: str, tmp_path: Path
) -> None:
    path, digest = file_of(tmp_path, 2 * SMALL_PART + 1000)
    proxy.inject(kind, method, address, after=MIB)
    assert patient.put("large", path, sha256=digest)
    assert proxy.injected() == 1
    assert unfinished(patient) == []
    assert patient.download("large", tmp_path / "back") == digest


def test_the_uploads_of_others_are_never_aborted(patient: S3Store, small_parts: None, tmp_path: Path) -> None:
    path, digest = file_of(tmp_path, 2 * SMALL_PART)
    key, client = patient._prefix + "large", patient._client

    def begin(data: bytes) -> str:
        upload = client.create_multipart_upload(Bucket=patient.bucket, Key=key)["UploadId"]
        client.upload_part(Bucket=patient.bucket, Key=key, UploadId=upload, PartNumber=1, Body=data)
        return upload

    cut_otherwise, continued = begin(b"x" * (SMALL_PART + 1)), begin(path.read_bytes()[:SMALL_PART])
    with pytest.raises(CorruptionError):  # it went on with one of them, and leaves it
        patient.put("large", path, sha256="0" * 64)
    assert set(unfinished(patient)) == {cut_otherwise, continued}
    assert patient.put("large", path, sha256=digest)
    assert set(unfinished(patient)) == {cut_otherwise}
    client.abort_multipart_upload(Bucket=patient.bucket, Key=key, UploadId=cut_otherwise)


def test_parts_in_memory_are_bounded_over_all_uploads(
    open_s3: OpenS3, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_s3("writer")
    buffers = store._multipart.buffers
    live: set[int] = set()
    most, lock = 0, threading.Lock()
    take, give_back = buffers.take, buffers.give_back

    def counted(size: int) -> bytearray:
        nonlocal most
        buffer = take(size)
        with lock:
            live.add(id(buffer))
            most = max(most, len(live))
        return buffer

    def returned(buffer: bytearray) -> None:
        with lock:
            live.discard(id(buffer))
        give_back(buffer)

    monkeypatch.setattr(buffers, "take", counted)
    monkeypatch.setattr(buffers, "give_back", returned)
    data = os.urandom(MIB) * 22
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: store.put(name, data), "abcd"))
    assert 1 < most <= s3_multipart.PART_BUFFERS
    assert not live
    assert buffers.held <= s3_multipart.PART_BUFFERS
    with pytest.raises(CorruptionError):  # what fails gives back too
        store.put("e", data, sha256="0" * 64)
    assert not live


# --- processes and servers that die

UPLOAD = """
import sys
from pathlib import Path
from modelpress.store import open_store, s3, s3_multipart
s3.MULTIPART_BYTES = s3_multipart.PART_BYTES = int(sys.argv[3])
open_store(sys.argv[1]).put("large", Path(sys.argv[2]))
"""


def test_a_process_killed_among_parts_goes_on(
    patient: S3Store, proxy: FaultProxy, s3_server: S3Server, small_parts: None, tmp_path: Path
) -> None:
    path, digest = file_of(tmp_path, 8 * SMALL_PART)
    proxy.inject("stall_request", "PUT", "partNumber=6", times=FOREVER, after=MIB)
    environment = os.environ | s3_server.environment() | {"MODELPRESS_S3_ENDPOINT_URL": proxy.endpoint}
    command = [sys.executable, "-c", UPLOAD, patient.uri, str(path), str(SMALL_PART)]
    with subprocess.Popen(command, env=environment, cwd=ROOT) as process:
        wait_for(lambda: proxy.injected() == 1 or process.poll() is not None)
        wait_for(lambda: sum(passed.status == 200 for passed in proxy.log if passed.method == "PUT") >= 7)
        process.send_signal(signal.SIGKILL)
    (upload,) = unfinished(patient)
    assert patient.info("large") is None
    parts = patient._client.list_parts(Bucket=patient.bucket, Key=patient._prefix + "large", UploadId=upload)["Parts"]
    proxy.heal()
    before = proxy.sent("PUT")
    assert patient.put("large", path, sha256=digest)
    assert len(parts) == 7
    assert proxy.sent("PUT") - before == SMALL_PART  # the one that was stalled, and no other
    assert patient.download("large", tmp_path / "back") == digest


def test_a_server_killed_in_the_middle_comes_back(
    open_s3: OpenS3, s3_server: S3Server, proxy: FaultProxy, small_parts: None, tmp_path: Path
) -> None:
    if s3_server.folder is None:
        pytest.skip("the server is not this session's to kill: unset MODELPRESS_TEST_S3_ENDPOINT")
    path, digest = file_of(tmp_path, 8 * SMALL_PART)
    store = open_s3(
        "writer", s3_endpoint_url=proxy.endpoint, s3_timeout_seconds=20, s3_attempts=20, s3_backoff_seconds=0.1
    )
    proxy.inject("delay", "PUT", "partNumber", times=FOREVER, seconds=0.2)
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(store.put, "large", path, sha256=digest)
        wait_for(lambda: any("partNumber" in passed.address and passed.status for passed in proxy.log))
        s3_server.restart()
        assert sending.result(120)
    assert store.download("large", tmp_path / "back") == digest
    assert unfinished(store) == []


def wait_for(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)
