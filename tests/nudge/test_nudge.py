"""Nudges: what is signed counts once and for five minutes; telling servers never fails a promotion."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpress import nudge, pointer
from modelpress.errors import ConfigError
from modelpress.nudge import ID, SIGNATURE, TIMESTAMP, Nudger, RefusedNudgeError, check, open_nudger, sign
from modelpress.settings import Settings
from modelpress.store import open_store
from tests.packs import make_pack

SECRET, OTHER = b"s" * 64, b"o" * 64
NOW = 1_900_000_000.0
BODY = b'{"alias": "champion", "name": "digits"}'


def headers(body: bytes = BODY, secret: bytes = SECRET, at: float = NOW, **changes: str) -> dict[str, str]:
    stamp = str(int(at))
    return {ID: "abc", TIMESTAMP: stamp, SIGNATURE: sign(secret, "abc", stamp, body)} | changes


def test_what_is_signed_is_read() -> None:
    body = b'{"alias": "champion", "later": {"share": 0.1}, "name": "digits"}'  # as a newer sender may have it
    found = check(headers(body), body, [OTHER, SECRET], now=NOW)
    assert (found.id, found.sent, found.name, found.alias) == ("abc", int(NOW), "digits", "champion")


@pytest.mark.parametrize(
    ("given", "body"),
    [
        ({}, BODY),
        (headers(secret=OTHER), BODY),
        (headers(), BODY + b" "),
        (headers(**{ID: "abd"}), BODY),
        (headers(**{TIMESTAMP: str(int(NOW) + 1)}), BODY),
        (headers(**{SIGNATURE: "v1,"}), BODY),
        (headers(**{SIGNATURE: "v1,\u00e4\u20ac"}), BODY),
        (headers(**{TIMESTAMP: "\u0661"}), BODY),
        (headers(at=NOW - 301), BODY),
        (headers(at=NOW + 301), BODY),
    ],
)
def test_anything_else_is_refused(given: dict[str, str], body: bytes) -> None:
    with pytest.raises(RefusedNudgeError):
        check(given, body, [SECRET], now=NOW)


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"[]",
        b"{",
        b'{"name": "digits"}',
        b'{"name": "../x", "alias": "champion"}',
        b'{"name": "digits", "alias": "No"}',
        b'{"name": "digits", "name": "other", "alias": "champion"}',
        b"[" * 60_000,
    ],
)
def test_a_signed_document_that_says_nothing_is_refused(document: bytes) -> None:
    with pytest.raises(RefusedNudgeError):
        check(headers(document), document, [SECRET], now=NOW)


@given(st.binary(max_size=60), st.text(max_size=20), st.text(max_size=20), st.text(max_size=60))
def test_hostile_headers_are_refused_and_nothing_else(body: bytes, name: str, stamp: str, signature: str) -> None:
    with pytest.raises(RefusedNudgeError):
        check({ID: name, TIMESTAMP: stamp, SIGNATURE: signature}, body, [SECRET], now=NOW)


def secret_file(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "secret"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_file_of_secrets_has_one_a_line(tmp_path: Path) -> None:
    path = secret_file(tmp_path, "n" * 64 + "\n" + "o" * 64 + "\n")
    assert nudge.read_secrets(path, "X") == [b"n" * 64, b"o" * 64]


@pytest.mark.parametrize(("text", "mode"), [("", 0o600), ("short", 0o600), ("s" * 64, 0o604), ("ä" * 64, 0o600)])
def test_a_bad_file_of_secrets_is_named(tmp_path: Path, text: str, mode: int) -> None:
    with pytest.raises(ConfigError, match="MODELPRESS_NUDGE_SECRET_FILE"):
        nudge.read_secrets(secret_file(tmp_path, text, mode), "MODELPRESS_NUDGE_SECRET_FILE")


@pytest.mark.parametrize("urls", ["server:8080", "ftp://server", "http://server, nonsense"])
def test_an_address_that_is_none_is_refused(urls: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="MODELPRESS_NUDGE_URLS"):
        open_nudger(Settings(nudge_urls=urls, nudge_secret_file=secret_file(tmp_path, "s" * 64)))


def test_addresses_need_a_secret() -> None:
    with pytest.raises(ConfigError, match="MODELPRESS_NUDGE_SECRET_FILE"):
        open_nudger(Settings(nudge_urls="http://server:8080"))
    assert open_nudger(Settings()) is None


class Listening:
    """A server that takes requests down, and answers with one status."""

    def __init__(self, status: int) -> None:
        self.got: list[tuple[str, dict[str, str], bytes]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                outer.got.append((self.path, {key.lower(): value for key, value in self.headers.items()}, body))
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def servers() -> Iterator[list[Listening]]:
    made = [Listening(202), Listening(202), Listening(401)]
    yield made
    for one in made:
        one.server.shutdown()
        one.server.server_close()


@pytest.fixture
def closed() -> Iterator[str]:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://name:password@127.0.0.1:{held.getsockname()[1]}"


def test_every_server_is_told_and_those_that_are_not_are_named(
    servers: list[Listening], closed: str, caplog: pytest.LogCaptureFixture
) -> None:
    urls = [servers[0].url + "/", servers[1].url, servers[2].url, closed]
    with caplog.at_level(logging.WARNING):
        failed = Nudger(urls, SECRET).tell("digits", "canary")
    assert failed == [servers[2].url, closed]
    for server in servers:
        ((path, given, body),) = server.got
        assert path == nudge.PATH
        found = check(given, body, [SECRET], now=float(given[TIMESTAMP]))
        assert (found.name, found.alias) == ("digits", "canary")
    assert len({server.got[0][1][ID] for server in servers}) == 3  # what one server took is no proof to another
    assert "it answered 401" in caplog.text
    assert "password" not in caplog.text
    assert "next poll" in caplog.text


def test_moving_an_alias_tells_and_never_fails(
    tmp_path: Path, servers: list[Listening], closed: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = secret_file(tmp_path, SECRET.decode())
    settings = Settings(nudge_urls=f"{closed}, {servers[0].url}", nudge_secret_file=path)
    store = open_store(str(tmp_path / "store"), settings)
    pack = make_pack(tmp_path / "shards")
    pack.publish(store)
    assert servers[0].got == []
    pointer.append(store, "demo", "champion", pack.digest, "promote")
    pointer.append(store, "demo", "champion", pack.digest, "promote")
    pointer.rollback(store, "demo", "champion", pack.digest)
    assert [json.loads(body) for _, _, body in servers[0].got] == [{"alias": "champion", "name": "demo"}] * 3
    assert "was not told" in caplog.text
