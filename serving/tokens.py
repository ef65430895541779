"""Tokens of an identity provider (JWT, RFC 7519): signed by a key that is known here, for this server, and in time.

What a token may not choose is how it is checked: each public key has one algorithm, by its own kind, and the token's
`alg` must be that one. So neither `none` nor an HMAC made with the text of the public key gets anywhere. Keys that a
token brings itself, or points at (`jwk`, `jku`, `x5u`), are not looked at.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, SECP384R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from modelpress import strictjson
from modelpress.access import EVERY, SCOPES, Principal
from modelpress.errors import ConfigError, CorruptionError

PublicKey = RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey

MAX_FILE_BYTES = 2**20
MAX_TOKEN_CHARACTERS = 8192
MAX_SUBJECT_CHARACTERS = 200
MIN_RSA_BITS = 2048
MAX_KNOWN = 4096
"""Tokens whose signature was checked and is not checked again; all are forgotten when there are more."""
MAX_MODELS = 100
"""Names of models that a token may have; what comes behind them does not count."""
MODEL = re.compile(r"[a-z0-9._*-]{1,64}")
"""A name of models, as keys of ours have it (`modelpress.access.Key`)."""
REQUIRED = ("exp", "nbf", "iss", "aud", "sub")
PEM = re.compile(rb"-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----", re.DOTALL)


@dataclass(frozen=True)
class Issuer:
    """Whose tokens count, and for whom they must be made."""

    issuer: str
    """`iss`, letter for letter."""
    audience: str
    """Must be `aud`, or among them."""
    leeway_seconds: float = 30.0
    """How far clocks may be apart."""
    models_claim: str = ""
    """The claim that names the models a token is for, in words or in a list, with `*`; a token without it is for none.
    Empty: every token is for every model."""


@dataclass(frozen=True)
class VerifyKey:
    """A public key and the one algorithm that it is used with."""

    kid: str | None
    """Its id, where it has one."""
    algorithm: str
    """RS256, ES256, ES384 or EdDSA."""
    key: PublicKey


class Tokens:
    """Checks tokens. Safe to call from threads.

    Args:
        keys: that may sign.
        issuer: whose tokens count.
        unknown: called where a token names a key that is none of them.
    """

    def __init__(self, keys: list[VerifyKey], issuer: Issuer, unknown: Callable[[], None] = lambda: None) -> None:
        self._keys, self._issuer, self._unknown = keys, issuer, unknown
        self._known: dict[bytes, tuple[Principal, float]] = {}

    def principal(self, text: str) -> Principal | None:
        """Who the token is of; None where it does not count, whatever the reason."""
        if len(text) > MAX_TOKEN_CHARACTERS:
            return None
        name = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
        known = self._known.get(name)
        if known is not None and time.time() < known[1]:
            return known[0]
        claims = self._claims(text)
        if claims is None:
            return None
        subject, scopes = claims["sub"], _scopes(claims)
        if not isinstance(subject, str) or not _presentable(subject):
            return None
        claim = self._issuer.models_claim
        found = Principal(subject, scopes, "jwt", models=_models(claims.get(claim)) if claim else EVERY)
        if len(self._known) >= MAX_KNOWN:
            self._known.clear()
        self._known[name] = found, claims["exp"] + self._issuer.leeway_seconds
        return found

    def _claims(self, text: str) -> dict[str, Any] | None:
        try:
            header = jwt.get_unverified_header(text)
            key = self._key(header)
            if key is None:
                return None
            claims: dict[str, Any] = jwt.decode(
                text,
                key.key,
                algorithms=[key.algorithm],
                issuer=self._issuer.issuer,
                audience=self._issuer.audience,
                leeway=self._issuer.leeway_seconds,
                options={"require": list(REQUIRED), "verify_signature": True},
            )
            claims["exp"] = float(claims["exp"])
        except (jwt.PyJWTError, ValueError, TypeError, RecursionError, OverflowError):
            return None
        return claims

    def _key(self, header: dict[str, Any]) -> VerifyKey | None:
        """The key that the token names, or the only one of its algorithm; a name that is unknown is no key."""
        fitting = [key for key in self._keys if key.algorithm == header.get("alg")]
        if "kid" in header:
            fitting = [key for key in fitting if key.kid == header["kid"]]
            if all(key.kid != header["kid"] for key in self._keys):
                self._unknown()
        return fitting[0] if len(fitting) == 1 else None


def _presentable(subject: str) -> bool:
    return 0 < len(subject) <= MAX_SUBJECT_CHARACTERS and subject.isprintable()


def _scopes(claims: dict[str, Any]) -> frozenset[str]:
    """Those of ours that `scope` (RFC 9068: words in a string) or `scp` (a list) has."""
    found = {*_words(claims.get("scope")), *_words(claims.get("scp"))}
    return frozenset(found & set(SCOPES))


def _models(value: object) -> tuple[str, ...]:
    """Names of models; what is none is left out, so that it opens nothing."""
    return tuple(word for word in _words(value)[:MAX_MODELS] if MODEL.fullmatch(word))


def _words(value: object) -> list[str]:
    """Of a string, or of a list."""
    words = value.split() if isinstance(value, str) else value
    return [word for word in words if isinstance(word, str)] if isinstance(words, list) else []


def read_verify_keys(path: Path) -> list[VerifyKey]:
    """Public keys: a JSON Web Key Set, or PEM, of one key or more.

    Raises:
        ConfigError: it can't be read, holds none, or one that must not be used (a secret or private key, RSA below
            `MIN_RSA_BITS`, another kind or curve).
    """
    doing = f"reading the keys of tokens, MODELPRESS_SERVING_JWT_KEYS_FILE={path}"
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(doing, found=error.strerror, expected="a file that can be read") from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(doing, found=f"more than {MAX_FILE_BYTES} bytes", expected="public keys")
    if data.lstrip().startswith(b"{"):
        return parse_key_set(data, doing)
    return _told_apart(_from_pem(data, doing), doing)


def parse_key_set(data: bytes, doing: str, *, skip: bool = False) -> list[VerifyKey]:
    """The keys of a JSON Web Key Set that are for signatures.

    Args:
        data: JSON.
        doing: for messages.
        skip: leave out public keys of kinds that are not used here, as providers have them.

    Raises:
        ConfigError: it is none, holds no key, or one that must not be used; see `read_verify_keys`.
    """
    return _told_apart(_from_set(data, doing, skip), doing)


def _told_apart(keys: list[VerifyKey], doing: str) -> list[VerifyKey]:
    if not keys:
        raise ConfigError(doing, found="no key", expected="a JSON Web Key Set, or PUBLIC KEY in PEM")
    kids = [(key.kid, key.algorithm) for key in keys]
    if len(set(kids)) != len(kids):
        raise ConfigError(doing, found="two keys that no token tells apart", expected="each with a `kid` of its own")
    return keys


def _from_pem(data: bytes, doing: str) -> list[VerifyKey]:
    if b"PRIVATE KEY" in data:
        raise ConfigError(doing, found="a private key", expected="public keys alone", fix="openssl pkey -pubout")
    try:
        return [_verify_key(None, load_pem_public_key(block), doing) for block in PEM.findall(data)]
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(doing, found="PEM that is no public key", expected="PUBLIC KEY in PEM") from error


def _from_set(data: bytes, doing: str, skip: bool) -> list[VerifyKey]:
    try:
        documents = strictjson.loads(data, doing).get("keys")
    except CorruptionError as error:
        raise ConfigError(doing, found=error.found, expected="a JSON Web Key Set") from error
    if not isinstance(documents, list) or not all(isinstance(one, dict) for one in documents):
        raise ConfigError(doing, found="no list `keys`", expected="a JSON Web Key Set")
    keys = []
    for number, one in enumerate(documents):
        if one.get("use", "sig") != "sig":
            continue
        where = f"{doing}: keys[{number}]"
        if one.get("kty") == "oct" or "d" in one:
            found = "a shared secret" if one.get("kty") == "oct" else "a private key"
            raise ConfigError(where, found=found, expected="public keys alone: who can check could sign")
        kid = one.get("kid")
        if kid is not None and not isinstance(kid, str):
            raise ConfigError(where, found="a `kid` that is no text", expected="text, or none")
        try:
            keys.append(_of_document(kid, one, where))
        except ConfigError:
            if not skip:
                raise
    return keys


def _of_document(kid: str | None, document: dict[str, Any], where: str) -> VerifyKey:
    try:
        key = _verify_key(kid, jwt.PyJWK.from_dict({**document, "alg": _algorithm_of(document)}).key, where)
    except (jwt.PyJWTError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(where, found="no key that can be used", expected=EXPECTED) from error
    if document.get("alg", key.algorithm) != key.algorithm:
        found, expected = f"alg {document['alg']!r:.40}", f"{key.algorithm} for this kind of key"
        raise ConfigError(where, found=found, expected=expected)
    return key


EXPECTED = f"RSA of {MIN_RSA_BITS} bits or more (RS256), P-256 (ES256), P-384 (ES384) or Ed25519 (EdDSA)"


def _algorithm_of(document: dict[str, Any]) -> str:
    """What a JSON Web Key is read with; `_verify_key` then looks at the key itself."""
    kind = document.get("kty")
    return {"RSA": "RS256", "OKP": "EdDSA"}.get(str(kind), "ES384" if document.get("crv") == "P-384" else "ES256")


def _verify_key(kid: str | None, key: object, doing: str) -> VerifyKey:
    if isinstance(key, RSAPublicKey) and key.key_size >= MIN_RSA_BITS:
        return VerifyKey(kid, "RS256", key)
    if isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP256R1):
        return VerifyKey(kid, "ES256", key)
    if isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP384R1):
        return VerifyKey(kid, "ES384", key)
    if isinstance(key, Ed25519PublicKey):
        return VerifyKey(kid, "EdDSA", key)
    size = f" of {key.key_size} bits" if isinstance(key, RSAPublicKey) else ""
    raise ConfigError(doing, found=f"{type(key).__name__.lstrip('_')}{size}", expected=EXPECTED)
