"""A provider's keys from its address: what counts while it answers, while it does not, and when it answers badly."""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from modelpress.errors import ConfigError
from serving import keysets
from serving.keyring import ForbiddenError, Keyring, Sources, UnauthenticatedError
from serving.keysets import KEEP_SECONDS, LEAST_SECONDS, KeySet, check_url
from serving.tokens import MAX_FILE_BYTES, Issuer
from tests.serving.authority import Authority
from tests.serving.test_tokens import ISSUER, KEYS, SECRET, claims, jwk


class Provider:
    """An identity provider's address, on loopback."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.asked = 0
        self.status, self.headers, self.pause = 200, dict[str, str](), 0.0
        self.body = b""
        self.name("ES256")
        provider = self

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                provider.asked += 1
                self.send_response(provider.status)
                for name, value in provider.headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(provider.body)))
                self.end_headers()
                time.sleep(provider.pause)
                self.wfile.write(provider.body)

            def log_message(self, format: str, *_: object) -> None:
                del format

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                """A client that hung up is what some of this is about."""

        self.server = Quiet(("127.0.0.1", 0), Answer)
        if context is not None:
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.url = f"http{'s' if context else ''}://127.0.0.1:{self.server.server_port}/keys"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def name(self, *algorithms: str, **more: Any) -> None:
        """Answer with these keys, each called by its algorithm in small letters."""
        keys = [jwk(algorithm, algorithm.lower()) | more for algorithm in algorithms]
        self.body = json.dumps({"keys": keys}).encode()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def provider() -> Iterator[Provider]:
    made = Provider()
    yield made
    made.close()


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def token(algorithm: str = "ES256", **changes: Any) -> str:
    return jwt.encode(claims(**changes), KEYS[algorithm], algorithm, headers={"kid": algorithm.lower()})


def counts(keys: KeySet, text: str) -> bool:
    return keys.tokens is not None and keys.tokens.principal(text) is not None


def test_tokens_count_by_the_keys_that_the_provider_names(provider: Provider) -> None:
    clock = Clock()
    keys = KeySet(provider.url, ISSUER, clock)
    assert not counts(keys, token()), "nothing was fetched"
    keys.fetch()
    assert (keys.problem, counts(keys, token()), counts(keys, token("RS256"))) == (None, True, False)
    provider.name("RS256")
    clock.now += LEAST_SECONDS
    keys.fetch()
    assert (counts(keys, token()), counts(keys, token("RS256"))) == (False, True), "one that it took out is out"


def test_whoever_makes_up_key_ids_makes_one_request_a_minute(provider: Provider) -> None:
    clock = Clock()
    keys = KeySet(provider.url, ISSUER, clock)
    keys.fetch()
    for number in range(50):
        assert not counts(keys, jwt.encode(claims(), KEYS["ES256"], "ES256", headers={"kid": str(number)}))
        assert keys._wanted.is_set()
        keys.fetch()
    assert provider.asked == 1
    clock.now += LEAST_SECONDS
    keys.fetch()
    assert provider.asked == 2


def test_a_key_that_is_known_wakes_nobody(provider: Provider) -> None:
    keys = KeySet(provider.url, ISSUER)
    keys.fetch()
    assert counts(keys, token())
    assert not counts(keys, token(exp=1)), "it has ended"
    assert not counts(keys, token()[:-8] + "AAAAAAAA"), "it is signed by another"
    assert not keys._wanted.is_set()


def test_the_last_keys_count_for_a_day_without_the_provider(provider: Provider) -> None:
    clock = Clock()
    keys = KeySet(provider.url, ISSUER, clock)
    keys.fetch()
    provider.close()
    clock.now += KEEP_SECONDS - 1
    keys.fetch()
    assert keys.problem is not None
    assert "ConnectError" in keys.problem
    assert counts(keys, token())
    clock.now += 1
    assert not counts(keys, token()), "it fails closed"


@pytest.mark.parametrize(
    ("status", "headers", "body", "words"),
    [
        (404, {}, b"", "status 404"),
        (302, {"location": "https://example.org/keys"}, b"", "status 302"),
        (200, {}, b" " * (MAX_FILE_BYTES + 1), "more than"),
        (200, {}, b"<html>", "JSON Web Key Set"),
        (200, {}, b'{"keys": []}', "no key"),
        (200, {}, json.dumps({"keys": [jwk("ES256", "es256"), SECRET]}).encode(), "a shared secret"),
        (200, {}, json.dumps({"keys": [jwk("ES256", "es256") | {"d": "AAAA"}]}).encode(), "a private key"),
        (200, {}, json.dumps({"keys": [jwk("ES256", "es256")] * 2}).encode(), "no token tells apart"),
        (200, {"content-encoding": "gzip"}, b"\x1f\x8b" + b"\0" * 100, "JSON Web Key Set"),
    ],
    ids=["missing", "redirection", "large", "page", "empty", "secret", "private", "twice", "packed"],
)
def test_an_answer_that_must_not_be_used_changes_nothing(
    provider: Provider, status: int, headers: dict[str, str], body: bytes, words: str
) -> None:
    clock = Clock()
    keys = KeySet(provider.url, ISSUER, clock)
    good = provider.body
    provider.status, provider.headers, provider.body = status, headers, body
    keys.fetch()
    assert words in str(keys.problem)
    assert keys.tokens is None, "with no keys no token counts"
    provider.status, provider.headers, provider.body = 200, {}, good
    clock.now += LEAST_SECONDS
    keys.fetch()
    provider.status, provider.headers, provider.body = status, headers, body
    clock.now += LEAST_SECONDS
    keys.fetch()
    assert (words in str(keys.problem), counts(keys, token())) == (True, True)


def test_keys_of_other_kinds_are_left_out(provider: Provider) -> None:
    weak = jwt.algorithms.RSAAlgorithm.to_jwk(
        rsa.generate_private_key(public_exponent=65537, key_size=1024).public_key(), as_dict=True
    )
    others = [{"kty": "new"}, jwk("RS256", "ps") | {"alg": "PS256"}, weak | {"kid": "weak"}]
    provider.body = json.dumps({"keys": [*others, jwk("ES256", "es256")]}).encode()
    keys = KeySet(provider.url, ISSUER)
    keys.fetch()
    assert counts(keys, token())
    assert keys._fetched is not None
    assert [key.kid for key in keys._fetched.keys] == ["es256"]


def test_a_provider_that_says_nothing_is_given_up(provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keysets, "SILENCE_SECONDS", 0.05)
    provider.pause = 5.0
    keys = KeySet(provider.url, ISSUER)
    keys.fetch()
    assert "ReadTimeout" in str(keys.problem)


@pytest.mark.parametrize(
    "url",
    [
        "http://login.example.org/keys",
        "http://10.0.0.1/keys",
        "http://127.0.0.1.example.org/keys",
        "http://localhost.example.org/keys",
        "https://anna:secret@login.example.org/keys",
        "file:///etc/keys.json",
        "ftp://127.0.0.1/keys",
        "https:///keys",
        "https://[::1",
        "keys.json",
    ],
)
def test_addresses_that_others_could_answer_for(url: str) -> None:
    with pytest.raises(ConfigError, match="MODELPRESS_SERVING_JWT_KEYS_URL") as caught:
        check_url(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    ["https://login.example.org/keys?x=1", "http://127.0.0.1:8000/", "http://[::1]/keys", "http://localhost/keys"],
)
def test_addresses_that_will_do(url: str) -> None:
    check_url(url)


def test_a_certificate_that_nobody_trusts_is_no_provider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority, stranger = Authority(tmp_path), Authority(tmp_path, "stranger")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue("provider"))
    provider = Provider(context)
    try:
        monkeypatch.setenv("SSL_CERT_FILE", str(stranger.path))
        keys = KeySet(provider.url, ISSUER)
        keys.fetch()
        assert "ConnectError" in str(keys.problem)
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.path))
        keys = KeySet(provider.url, ISSUER)
        keys.fetch()
        assert (keys.problem, counts(keys, token())) == (None, True)
    finally:
        provider.close()


def test_the_keyring_fetches_and_looks_again_by_itself(provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keysets, "LEAST_SECONDS", 0.05)
    keyring = Keyring(Sources(jwt_keys_url=provider.url, issuer=ISSUER))
    assert not keyring.is_open
    with pytest.raises(UnauthenticatedError):
        keyring.check(f"Bearer {token()}", "infer")
    keyring.start()
    try:
        assert keyring.check(f"Bearer {token()}", "infer").name == "anna"
        provider.name("RS256")
        for _ in range(600):
            try:
                keyring.check(f"Bearer {token('RS256')}", "infer")
                break
            except UnauthenticatedError:
                time.sleep(0.05)
        assert keyring.check(f"Bearer {token('RS256')}", "infer").name == "anna"
        assert keyring.stale is None
    finally:
        keyring.close()


def test_a_provider_that_is_away_at_the_start_is_said_and_refuses_all(provider: Provider) -> None:
    provider.close()
    keyring = Keyring(Sources(jwt_keys_url=provider.url, issuer=ISSUER))
    keyring.start()
    try:
        assert "ConnectError" in str(keyring.stale)
        with pytest.raises(UnauthenticatedError):
            keyring.check(f"Bearer {token()}", "infer")
    finally:
        keyring.close()


def test_keys_come_from_one_place(provider: Provider, tmp_path: Path) -> None:
    for sources in (
        Sources(jwt_keys_url=provider.url),
        Sources(jwt_keys_url=provider.url, jwt_keys_file=tmp_path / "keys.json", issuer=ISSUER),
    ):
        with pytest.raises(ConfigError, match="who may sign tokens"):
            Keyring(sources)


@pytest.mark.parametrize(
    ("given", "may", "may_not"),
    [
        (["digits", "team-a-*"], ["digits", "digits:processed", "team-a-x"], ["minilm", "team-b-x", "digit"]),
        ("digits minilm", ["digits", "minilm"], ["other"]),
        (["*"], ["digits", "anything"], []),
        ([], [], ["digits"]),
        (..., [], ["digits"]),
        ({"digits": True}, [], ["digits"]),
        (["digit?", "[a-z]*", "DIGITS", 7, ""], [], ["digits", "d"]),
        (["x"] * 100 + ["digits"], ["x"], ["digits"]),
    ],
    ids=str,
)
def test_a_token_is_for_the_models_that_its_claim_names(
    provider: Provider, given: object, may: list[str], may_not: list[str]
) -> None:
    issuer = Issuer(ISSUER.issuer, ISSUER.audience, 5.0, models_claim="https://example.org/models")
    keyring = Keyring(Sources(jwt_keys_url=provider.url, issuer=issuer))
    keyring.start()
    keyring.close()
    text = f"Bearer {token(**{'https://example.org/models': given})}"
    for model in may:
        assert keyring.check(text, "infer", model=model).may_ask(model)
    for model in may_not:
        with pytest.raises(ForbiddenError):
            keyring.check(text, "infer", model=model)
