"""Who a request comes from, by what it brings, and whether that may do what it asks.

One plain function for every way in: `Keyring.check(authorization, scope)`. HTTP gives it the header `Authorization`,
gRPC the metadata of the same name.
"""

from __future__ import annotations

import hmac
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from modelpress.access import SCOPES, Key, Principal, digest, read_keys
from modelpress.errors import ConfigError
from modelpress.store.local import read_secret
from serving.keysets import KeySet
from serving.refusals import RequestError
from serving.tls import fingerprint
from serving.tokens import Issuer, Tokens, read_verify_keys

log = logging.getLogger("modelpress.serving")

LEAST_CHARACTERS = 16
LOOK_SECONDS = 1.0
"""How often, at most, the files are looked at: a key that was revoked counts no longer than that."""
NOBODY = Principal("anonymous", frozenset(SCOPES), "nobody")
"""Who asks where nobody is asked who they are."""
CHALLENGE = 'Bearer realm="modelpress"'
"""For the header `WWW-Authenticate` of a 401."""


class UnauthenticatedError(RequestError):
    """No key, one that does not count, or nothing that is one. It is never said which."""

    status = 401
    code = "UNAUTHENTICATED"


class ForbiddenError(RequestError):
    """The key counts, and is not for this."""

    status = 403
    code = "PERMISSION_DENIED"
    who = ""
    """Whose key it is."""


@dataclass(frozen=True)
class Sources:
    """What says who counts; nothing: everybody is answered."""

    keys_file: Path | None = None
    """Of hashed keys; see `modelpress.access`."""
    token_file: Path | None = None
    """Of one token with all scopes."""
    jwt_keys_file: Path | None = None
    """Of an identity provider's public keys; see `serving.tokens`."""
    issuer: Issuer | None = None
    """Must stand beside `jwt_keys_file` or `jwt_keys_url`."""
    jwt_keys_url: str | None = None
    """Where such keys are fetched, in place of a file; see `serving.keysets`."""

    @property
    def files(self) -> list[Path]:
        """Those that are named."""
        return [path for path in (self.keys_file, self.token_file, self.jwt_keys_file) if path is not None]

    @property
    def named(self) -> list[str]:
        """All of it, for messages."""
        return [*map(str, self.files), *([self.jwt_keys_url] if self.jwt_keys_url else [])]


class _Counts(NamedTuple):
    """A key that was not revoked."""

    digest: bytes
    principal: Principal
    until: float
    """Seconds since the epoch."""


@dataclass(frozen=True)
class _Known:
    """What the files said when they were read last; replaced as a whole."""

    keys: dict[bytes, _Counts] = field(default_factory=dict)
    token: bytes | None = None
    tokens: Tokens | None = None


