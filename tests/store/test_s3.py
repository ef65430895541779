from __future__ import annotations

import hashlib
import http.client
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from botocore.exceptions import ClientError

from modelpress.errors import (
    AccessDeniedError,
    ConfigError,
    CorruptionError,
    NotFoundError,
    StoreError,
    StoreFullError,
    StoreUnavailableError,
    StoreUnfitError,
)
from modelpress.store import Store
from modelpress.store.s3 import MULTIPART_BYTES, S3Store
from modelpress.store.s3_errors import Where, translate
from modelpress.store.s3_multipart import PART_BYTES, part_size
from tests.conftest import OpenS3, S3Server
from tests.store.conformance import StoreConformance

pytestmark = pytest.mark.s3
MIB = 2**20


@pytest.fixture
def store(open_s3: OpenS3, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Store:
    return open_s3("writer")


class TestS3Store(StoreConformance):
    pass


class Proxy:
    """A small gateway in front of the S3 server: a real server behind it that answers unfitly.

    With `drop_header`, requests go on without that header, signed anew (it is part of the signature). Of the answers
    to ranged GETs, the first `cut` break off in the middle; of those to PUTs, the first `lost` never arrive.
    """

    def __init__(self, server: S3Server, *, drop_header: str = "", cut: int = 0, lost: int = 0) -> None:
        upstream, proxy = urlsplit(server.endpoint).netloc, self
        self.cut, self.gets, self.lost = cut, 0, lost

        def sign_anew(method: str, path: str, body: bytes, headers: dict[str, str]) -> dict[str, str]:
            kept = {
                name: headers[name] for name in headers if name.lower() in ("content-type", "range", "if-none-match")
            }
            kept.pop(drop_header, None)
            request = AWSRequest(method, server.endpoint + path, kept, body)
            S3SigV4Auth(Credentials(*server.writer), "s3", server.region).add_auth(request)
            return dict(request.headers.items())

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                """Be quiet."""

            def _pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                headers = {name: value for name, value in self.headers.items() if name != "Expect"}
                if drop_header:
                    headers = sign_anew(self.command, self.path, body, headers)
                connection = http.client.HTTPConnection(upstream, timeout=30)
                connection.request(self.command, self.path, body, headers)
                answer = connection.getresponse()
                content = answer.read()
                if self.command == "PUT" and proxy.lost:
                    proxy.lost -= 1
                    self.close_connection = True
                    return
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                        self.send_header(name, value)
                length = answer.headers["Content-Length"] if self.command == "HEAD" else str(len(content))
                self.send_header("Content-Length", length or "0")
                self.end_headers()
                connection.close()
                if self.command == "GET" and "Content-Range" in answer.headers:
                    proxy.gets += 1
                    if proxy.gets <= proxy.cut:
                        self.wfile.write(content[: len(content) // 2])
                        self.close_connection = True
                        return
                if self.command != "HEAD":
                    self.wfile.write(content)

        for verb in ("GET", "PUT", "POST", "HEAD", "DELETE"):
            setattr(Handler, f"do_{verb}", Handler._pass_on)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def proxies() -> Iterator[list[Proxy]]:
    opened: list[Proxy] = []
    yield opened
    for proxy in opened:
        proxy.close()


def calls(store: Store) -> list[Callable[[], object]]:
    return [lambda: store.get("k"), lambda: store.put("k", b""), lambda: store.info("k"), lambda: list(store.list())]


def test_a_reader_reads_and_changes_nothing(open_s3: OpenS3, tmp_path: Path) -> None:
    writer = open_s3("writer")
    writer.put("k", b"content")
    big = tmp_path / "big"
    big.write_bytes(b"b" * (MULTIPART_BYTES + 1))
    reader = open_s3("reader")
    assert reader.get("k") == b"content"
    assert [info.key for info in reader.list()] == ["k"]
    for call in (
        lambda: reader.put("k", b"other"),
        lambda: reader.put("new", b"other", if_absent=True),
        lambda: reader.put("big", big),
        lambda: reader.delete("k"),
        lambda: reader.check_fit(),
    ):
        with pytest.raises(AccessDeniedError, match="s3:PutObject"):
            call()
    assert [(info.key, info.size_bytes) for info in writer.list()] == [("k", 7)]
    assert writer.get("k") == b"content"


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_a_wrong_key(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for variable, value in s3_server.environment().items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv(name, "WRONGKEY0123456789WRONG")
    store = S3Store(f"s3://{s3_server.bucket}/x", s3_server.settings())
    for call in (
        lambda: store.get("k"),
        lambda: store.put("k", b""),
        lambda: store.info("k"),
        lambda: list(store.list()),
    ):
        with pytest.raises(AccessDeniedError) as caught:
            call()
        text = str(caught.value)
        assert s3_server.endpoint in text
        assert s3_server.bucket in text
        assert "from env" in text
        assert "k" in text
        for secret in (s3_server.writer[1], "WRONGKEY0123456789WRONG"):
            assert secret not in text


def test_no_credentials_at_all(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    store = S3Store(f"s3://{s3_server.bucket}/x", s3_server.settings())
    with pytest.raises(AccessDeniedError, match="AWS_ACCESS_KEY_ID"):
        store.get("k")


def test_a_missing_bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in s3_server.environment().items():
        monkeypatch.setenv(variable, value)
    store = S3Store("s3://no-such-bucket-here/x", s3_server.settings())
    for call in (
        lambda: store.get("k"),
        lambda: store.put("k", b""),
        lambda: store.info("k"),
        lambda: list(store.list()),
    ):
        with pytest.raises(NotFoundError, match="no bucket 'no-such-bucket-here'"):
            call()


@pytest.mark.parametrize("uri", ["s3://", "s3:///prefix", "s3://bucket/../up"])
def test_an_illegal_uri(s3_server: S3Server, uri: str) -> None:
    with pytest.raises(ConfigError):
        S3Store(uri, s3_server.settings())


def test_an_illegal_endpoint(open_s3: OpenS3) -> None:
    with pytest.raises(ConfigError, match="MODELPRESS_S3_ENDPOINT_URL"):
        open_s3("writer", s3_endpoint_url="not a url")


def test_a_dead_endpoint_is_given_up(open_s3: OpenS3) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        store = open_s3("writer", s3_endpoint_url=endpoint, s3_attempts=2)
        with pytest.raises(StoreUnavailableError, match=endpoint):
            store.get("k")


def test_a_silent_endpoint_is_given_up(open_s3: OpenS3) -> None:
    # It takes the connection and never answers; the test's own time limit is the deadline that must hold.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        store = open_s3("writer", s3_endpoint_url=endpoint, s3_attempts=2, s3_timeout_seconds=0.3)
        with pytest.raises(StoreUnavailableError, match="MODELPRESS_S3_TIMEOUT_SECONDS"):
            store.put("k", b"x")


def test_a_store_without_conditional_writes_is_unfit(
    open_s3: OpenS3, s3_server: S3Server, proxies: list[Proxy]
) -> None:
    proxies.append(Proxy(s3_server, drop_header="If-None-Match"))
    through = open_s3("writer", s3_endpoint_url=proxies[0].endpoint)
    with pytest.raises(StoreUnfitError, match="If-None-Match"):
        through.check_fit()
    with pytest.raises(StoreUnfitError):
        through.ensure_fit()
    direct = open_s3("writer")
    direct.check_fit()
    assert list(direct.list()) == []


def test_a_lost_answer_makes_no_store_unfit(open_s3: OpenS3, s3_server: S3Server, proxies: list[Proxy]) -> None:
    proxies.append(Proxy(s3_server, lost=1))
    through = open_s3("writer", s3_endpoint_url=proxies[0].endpoint)
    through.check_fit()  # its first write was sent twice, and the second time refused: by itself
    assert proxies[0].lost == 0
    assert list(open_s3("writer").list()) == []


def test_a_failed_proof_leaves_nothing(open_s3: OpenS3, s3_server: S3Server, proxies: list[Proxy]) -> None:
    proxies.append(Proxy(s3_server, cut=1000))
    with pytest.raises(StoreUnavailableError):
        open_s3("writer", s3_endpoint_url=proxies[0].endpoint, s3_attempts=1).check_fit()
    assert list(open_s3("writer").list()) == []


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


def test_a_closed_store_waits_for_nobody(open_s3: OpenS3) -> None:
    store = open_s3("writer")
    store.put("k", b"x" * (PART_BYTES + 1))
    store.close()
    with pytest.raises(StoreUnavailableError, match="closed"):
        store.get("k")


def test_a_broken_stream_is_read_again(
    open_s3: OpenS3, s3_server: S3Server, proxies: list[Proxy], tmp_path: Path
) -> None:
    data = os.urandom(PART_BYTES * 2 + 12_345)
    direct = open_s3("writer")
    direct.put("k", data)
    proxies.append(Proxy(s3_server, cut=2))
    through = open_s3("writer", s3_endpoint_url=proxies[0].endpoint, s3_attempts=4)
    assert through.get("k") == data
    assert proxies[0].gets == 5
    proxies[0].cut = proxies[0].gets + 1
    assert through.download("k", tmp_path / "k") == hashlib.sha256(data).hexdigest()
    assert (tmp_path / "k").read_bytes() == data


def test_a_stream_that_always_breaks_is_given_up(
    open_s3: OpenS3, s3_server: S3Server, proxies: list[Proxy], tmp_path: Path
) -> None:
    open_s3("writer").put("k", b"0123456789")
    proxies.append(Proxy(s3_server, cut=1000))
    through = open_s3("writer", s3_endpoint_url=proxies[0].endpoint, s3_attempts=2)
    with pytest.raises(StoreUnavailableError, match="IncompleteRead"):
        through.get("k")
    with pytest.raises(StoreUnavailableError):
        through.download("k", tmp_path / "k")
    assert list(tmp_path.iterdir()) == []


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


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (403, "QuotaExceeded", StoreFullError),
        (507, "", StoreFullError),
        (403, "AccessDenied", AccessDeniedError),
        (403, "RequestTimeTooSkewed", AccessDeniedError),
        (400, "ExpiredToken", AccessDeniedError),
        (404, "NoSuchKey", NotFoundError),
        (400, "BadDigest", CorruptionError),
        (501, "NotImplemented", StoreUnfitError),
        (503, "SlowDown", StoreUnavailableError),
        (500, "InternalError", StoreUnavailableError),
        (400, "SomethingNew", StoreError),
    ],
)
def test_refusals_that_a_healthy_server_does_not_give(status: int, code: str, error: type[StoreError]) -> None:
    refusal = ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")
    found = translate("storing k", refusal, Where("http://host", "bucket", "env"))
    assert type(found) is error
    assert "http://host" in str(found)
    assert str(status) in str(found)
