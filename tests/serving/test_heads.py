"""Heads that come slowly, never, or never to an end, on real sockets."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn

from serving.heads import MAX_HEAD_BYTES, heads_within

LATE = 0.3
GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        return
    body, more = b"", scope["method"] == "POST"
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@contextmanager
def served(head_seconds: float) -> Iterator[tuple[str, int]]:
    config = uvicorn.Config(app, http=heads_within(head_seconds), lifespan="off", log_config=None, ws="none")
    server = uvicorn.Server(config)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()
        finally:
            server.should_exit = True
            thread.join(30)


@pytest.fixture(scope="module")
def quick() -> Iterator[tuple[str, int]]:
    with served(LATE) as address:
        yield address


@pytest.fixture(scope="module")
def patient() -> Iterator[tuple[str, int]]:
    with served(60.0) as address:
        yield address


def line(address: tuple[str, int]) -> socket.socket:
    made = socket.create_connection(address, timeout=30)
    made.settimeout(30)
    return made


def rest(connection: socket.socket) -> bytes:
    """All that comes until the other side ends; a reset ends it, too."""
    found = b""
    try:
        while data := connection.recv(65536):
            found += data
    except (ConnectionResetError, ssl.SSLError):
        pass
    return found


@pytest.mark.parametrize("sent", [b"", b"G", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nhost: x\r\n", GET[:-1]])
def test_a_head_that_does_not_come_gives_its_place_back(quick: tuple[str, int], sent: bytes) -> None:
    with line(quick) as connection:
        connection.sendall(sent)
        found = rest(connection)
    assert found.startswith(b"HTTP/1.1 408 ")
    assert found.endswith(b'{"error": "the head of the request did not come in time"}')


def test_letters_now_and_then_do_not_help(quick: tuple[str, int]) -> None:
    with line(quick) as connection:
        stopped = threading.Event()

        def drip() -> None:
            connection.sendall(b"GET / HTTP/1.1\r\nx: ")
            while not stopped.wait(LATE / 6):
                try:
                    connection.sendall(b"x")
                except OSError:
                    return

        thread = threading.Thread(target=drip)
        thread.start()
        rest(connection)  # it ends; else the next byte is waited for until the test fails
        stopped.set()
        thread.join(30)


def test_the_second_head_of_a_connection_has_its_own_time(quick: tuple[str, int]) -> None:
    with line(quick) as connection:
        for _ in range(3):
            connection.sendall(GET)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"GET / HT")
        assert rest(connection).startswith(b"HTTP/1.1 408 ")


def test_a_body_may_take_its_time(quick: tuple[str, int]) -> None:
    """The application has limits of its own for bodies."""
    with line(quick) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n\r\nab")
        threading.Event().wait(2 * LATE)
        connection.sendall(b"cd")
        assert connection.recv(65536).endswith(b"abcd")


ENDLESS = {
    "one line": [b"GET / HTTP/1.1\r\nx: " + b"x" * 4096, *[b"x" * 4096] * 64],
    "a name": [b"GET / HTTP/1.1\r\n", *[b"x" * 4096] * 64],
    "many lines": [b"GET / HTTP/1.1\r\n", *[b"x: " + b"y" * 1000 + b"\r\n"] * 256],
    "an address": [b"GET /", *[b"x" * 4096] * 64],
    "at once": [b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 40_000 + b"\r\n"],
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_head_without_end_is_refused(patient: tuple[str, int], kind: str) -> None:
    with line(patient) as connection:
        try:
            for part in ENDLESS[kind]:
                connection.sendall(part)
        except (ConnectionResetError, BrokenPipeError):
            return  # it did not listen to the end
        found = rest(connection)
    assert found == b"" or found.startswith((b"HTTP/1.1 431 ", b"HTTP/1.1 400 ")), found[:100]


def test_lines_behind_a_body_without_end_are_refused(patient: tuple[str, int]) -> None:
    with line(patient) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n")
        try:
            for _ in range(200):
                connection.sendall(b"x: " + b"y" * 1000 + b"\r\n")
        except (ConnectionResetError, BrokenPipeError):
            return
        assert not rest(connection).startswith(b"HTTP/1.1 200 ")


def test_a_large_head_within_the_limit_is_read(patient: tuple[str, int]) -> None:
    with line(patient) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nx: " + b"x" * (MAX_HEAD_BYTES - 100) + b"\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_a_large_body_is_no_head(patient: tuple[str, int]) -> None:
    with line(patient) as connection:
        size = 4 * MAX_HEAD_BYTES
        connection.sendall(b"POST / HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % size)
        connection.sendall(b"z" * size)
        assert rest(connection).endswith(b"z" * size)
