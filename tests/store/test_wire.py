"""The wire against servers that misbehave in ways that no real one does on request."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from botocore.awsrequest import AWSRequest
from botocore.exceptions import BotoCoreError, ConnectionClosedError, ReadTimeoutError
from pydantic import SecretStr

from modelpress.errors import CorruptionError, ModelpressError, NotFoundError, StoreUnfitError
from modelpress.settings import Settings
from modelpress.store.body import BLOCK_BYTES, Body
from modelpress.store.clock import awake
from modelpress.store.links import Link, Links, LinkStore
from modelpress.store.receive import StoppedError, Target
from modelpress.store.s3 import S3Store
from modelpress.store.s3_client import _Patience, back_off
from modelpress.store.wire import END, Wire

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@contextmanager
def server(*connections: Callable[[socket.socket], None]) -> Iterator[str]:
    """Serves one connection after the other, each by the next function; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            for serve in connections:
                client, _ = listener.accept()
                with client:
                    serve(client)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/k?x=1"
        thread.join(10)


def heard(client: socket.socket) -> None:
    """Read one whole request: its head and its body arrive in as many pieces as the line likes."""
    got = b""
    while b"\r\n\r\n" not in got:
        block = client.recv(2**16)
        if not block:
            return
        got += block
    head, _, body = got.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    left = int(length[1]) - len(body) if length else 0
    while left > 0 and (block := client.recv(left)):
        left -= len(block)


def says(*answers: bytes) -> Callable[[socket.socket], None]:
    def serve(client: socket.socket) -> None:
        for answer in answers:
            heard(client)
            client.sendall(answer)

    return serve


def ask(wire: Wire, url: str, body: Any = None, method: str = "GET") -> tuple[int, bytes]:
    headers = {"Content-Length": str(len(body))} if body else {}
    answer = wire.send(AWSRequest(method, url, headers, body).prepare())
    return answer.status_code, answer.content


@pytest.fixture
def wire() -> Iterator[Wire]:
    opened = Wire(connect=5, silence=5, deadline=20, context=None)
    yield opened
    opened.close()


def test_a_connection_is_used_again(wire: Wire) -> None:
    with server(says(OK, OK)) as url:
        assert ask(wire, url) == ask(wire, url) == (200, b"ok")


def test_a_connection_that_was_closed_meanwhile_is_not(wire: Wire) -> None:
    with server(says(OK), says(OK)) as url:
        ask(wire, url)
        time.sleep(0.05)
        assert ask(wire, url) == (200, b"ok")