class Keyring:
    """Who counts, as the files say it. Safe to call from threads.

    Args:
        sources: the files.
        now: the clock, in seconds since the epoch.

    Raises:
        ConfigError: one can't be read, or says something illegal.
    """

    def __init__(self, sources: Sources, now: Callable[[], float] = time.time) -> None:
        given = [one for one in (sources.jwt_keys_file, sources.jwt_keys_url) if one is not None]
        if len(given) != (sources.issuer is not None):
            found = "a part of them" if len(given) < 2 else "keys in a file, and at an address"
            raise ConfigError("reading who may sign tokens", found=found, expected="keys, issuer and audience, or none")
        self._remote: KeySet | None = None
        if sources.jwt_keys_url and sources.issuer:
            self._remote = KeySet(sources.jwt_keys_url, sources.issuer)
        self._sources, self._now = sources, now
        self._seen = self._look()
        self._known = self._read()
        self._next_look = time.monotonic() + LOOK_SECONDS
        self._stale: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether nobody is asked who they are."""
        return not self._sources.named

    @property
    def stale(self) -> str | None:
        """Why what stands in the files now, or at the provider's address, is not what counts; None: it is."""
        return self._stale or (self._remote.problem if self._remote is not None else None)

    def start(self) -> None:
        """Fetch the keys that are fetched; without this none of them count."""
        if self._remote is not None:
            self._remote.start()

    def close(self) -> None:
        """Fetch no more."""
        if self._remote is not None:
            self._remote.stop()

    def check(self, authorization: str | None, *scopes: str, model: str | None = None) -> Principal:
        """Who asks, if they may.

        Args:
            authorization: `Bearer KEY`, as the request brought it; None: it brought none.
            scopes: one of these is needed; none given: any key that counts.
            model: that is asked for, as the client names it; None: none in particular.

        Raises:
            UnauthenticatedError: nothing that counts was brought.
            ForbiddenError: it lacks the scope, which is named, or is not for this model.
        """
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + LOOK_SECONDS
            self.refresh()
        found = NOBODY if self.is_open else self._principal(authorization)
        if found is None:
            raise UnauthenticatedError(
                "this server asks who you are",
                expected="the header `Authorization: Bearer KEY`, with a key that counts",
            )
        if scopes and found.scopes.isdisjoint(scopes):
            needed = " or ".join(scopes)
            had = ", ".join(sorted(found.scopes)) or "none"
            raise _forbidden(found, "scope of the key", had, needed)
        if model is not None and not found.may_ask(model):
            raise _forbidden(found, f"model {model[:80]!r}", "a key for others", ", ".join(found.models))
        return found

    def refresh(self) -> None:
        """Read the files again if they changed. What can't be read changes nothing, and is logged: who counted, counts.

        So a file that was written badly locks nobody out; that it did not work is in the log, in `stale`, in the
        metrics and on the status page.
        """
        seen = self._look()
        if seen == self._seen and self._stale is None:
            return
        self._seen = seen
        try:
            self._known = self._read()
        except ConfigError as error:
            if self._stale != str(error):
                log.error("who may ask is as it was before: %s", error)
            self._stale = str(error)
            return
        self._stale = None
        log.info("read again who may ask: %s", ", ".join(map(str, self._sources.files)))

    def _principal(self, authorization: str | None) -> Principal | None:
        scheme, _, text = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not text:
            return None
        known, name = self._known, digest(text)
        # A dictionary may tell by its time how a digest begins; that is no step towards a text that has this digest.
        key = known.keys.get(name)
        if key is not None and hmac.compare_digest(key.digest, name):
            return key.principal if self._now() < key.until else None
        if known.token is not None and hmac.compare_digest(known.token, name):
            return Principal("token", frozenset(SCOPES), "token")
        tokens = self._remote.tokens if self._remote is not None else known.tokens
        if tokens is not None and text.count(".") == 2:
            return tokens.principal(text)
        return None

    def _read(self) -> _Known:
        sources = self._sources
        keys = read_keys(sources.keys_file).keys if sources.keys_file else ()
        tokens = None
        if sources.jwt_keys_file and sources.issuer:
            tokens = Tokens(read_verify_keys(sources.jwt_keys_file), sources.issuer)
        return _Known(
            keys={one.digest: one for one in map(_counts, keys) if one is not None},
            token=digest(read_token(sources.token_file)) if sources.token_file else None,
            tokens=tokens,
        )

    def _look(self) -> list[tuple[int, int, int] | None]:
        return [fingerprint(path) for path in self._sources.files]


def _forbidden(principal: Principal, doing: str, found: str, expected: str) -> ForbiddenError:
    refused = ForbiddenError(doing, found=found, expected=expected)
    refused.who = principal.name
    return refused


def _counts(key: Key) -> _Counts | None:
    if key.revoked is not None:
        return None
    until = key.expires.timestamp() if key.expires is not None else math.inf
    principal = Principal(key.name, frozenset(key.scopes), "key", key.id, key.models)
    return _Counts(bytes.fromhex(key.sha256), principal, until)


def read_token(path: Path) -> str:
    """The token in a file, without the white space around it.

    Raises:
        ConfigError: the file can't be read, others can read it, or it holds no token.
    """
    doing = f"reading the token that requests must bring, MODELPRESS_SERVING_TOKEN_FILE={path}"
    token = read_secret(path, doing).strip()
    if len(token) < LEAST_CHARACTERS or any(character.isspace() for character in token):
        found = f"{len(token)} characters" if len(token) < LEAST_CHARACTERS else "white space in it"
        raise ConfigError(
            doing, found=found, expected=f"at least {LEAST_CHARACTERS} in one piece", fix="openssl rand -hex 24"
        )
    return token
