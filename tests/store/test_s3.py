from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
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
from modelpress.store.s3_multipart import PART_BYTES
from tests.conftest import OpenS3, S3Server
from tests.store.conformance import StoreConformance
from tests.store.gateway import Proxy

pytestmark = pytest.mark.s3
MIB = 2**20


@pytest.fixture
def store(open_s3: OpenS3, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Store:
    return open_s3("writer")


class TestS3Store(StoreConformance):
    pass


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