@pytest.mark.skipif(not hasattr(socket, "TCP_QUICKACK"), reason="an option of Linux")
def test_answers_are_acknowledged_at_once(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each wait for a piece of a small answer: a server may send the next one only then."""
    done: list[str] = []

    class Seen(socket.socket):
        def setsockopt(self, level: int, option: int, value: Any, *rest: Any) -> None:
            done.extend(["at once"] if (level, option, value) == (socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1) else [])
            super().setsockopt(level, option, value, *rest)

        def recv_into(self, *arguments: Any) -> int:
            done.append("wait")
            return super().recv_into(*arguments)

    monkeypatch.setattr("modelpress.store.dial.socket.socket", Seen)
    with server(says(OK)) as url:
        ask(wire, url)
    assert "wait" in done
    assert all(before == "at once" for before, now in itertools.pairwise(["", *done]) if now == "wait")


def test_a_refusal_in_the_middle_of_a_body_is_heard(wire: Wire) -> None:
    def refuse(client: socket.socket) -> None:
        client.recv(2**12)
        client.sendall(b"HTTP/1.1 403 No\r\nContent-Length: 4\r\nConnection: close\r\n\r\nmine")
        client.shutdown(socket.SHUT_WR)
        while client.recv(2**20):
            pass

    with server(refuse) as url:
        assert ask(wire, url, Body(bytes(2**24), None), "PUT") == (403, b"mine")


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"HTTP/1.1 2x0 OK\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200 + b"\r\n",
        b"x" * 100_000,
        b"",
    ],
)
def test_an_answer_that_is_none_is_a_named_error(wire: Wire, answer: bytes) -> None:
    with server(says(answer)) as url, pytest.raises(BotoCoreError):
        ask(wire, url)


@pytest.mark.parametrize(
    ("asked", "status", "error"),
    [
        ("bytes=0-9", b"200 OK", StoreUnfitError),
        ("bytes=0-9", b"206 Some", ConnectionClosedError),
        ("", b"200 OK", ConnectionClosedError),
    ],
)
def test_a_server_that_knows_no_ranges_is_unfit_and_not_away(
    wire: Wire, asked: str, status: bytes, error: type[Exception]
) -> None:
    answer = b"HTTP/1.1 %s\r\nContent-Length: 100000000\r\n\r\n" % status
    headers = {"Range": asked} if asked else {}
    with server(says(answer)) as url, pytest.raises(error):
        wire.send(AWSRequest("GET", url, headers).prepare())


@pytest.mark.parametrize("before", [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 102 Processing\r\nwait: 1\r\n\r\n"])
def test_what_is_said_before_an_answer_is_none(wire: Wire, before: bytes) -> None:
    refusal = b"HTTP/1.1 507 Full\r\nContent-Length: 4\r\n\r\nfull"
    with server(says(before * 2 + refusal, before + OK)) as url:
        assert ask(wire, url, Body(b"mine", None), "PUT") == (507, b"full")
        assert ask(wire, url) == (200, b"ok")


def test_a_login_in_the_endpoint_is_in_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    for place in (f"127.0.0.1:{port}", "127.0.0.1:99999", "bad host:1"):
        with pytest.raises(ModelpressError) as caught:
            S3Store("s3://bucket", Settings(s3_endpoint_url=f"http://me:hidden@{place}", s3_attempts=1)).get("k")
        assert place in str(caught.value)
        assert "hidden" not in str(caught.value)


def test_silence_and_the_deadline_both_end_a_request() -> None:
    stop = threading.Event()

    def mute(client: socket.socket) -> None:
        stop.wait(20)

    def drip(client: socket.socket) -> None:
        client.recv(2**16)
        while not stop.wait(0.05):
            try:
                client.sendall(b"H")
            except OSError:
                return

    for serve, silence, deadline in ((mute, 0.3, 20.0), (drip, 20.0, 0.5)):
        stop.clear()
        with server(serve) as url:
            with pytest.raises(ReadTimeoutError):
                ask(Wire(connect=5, context=None, silence=silence, deadline=deadline), url)
            stop.set()


def test_a_range_goes_into_given_memory_and_what_was_seen_stays(wire: Wire) -> None:
    """The first answer breaks off, the second has other bytes where the first had some: those are passed over."""
    head = b"HTTP/1.1 206 Partial\r\nContent-Length: 10\r\nContent-Range: bytes 0-9/10\r\n\r\n"
    memory, seen = bytearray(10), []
    target = Target(memoryview(memory), lambda: seen.append(bytes(memory[: target.received])))
    with server(says(head + b"01234"), says(head + b"xxxxx56789", OK)) as url, wire.receiving(target):
        with pytest.raises(BotoCoreError):
            ask(wire, url)
        kept = seen[-1] if seen else b""
        assert ask(wire, url) == (206, b"")
        assert ask(wire, url) == (200, b"ok")  # no range: an answer like any other
    assert memory[: len(kept)] == b"01234"[: len(kept)]
    assert bytes(memory[5:]) == b"56789"
    assert seen[-1] == bytes(memory)
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(seen))


def test_bytes_that_came_another_way_change_nothing_that_was_seen() -> None:
    memory, seen = bytearray(10), []
    target = Target(memoryview(memory), lambda: seen.append(target.received))
    target.fill(b"01234")
    target.fill(b"xxxxx56789")
    assert (bytes(memory), seen) == (b"0123456789", [5, 10])
    target.stop()
    with pytest.raises(StoppedError):
        target.fill(b"y" * 10)
    assert memory == b"0123456789"


@pytest.mark.parametrize("length", [b"Content-Length: 11", b"Transfer-Encoding: chunked"])
def test_a_range_that_memory_does_not_hold_is_refused(wire: Wire, length: bytes) -> None:
    with server(says(b"HTTP/1.1 206 Partial\r\n" + length + b"\r\n\r\n" + b"b\r\n01234567890")) as url:
        memory = bytearray(12)
        with wire.receiving(Target(memoryview(memory)[:10])), pytest.raises(BotoCoreError):
            ask(wire, url)
        assert memory == bytes(12)


def test_who_is_stopped_waits_for_no_server(wire: Wire) -> None:
    stop = threading.Event()

    def half(client: socket.socket) -> None:
        heard(client)
        client.sendall(b"HTTP/1.1 206 Partial\r\nContent-Length: 10\r\n\r\n01234")
        stop.wait(20)

    silent = Wire(connect=5, silence=1000, deadline=1000, context=None)
    target = Target(memoryview(bytearray(10)))

    def receive() -> None:
        with silent.receiving(target), pytest.raises((BotoCoreError, StoppedError)):
            ask(silent, url)
        with silent.receiving(target), pytest.raises(StoppedError):  # nor is it asked again
            ask(silent, url)

    with server(half) as url:
        thread = threading.Thread(target=receive)
        thread.start()
        while target._line is None:
            time.sleep(0.01)
        target.stop()
        thread.join(10)
        assert not thread.is_alive()
        stop.set()


def test_a_body_is_checked_before_its_end_is_sent(wire: Wire, tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(os.urandom(BLOCK_BYTES + 10))
    digest, seen = hashlib.sha256(path.read_bytes()).hexdigest(), []

    def swallow(client: socket.socket) -> None:
        while data := client.recv(2**20):
            seen.append(len(data))

    with server(swallow) as url:
        with pytest.raises(CorruptionError, match="0" * 64):
            ask(wire, url, Body(path, "0" * 64, size=BLOCK_BYTES + 10), "PUT")
        wire.close()
    assert BLOCK_BYTES < sum(seen) < BLOCK_BYTES + 1000
    for size, error in ((BLOCK_BYTES + 11, "bytes"), (BLOCK_BYTES, "sha256")):  # it shrank, it grew
        with pytest.raises(CorruptionError, match=error):
            list(Body(path, digest, size=size).blocks())
    with pytest.raises(NotFoundError):
        list(Body(tmp_path / "none", digest, size=1).blocks())
    body = Body(path, digest, size=BLOCK_BYTES + 10)
    for _ in range(2):  # again, for another attempt
        assert b"".join(bytes(block) for block in body.blocks()) == path.read_bytes()
    body.close()


def test_an_error_of_the_body_spoils_no_connection(wire: Wire, tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"x" * 10)
    with server(says(b""), says(OK)) as url:
        with pytest.raises(CorruptionError):
            ask(wire, url, Body(path, "0" * 64, size=10), "PUT")
        assert ask(wire, url) == (200, b"ok")


def test_patience_ends() -> None:
    patience = _Patience(attempts=3, deadline=10, backoff=0.5)

    def wait(attempts: int, status: int = 503, code: str = "", context: dict[str, Any] | None = None) -> float | None:
        parsed = {"ResponseMetadata": {"HTTPStatusCode": status}, "Error": {"Code": code}}
        return patience.wait((None, parsed), attempts, None, {"context": {} if context is None else context})

    assert 0 <= (wait(1) or 0) <= 1
    assert wait(3) is None
    assert wait(1, context={END: awake()}) is None
    assert wait(1, 400, "XAmzContentSHA256Mismatch") is not None
    for status, code in ((403, "AccessDenied"), (404, "NoSuchKey"), (412, "PreconditionFailed"), (200, "")):
        assert wait(1, status, code) is None
    assert patience.wait(None, 1, ConnectionClosedError(endpoint_url="x"), {"context": {}}) is not None
    assert patience.wait(None, 1, CorruptionError("x"), {"context": {}}) is None
    waits = [back_off(4, 0.5) for _ in range(200)]
    assert min(waits) < 2 < 6 < max(waits) <= 8
    assert back_off(50, 0.5) <= 20


def test_an_http_proxy_is_left_to_the_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(s3_endpoint_url="http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:2")
    assert S3Store("s3://bucket", settings)._wire is None
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert S3Store("s3://bucket", settings)._wire is not None


@pytest.mark.parametrize("total", ["*", "many", "-1"])
def test_a_range_of_an_object_of_no_known_size_is_refused(monkeypatch: pytest.MonkeyPatch, total: str) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    head = f"HTTP/1.1 206 OK\r\nContent-Length: 2\r\nETag: x\r\nContent-Range: bytes 0-1/{total}\r\n\r\nok"
    with server(says(head.encode())) as url:
        settings = Settings(s3_endpoint_url=url.removesuffix("/k?x=1"), s3_attempts=1)
        with closing(S3Store("s3://bucket", settings)) as store, pytest.raises(StoreUnfitError, match=re.escape(total)):
            store.get("k", 0, 2)


class EnoughError(Exception):
    """Whoever waits has waited enough."""


def test_who_waits_for_the_bytes_of_a_link_may_give_up(tmp_path: Path) -> None:
    """The server stops in the middle, and has seconds left before it counts as silent."""
    key, path = "blobs/sha256/" + "0" * 64, tmp_path / "links.json"

    def stall(client: socket.socket) -> None:
        heard(client)
        head = b"HTTP/1.1 206 OK\r\nContent-Length: 100\r\nContent-Range: bytes 0-99/100\r\n\r\n"
        client.sendall(head + b"x" * 40)
        client.recv(1)

    def arrived(data: memoryview) -> None:
        if not data:
            raise EnoughError

    now = datetime.now(UTC)
    with server(stall) as url:
        link = Link(url=SecretStr(url), size_bytes=100, modified=now)
        Links(name="demo", pack="0" * 64, expires=now + timedelta(hours=1), objects={key: link}).write(path)
        store = LinkStore(f"links+{path.as_uri()}", Settings(s3_timeout_seconds=8, s3_attempts=1))
        with closing(store), pytest.raises(EnoughError):
            store.read_into(key, bytearray(100), 0, arrived)
