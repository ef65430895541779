"""Tokens of an identity provider: what a forger tries, and what each key may be used with."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from modelpress.errors import ConfigError
from serving.tokens import Issuer, Tokens, read_verify_keys

ISSUER = Issuer("https://login.example.org", "modelpress", leeway_seconds=5.0)
KEYS: dict[str, Any] = {
    "RS256": rsa.generate_private_key(public_exponent=65537, key_size=2048),
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "ES384": ec.generate_private_key(ec.SECP384R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
}
OTHER = ec.generate_private_key(ec.SECP256R1())
Claims = dict[str, Any]


def pem(key: Any) -> bytes:
    found: bytes = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return found


def private_pem(key: Any) -> bytes:
    found: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return found


def jwk(algorithm: str, kid: str | None) -> dict[str, Any]:
    makers: dict[str, Any] = {"RS256": jwt.algorithms.RSAAlgorithm, "EdDSA": jwt.algorithms.OKPAlgorithm}
    made = makers.get(algorithm, jwt.algorithms.ECAlgorithm).to_jwk(KEYS[algorithm].public_key(), as_dict=True)
    return {**made, "use": "sig", "alg": algorithm} | ({"kid": kid} if kid else {})


def claims(**changes: Any) -> Claims:
    now = int(time.time())
    usual = {
        "iss": ISSUER.issuer,
        "aud": ISSUER.audience,
        "sub": "anna",
        "nbf": now - 10,
        "exp": now + 600,
        "scope": "openid infer promote",
    }
    return {name: value for name, value in (usual | changes).items() if value is not ...}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    path = tmp_path_factory.mktemp("tokens") / "keys.json"
    path.write_text(json.dumps({"keys": [jwk(algorithm, algorithm.lower()) for algorithm in KEYS]}))
    return Tokens(read_verify_keys(path), ISSUER)


@pytest.mark.parametrize("algorithm", KEYS)
def test_a_token_of_each_kind_of_key_counts(tokens: Tokens, algorithm: str) -> None:
    text = jwt.encode(claims(), KEYS[algorithm], algorithm, headers={"kid": algorithm.lower()})
    for _ in range(2):  # the second time it is known
        found = tokens.principal(text)
        assert found is not None
        assert (found.name, found.scopes, found.via) == ("anna", {"infer", "promote"}, "jwt")
    assert tokens.principal(jwt.encode(claims(), KEYS[algorithm], algorithm)) is not None, "the only one of its kind"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"scope": "infer"}, {"infer"}),
        ({"scope": ...}, set()),
        ({"scope": ..., "scp": ["admin", "metrics", 7]}, {"admin", "metrics"}),
        ({"scope": "INFER infer.all"}, set()),
        ({"scope": {"infer": True}}, set()),
        ({"scope": 7}, set()),
    ],
)
def test_scopes_are_ours_alone(tokens: Tokens, given: Claims, expected: set[str]) -> None:
    found = tokens.principal(jwt.encode(claims(**given), KEYS["ES256"], "ES256"))
    assert found is not None
    assert found.scopes == expected


WRONG: list[Claims] = [
    *({name: ...} for name in ("iss", "aud", "sub", "nbf", "exp")),
    {"iss": "https://login.example.com"},
    {"iss": [ISSUER.issuer]},
    {"aud": "other"},
    {"aud": ["other"]},
    {"aud": "modelpress.other"},
    {"exp": 1_500_000_000},
    {"exp": "never"},
    {"exp": float("inf")},
    {"exp": 10**400},
    {"nbf": 33_000_000_000},
    {"iat": 33_000_000_000},
    {"sub": ""},
    {"sub": 7},
    {"sub": "x" * 201},
    {"sub": "anna\nroot"},
]


@pytest.mark.parametrize("changes", WRONG, ids=str)
def test_a_claim_that_is_wrong_or_missing(tokens: Tokens, changes: Claims) -> None:
    try:
        text = jwt.encode(claims(**changes), KEYS["ES256"], "ES256")
    except TypeError:  # the library refuses to sign some of it: a forger's would not
        text = signed({"alg": "ES256"}, claims(**changes), es256)
    assert tokens.principal(text) is None


def test_several_audiences_may_hold_ours(tokens: Tokens) -> None:
    text = jwt.encode(claims(aud=["other", ISSUER.audience]), KEYS["ES256"], "ES256")
    assert tokens.principal(text) is not None


def part(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def signed(header: dict[str, Any], body: Claims, sign: Callable[[bytes], bytes]) -> str:
    text = f"{part(json.dumps({'typ': 'JWT'} | header).encode())}.{part(json.dumps(body).encode())}"
    return f"{text}.{part(sign(text.encode()))}"


def es256(data: bytes) -> bytes:
    return jwt.get_algorithm_by_name("ES256").sign(data, KEYS["ES256"])


def hmac_with(key: bytes) -> Callable[[bytes], bytes]:
    return lambda data: hmac.new(key, data, hashlib.sha256).digest()


def nested() -> str:
    head, body = part(b'{"alg": "ES256"}'), part(b"[" * 4000)
    text = f"{head}.{body}"
    return f"{text}.{part(es256(text.encode()))}"


def forgeries() -> dict[str, str]:
    body, good = claims(), jwt.encode(claims(), KEYS["ES256"], "ES256")
    head, middle, signature = good.split(".")
    own = jwt.algorithms.ECAlgorithm.to_jwk(OTHER.public_key(), as_dict=True)
    by_other = jwt.get_algorithm_by_name("ES256")
    return {
        "none": signed({"alg": "none"}, body, lambda _: b""),
        "None": signed({"alg": "None"}, body, lambda _: b""),
        "no alg": signed({}, body, es256),
        "no signature": f"{head}.{middle}.",
        "HMAC with the public key": signed({"alg": "HS256"}, body, hmac_with(pem(KEYS["RS256"]))),
        "HMAC, named as RSA's": signed({"alg": "HS256", "kid": "rs256"}, body, hmac_with(pem(KEYS["RS256"]))),
        "HMAC with nothing": signed({"alg": "HS256"}, body, hmac_with(b"")),
        "signed by another": jwt.encode(body, OTHER, "ES256"),
        "another's, under our id": jwt.encode(body, OTHER, "ES256", headers={"kid": "es256"}),
        "an id that is unknown": jwt.encode(body, KEYS["ES256"], "ES256", headers={"kid": "old"}),
        "an id of another kind": jwt.encode(body, KEYS["ES256"], "ES256", headers={"kid": "rs256"}),
        "an id that is no text": signed({"alg": "ES256", "kid": 7}, body, es256),
        "its own key": signed({"alg": "ES256", "jwk": own}, body, lambda data: by_other.sign(data, OTHER)),
        "an unknown demand": signed({"alg": "ES256", "crit": ["exp2"], "exp2": 1}, body, es256),
        "other claims": f"{head}.{part(json.dumps(claims(sub='root')).encode())}.{signature}",
        "PS256 with the RSA key": jwt.encode(body, KEYS["RS256"], "PS256"),
        "RS512 with the RSA key": jwt.encode(body, KEYS["RS256"], "RS512"),
        "parts missing": f"{head}.{middle}",
        "no base64": "a.b.c",
        "letters of elsewhere": "ä.ö.ü",
        "empty": "..",
        "nested": nested(),
        "long": "x" * 9000 + good,
    }


@pytest.mark.parametrize("kind", forgeries())
def test_a_forged_token_does_not_count(tokens: Tokens, kind: str) -> None:
    assert tokens.principal(forgeries()[kind]) is None


def test_a_token_that_was_known_ends_with_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "key.pem"
    path.write_bytes(pem(KEYS["ES256"]))
    tokens = Tokens(read_verify_keys(path), ISSUER)
    body = claims()
    text = jwt.encode(body, KEYS["ES256"], "ES256")
    assert tokens.principal(text) is not None
    end = body["exp"] + ISSUER.leeway_seconds
    monkeypatch.setattr("serving.tokens.time.time", lambda: end - 0.001)
    assert tokens.principal(text) is not None
    monkeypatch.setattr("serving.tokens.time.time", lambda: end)
    monkeypatch.setattr(Tokens, "_claims", lambda *_: None)
    assert tokens.principal(text) is None, "it is checked again"


def test_what_is_remembered_is_bounded(tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.tokens.MAX_KNOWN", 3)
    for number in range(5):
        assert tokens.principal(jwt.encode(claims(sub=str(number)), KEYS["EdDSA"], "EdDSA")) is not None
    assert len(tokens._known) <= 3


def test_pem_of_several_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys.pem"
    path.write_bytes(b"".join(pem(key) for key in KEYS.values()))
    assert [key.algorithm for key in read_verify_keys(path)] == list(KEYS)


WEAK = rsa.generate_private_key(public_exponent=65537, key_size=1024)
CURVE = ec.generate_private_key(ec.SECP521R1())
SECRET = {"kty": "oct", "k": part(b"a shared secret that is long enough"), "alg": "HS256"}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, "No such file"),
        (b"", "no key"),
        (b"words", "no key"),
        (private_pem(KEYS["ES256"]), "a private key"),
        (pem(WEAK), "1024 bits"),
        (pem(CURVE), "ES384"),
        (pem(KEYS["ES256"]) * 2, "no token tells apart"),
        (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "no public key"),
        (b"{", "JSON Web Key Set"),
        (b"{}", "no list"),
        (b'{"keys": []}', "no key"),
        (b'{"keys": [7]}', "no list"),
        (json.dumps({"keys": [SECRET]}).encode(), "a shared secret"),
        (json.dumps({"keys": [jwk("ES256", "a") | {"d": "AAAA"}]}).encode(), "a private key"),
        (json.dumps({"keys": [jwk("ES256", "a") | {"alg": "HS256"}]}).encode(), "ES256 for this kind"),
        (json.dumps({"keys": [jwk("ES256", "a") | {"x": "AAAA"}]}).encode(), "can be used"),
        (json.dumps({"keys": [jwk("ES256", "a") | {"kid": 7}]}).encode(), "kid"),
        (json.dumps({"keys": [jwk("ES256", "a"), jwk("ES256", "a")]}).encode(), "no token tells apart"),
        (json.dumps({"keys": [{"kty": "new"}]}).encode(), "can be used"),
        (b" " * (2**20 + 1), "more than"),
    ],
)
def test_keys_that_must_not_be_used(tmp_path: Path, data: bytes | None, words: str) -> None:
    path = tmp_path / "keys"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ConfigError, match=words) as caught:
        read_verify_keys(path)
    assert "MODELPRESS_SERVING_JWT_KEYS_FILE" in str(caught.value)


def test_keys_for_other_uses_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"keys": [jwk("RS256", "enc") | {"use": "enc"}, jwk("ES256", "sig")]}))
    assert [key.kid for key in read_verify_keys(path)] == ["sig"]
