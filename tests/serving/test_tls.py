"""TLS on real sockets: what is spoken, who is let in, and certificates that change while it runs."""

from __future__ import annotations

import os
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from modelpress.errors import ConfigError
from serving.protocol import decode_response, encode_request
from serving.tls import Certificate
from tests.serving.authority import Authority
from tests.serving.conftest import WIDTH, Server, scale_model
from tests.serving.test_process import wait_for

Call = Callable[..., Any]


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def trusting(authority: Authority) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=authority.path)


def shake(server: ssl.SSLContext, client: ssl.SSLContext) -> tuple[str | None, str]:
    """Version and subject of the certificate after a handshake, with a byte sent back: in TLS 1.3 a client hears only
    then that its certificate was refused."""
    ours, theirs = socket.socketpair()

    def answer() -> None:
        try:
            with server.wrap_socket(ours, server_side=True) as line:
                line.sendall(line.recv(1))
        except OSError:
            ours.close()

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        with client.wrap_socket(theirs, server_hostname="127.0.0.1") as line:
            line.settimeout(30)
            line.sendall(b"x")
            if line.recv(1) != b"x":
                raise ssl.SSLError("no answer")
            found = dict(pair for group in (line.getpeercert() or {}).get("subject", ()) for pair in group)
            return line.version(), str(found.get("commonName"))
    finally:
        theirs.close()
        thread.join(30)


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
def test_it_speaks_new_versions_alone(authority: Authority) -> None:
    context = Certificate(*authority.issue("server")).context
    assert shake(context, trusting(authority)) == ("TLSv1.3", "server")
    older = trusting(authority)
    older.maximum_version = ssl.TLSVersion.TLSv1_2
    assert shake(context, older)[0] == "TLSv1.2"
    oldest = trusting(authority)
    oldest.minimum_version, oldest.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with pytest.raises(OSError):  # noqa: PT011  which of OpenSSL's it is differs by version
        shake(context, oldest)


def test_clients_may_have_to_bring_a_certificate(authority: Authority, tmp_path: Path) -> None:
    certificate, key = authority.issue("server")
    served = Certificate(certificate, key, authority.path)
    known, stranger, nobody = trusting(authority), trusting(authority), trusting(authority)
    known.load_cert_chain(*authority.issue("client"))
    stranger.load_cert_chain(*Authority(tmp_path, "other").issue("stranger"))
    for name in ("server", "next"):  # and after a change of the server's own
        assert shake(served.context, known)[1] == name
        for client in (stranger, nobody):
            with pytest.raises(OSError):  # noqa: PT011
                shake(served.context, client)
        for found, target in zip(authority.issue("next"), (certificate, key), strict=True):
            os.replace(found, target)
        served.refresh()


def test_a_new_certificate_is_taken_for_new_connections(authority: Authority) -> None:
    certificate, key = authority.issue("server")
    served = Certificate(certificate, key)
    for found, target in zip(authority.issue("next"), (certificate, key), strict=True):
        os.replace(found, target)
    served.refresh()
    assert shake(served.context, trusting(authority))[1] == "next"


def test_a_change_fails_no_connection(authority: Authority) -> None:
    """Connections are made without pause while the files change."""
    certificate, key = authority.issue("server")
    served, client = Certificate(certificate, key), trusting(authority)
    seen: set[str] = set()
    failures: list[BaseException] = []
    stopped = threading.Event()

    def connect() -> None:
        while not stopped.is_set():
            try:
                seen.add(shake(served.context, client)[1])
            except OSError as error:
                failures.append(error)

    threads = [threading.Thread(target=connect) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(20):
        for found, target in zip(authority.issue(f"next-{number}"), (certificate, key), strict=True):
            os.replace(found, target)
        served.refresh()
    assert shake(served.context, client)[1] == "next-19"
    stopped.set()
    for thread in threads:
        thread.join(30)
    assert failures == []
    assert "next-19" in seen or len(seen) > 1


def test_files_that_do_not_fit_change_nothing(authority: Authority, caplog: pytest.LogCaptureFixture) -> None:
    certificate, key = authority.issue("server")
    served = Certificate(certificate, key)
    new, new_key = authority.issue("next")
    os.replace(new, certificate)  # the key is still the old one
    served.refresh()
    assert shake(served.context, trusting(authority))[1] == "server"
    assert "as it was before" in caplog.text
    os.replace(new_key, key)
    served.refresh()
    assert shake(served.context, trusting(authority))[1] == "next"
    key.unlink()
    served.refresh()
    assert shake(served.context, trusting(authority))[1] == "next"


def readable(authority: Authority) -> tuple[Path, Path]:
    certificate, key = authority.issue("server")
    key.chmod(0o644)
    return certificate, key


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (lambda one: (one.folder / "none", one.folder / "none"), "No such file"),
        (lambda one: (one.issue("a")[0], one.issue("b")[1]), "MISMATCH"),
        (lambda one: (one.issue("a")[1], one.issue("a")[1]), "PEM"),
        (lambda one: one.issue("a", password=b"secret"), "without a passphrase"),
        (readable, "everybody can read"),
        (lambda one: (*one.issue("a"), one.issue("a")[1]), "who issues clients"),
        (lambda one: (*one.issue("a"), one.folder / "none"), "who issues clients"),
    ],
)
def test_files_that_cannot_be_used_are_said(authority: Authority, files: Call, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Certificate(*files(authority))


def test_a_server_speaks_tls_alone_and_follows_its_files(
    press: Call, serve: Call, authority: Authority, tmp_path: Path
) -> None:
    press(scale_model(2.0))
    certificate, key = authority.issue("server")
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text("0123456789abcdef")
    server: Server = serve(
        "scale",
        "--host=127.0.0.1",
        MODELPRESS_SERVING_TLS_CERT_FILE=str(certificate),
        MODELPRESS_SERVING_TLS_KEY_FILE=str(key),
        MODELPRESS_SERVING_TOKEN_FILE=str(token),
    )
    assert server.url.startswith("https://")
    headers = {"Authorization": "Bearer 0123456789abcdef"}
    with httpx.Client(base_url=server.url, verify=trusting(authority), headers=headers) as client:
        body = encode_request({"x": np.ones((1, WIDTH), np.float32)})
        answer = client.post("/v2/models/scale/infer", content=body)
        assert decode_response(answer.content)["y"][0, 0] == 2 * WIDTH
        assert "server" not in answer.headers
        large = client.post("/v2/models/scale/infer", content=b" " * 500_000)
        assert large.status_code == 400, "more than one record of TLS arrives whole"
    with pytest.raises(httpx.ConnectError), httpx.Client(base_url=server.url) as client:
        client.get("/v2/health/live")
    with pytest.raises(httpx.HTTPError):
        httpx.get(server.url.replace("https", "http") + "/v2/health/live")
    with httpx.Client(base_url=server.url, verify=trusting(authority)) as client:
        assert client.get("/v2").status_code == 401
        assert client.get("/v2/health/live").status_code == 200
    for found, target in zip(authority.issue("next"), (certificate, key), strict=True):
        os.replace(found, target)
    host, port = server.url.removeprefix("https://").split(":")
    wait_for(lambda: subject(host, int(port), trusting(authority)) == "next")
    assert server.stop() == 0


def subject(host: str, port: int, client: ssl.SSLContext) -> str:
    line = socket.create_connection((host, port), timeout=30)
    with line, client.wrap_socket(line, server_hostname=host) as tls:
        found: Any = tls.getpeercert()
    return str(dict(pair for group in found["subject"] for pair in group)["commonName"])
