"""Uploads, commits and downloads through a line that breaks, to and from the real server.

Each ends within its deadline, by itself healed or with an error that says what to do; what others see is the old or
the new state; and a second run sends only what is missing.
"""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import botocore.auth
import pytest

from modelpress import load, pointer
from modelpress.errors import AccessDeniedError, CorruptionError, NotFoundError, StoreError, StoreUnavailableError
from modelpress.store.body import BLOCK_BYTES, Body
from modelpress.store.s3 import S3Store
from tests.conftest import ROOT, OpenS3, S3Server
from tests.faults.conftest import MIB, QUICK, SMALL_PART, file_of
from tests.faults.killed_publisher import check, deliver
from tests.faults.proxy import FOREVER, KINDS, FaultProxy
from tests.packs import Pack

pytestmark = [pytest.mark.faults, pytest.mark.s3]
# --- one fault, healed

HEALED = [kind for kind in KINDS if kind not in ("flip_answer", "slow_request", "trickle_answer")]


@pytest.mark.parametrize("kind", HEALED)
def test_one_fault_is_healed(
    open_s3: OpenS3, proxy: FaultProxy, kind: str, packs: tuple[Pack, Pack], tmp_path: Path
) -> None:
    """An upload, a commit, an entry of an alias's log and a download each meet the fault once."""
    before, _ = packs
    waits = {"s3_timeout_seconds": 0.6} if kind in ("stall_request", "stall_answer", "half_open") else {}
    through = open_s3("writer", s3_endpoint_url=proxy.endpoint, **QUICK | waits)
    path, digest = file_of(tmp_path, 2 * MIB)
    for method, address, work in (
        ("PUT", "/data", lambda: through.put("data", path, sha256=digest)),
        ("PUT", "/packs/", lambda: before.publish(through)),
        ("PUT", "/refs/", lambda: pointer.append(through, "demo", "champion", before.digest, "promote")),
        ("GET", "/data", lambda: through.download("data", tmp_path / "back")),
    ):
        proxy.heal()
        proxy.inject(kind, method, address, after=1000)
        happened = proxy.injected()
        work()
        assert proxy.injected() == happened + 1
    assert (tmp_path / "back").read_bytes() == path.read_bytes()
    load.verify(through, "demo", before.digest)
    assert [entry.pack for entry in pointer.history(through, "demo", "champion")] == [before.digest]
    assert sorted(item.name for item in tmp_path.iterdir()) == ["back", "data"]


def test_a_burst_of_slow_downs_is_waited_out(through: S3Store, proxy: FaultProxy) -> None:
    proxy.inject("slow_down", "PUT", times=3)
    assert through.put("k", b"content")
    proxy.inject("slow_down", "", times=3)
    assert through.get("k") == b"content"
    assert proxy.injected() == 6


# --- a fault that does not go away

LASTING = ["cut_request", "half_open", "garbage", "slow_down", "lost", "flip_request", "reset_request"]


@pytest.mark.parametrize("kind", LASTING)
def test_a_fault_that_lasts_ends_in_a_clear_error_and_changes_nothing(
    open_s3: OpenS3, proxy: FaultProxy, kind: str, packs: tuple[Pack, Pack], tmp_path: Path
) -> None:
    direct = open_s3("writer")
    before, after = packs
    deliver(direct, before)
    path, digest = file_of(tmp_path, MIB)
    direct.put("data", path)
    through = open_s3("writer", s3_endpoint_url=proxy.endpoint, **QUICK | {"s3_timeout_seconds": 0.5, "s3_attempts": 2})
    proxy.inject(kind, times=FOREVER, after=100)
    started = time.monotonic()
    works: list[Callable[[], object]] = [
        lambda: through.put("new", path, sha256=digest),
        lambda: after.publish(through),
        lambda: pointer.append(through, "demo", "champion", before.digest, "promote"),
    ]
    if kind != "flip_request":  # a download has no body to change
        works.append(lambda: through.download("data", tmp_path / "back"))
    for work in works:
        with pytest.raises((StoreError, CorruptionError)) as caught:
            work()
        assert proxy.endpoint in str(caught.value) or "fix:" in str(caught.value)
    assert time.monotonic() - started < 60
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    if kind == "lost":  # the server did what was asked: visible, and whole
        assert direct.get("new") == path.read_bytes()
    else:
        assert direct.info("new") is None
    check(direct, before, after)
    deliver(direct, after)
    check(direct, before, after, done=True)


def test_an_answer_that_trickles_ends_at_the_deadline(open_s3: OpenS3, proxy: FaultProxy) -> None:
    open_s3("writer").put("k", b"x" * 1000)
    store = open_s3("writer", s3_endpoint_url=proxy.endpoint, s3_timeout_seconds=1, s3_deadline_seconds=1.5)
    proxy.inject("trickle_answer", "GET", times=FOREVER)  # never silent for long, and 100 seconds in all
    started = time.monotonic()
    with pytest.raises(StoreUnavailableError, match="MODELPRESS_S3_DEADLINE_SECONDS"):
        store.get("k")
    assert 1.4 < time.monotonic() - started < 20


def test_a_slow_line_is_no_dead_line(open_s3: OpenS3, proxy: FaultProxy, tmp_path: Path) -> None:
    # Several times the limits on silence and on connecting pass while the body is sent, and there is no second attempt.
    path, digest = file_of(tmp_path, 10 * MIB)
    store = open_s3("writer", s3_endpoint_url=proxy.endpoint, s3_timeout_seconds=2, s3_connect_seconds=1, s3_attempts=1)
    proxy.inject("slow_request", "PUT", rate=3 * MIB)
    started = time.monotonic()
    assert store.put("k", path, sha256=digest)
    assert time.monotonic() - started > 3
    assert proxy.sent("PUT") == 10 * MIB


