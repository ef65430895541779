"""A name and all its addresses have one limit on time."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from modelpress.store.dial import dial


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as opened:
        yield opened


@pytest.fixture
def deaf() -> Iterator[socket.socket]:
    """Its backlog is full: whoever connects hears nothing."""
    with socket.create_server(("127.0.0.2", 0), backlog=0) as opened:
        waiting = []
        for _ in range(4):
            client = socket.socket()
            client.setblocking(False)
            client.connect_ex(opened.getsockname())
            waiting.append(client)
        time.sleep(0.05)
        yield opened
        for client in waiting:
            client.close()


def answers(monkeypatch: pytest.MonkeyPatch, *places: tuple[str, int]) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", place) for place in places]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)


def test_a_dead_address_leaves_time_for_the_next(
    listening: socket.socket, deaf: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(monkeypatch, deaf.getsockname(), deaf.getsockname(), listening.getsockname())
    with dial("host", 80, 1.5) as connection:
        assert connection.getpeername() == listening.getsockname()
        left = connection.gettimeout()
    assert left is not None
    assert 0 < left < 1.4  # the time for the dead ones is spent


def test_all_addresses_together_have_the_time_of_one(deaf: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, *[deaf.getsockname()] * 20)
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        dial("host", 80, 0.4)
    assert time.monotonic() - started < 5  # and not 20 times


def test_a_name_that_nobody_answers_for_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: asked.wait(60))
    with pytest.raises(TimeoutError, match="no address of somewhere"):
        dial("somewhere", 80, 0.1)
    asked.set()


@pytest.mark.parametrize("name", ["no-such-host.invalid", "a" * 70 + ".invalid"])
def test_a_name_that_is_none(name: str) -> None:
    with pytest.raises(OSError):  # noqa: PT011  the resolver's words differ
        dial(name, 80, 10)