def test_bytes_changed_on_the_way_down_are_found_out(
    through: S3Store, proxy: FaultProxy, packs: tuple[Pack, Pack], tmp_path: Path
) -> None:
    before, _ = packs
    before.publish(through)
    proxy.inject("flip_answer", "GET", "/blobs/")
    with pytest.raises(CorruptionError):
        load.verify(through, "demo", before.digest)
    load.verify(through, "demo", before.digest)


def test_a_file_is_read_once_and_never_whole_in_memory(
    through: S3Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, digest = file_of(tmp_path, 30 * MIB + 1)
    read, readinto = [0], Body.readinto

    def counted(body: Body, buffer: bytearray) -> int:
        read[0] += (count := readinto(body, buffer))
        return count

    monkeypatch.setattr(Body, "readinto", counted)
    tracemalloc.start()
    try:
        assert through.put("k", path, sha256=digest)
        # The proxy, in this process, holds some blocks of its own.
        assert tracemalloc.get_traced_memory()[1] < 4 * BLOCK_BYTES
    finally:
        tracemalloc.stop()
    assert read[0] == path.stat().st_size


def test_over_tls(
    open_s3: OpenS3, s3_server: S3Server, small_parts: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=127.0.0.1", "-days", "2"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*request, *names], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    path, digest = file_of(tmp_path, SMALL_PART + MIB)
    with FaultProxy(s3_server.endpoint, context) as proxy:
        with pytest.raises(StoreUnavailableError, match="CERTIFICATE_VERIFY_FAILED"):
            open_s3("writer", s3_endpoint_url=proxy.endpoint, **QUICK).put("k", b"x")
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
        store = open_s3("writer", s3_endpoint_url=proxy.endpoint, **QUICK)
        proxy.inject("reset_request", "PUT", after=MIB)
        assert store.put("large", path, sha256=digest)
        assert store.put("small", b"x", if_absent=True)
        assert store.download("large", tmp_path / "back") == digest
        assert proxy.injected() == 1
        assert store.get("small") == b"x"


# --- what others see


def test_readers_see_the_old_or_the_new_state_while_everything_breaks(
    open_s3: OpenS3, through: S3Store, proxy: FaultProxy, packs: tuple[Pack, Pack]
) -> None:
    before, after = packs
    deliver(open_s3("writer"), before)
    reader, done, looks = open_s3("reader"), threading.Event(), [0]

    def look() -> None:
        while not done.is_set():
            check(reader, before, after)
            looks[0] += 1

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        try:
            for kind in ("lost", "cut_request", "slow_down", "reset_answer", "garbage", "flip_request"):
                proxy.inject(kind, "PUT", times=2, after=100)
                proxy.inject(kind, "HEAD", times=1)
            for _ in range(20):  # a publisher that is run again until it goes through
                try:
                    deliver(through, after)
                    break
                except (StoreError, CorruptionError):
                    continue
        finally:
            done.set()
        looking.result(60)
    assert looks[0]
    assert proxy.injected() >= 12
    check(reader, before, after, done=True)


def test_two_publishers_of_one_pack_both_succeed(open_s3: OpenS3, packs: tuple[Pack, Pack]) -> None:
    stores = [open_s3("writer") for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(packs[0].publish, stores))
    assert {report.pack for report in reports} == {packs[0].digest}
    manifests = [info.key for info in stores[0].list("packs/")]
    assert len(manifests) == 1
    load.verify(stores[0], "demo", packs[0].digest)
    again = packs[0].publish(stores[1])
    assert (again.sent_objects, again.sent_bytes) == (0, 0)


# --- refusals, by the real server


def test_a_clock_that_is_wrong_is_named(open_s3: OpenS3, monkeypatch: pytest.MonkeyPatch) -> None:
    store, now = open_s3("writer"), vars(botocore.auth)["get_current_datetime"]
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda *a, **k: now(*a, **k) - timedelta(hours=2))
    for work in (lambda: store.put("k", b"x"), lambda: store.get("k"), lambda: list(store.list())):
        with pytest.raises(AccessDeniedError, match="set the clock"):
            work()


def test_a_pack_is_refused_to_a_reader_and_to_a_bucket_that_is_not_there(
    open_s3: OpenS3, s3_server: S3Server, packs: tuple[Pack, Pack]
) -> None:
    with pytest.raises(AccessDeniedError, match="s3:PutObject"):
        packs[0].publish(open_s3("reader"))
    writer = open_s3("writer")
    assert list(writer.list()) == []
    with pytest.raises(NotFoundError, match="create the bucket"):
        packs[0].publish(S3Store("s3://no-such-bucket-here/x", s3_server.settings()))


FULL = """
import resource, sys
from pathlib import Path
from modelpress.errors import StoreFullError
from modelpress.store import open_store
store, folder = open_store(sys.argv[1]), Path(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
try:
    store.download("k", folder / "copy")
except StoreFullError as error:
    assert "free space" in str(error)
    assert list(folder.iterdir()) == []
    print("held")
"""


def test_a_disk_that_fills_while_downloading(open_s3: OpenS3, s3_server: S3Server, tmp_path: Path) -> None:
    store = open_s3("writer")
    store.put("k", b"x" * (2 * MIB))
    command = [sys.executable, "-c", FULL, store.uri, str(tmp_path)]
    environment = os.environ | s3_server.environment()
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "held\n", done.stderr
