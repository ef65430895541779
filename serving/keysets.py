"""An identity provider's public keys, from its address (`jwks_uri`): fetched, kept for a while, fetched again.

They are fetched in a thread of their own: no request waits for the provider, and a token counts by the keys that are
there. A token with a key that is not known wakes the thread, at most once in `LEAST_SECONDS`: whoever makes up key ids
makes no more requests than that. While the provider does not answer, its last keys count, for `KEEP_SECONDS`; from then
on no token does. An answer that is no set of public keys counts as none.
"""

from __future__ import annotations

import ipaddress
import logging
import threading
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, replace

import httpx

from modelpress.errors import ConfigError
from serving.tokens import MAX_FILE_BYTES, Issuer, Tokens, VerifyKey, parse_key_set

log = logging.getLogger("modelpress.serving")

FETCH_SECONDS = 300.0
"""From one look at the provider's keys to the next."""
LEAST_SECONDS = 60.0
"""Between two looks, whatever happens."""
KEEP_SECONDS = 86_400.0
"""How long keys count that the provider did not name again."""
ANSWER_SECONDS = 10.0
"""For a whole answer."""
SILENCE_SECONDS = 5.0
"""For connecting, and between two pieces."""


@dataclass(frozen=True)
class _Fetched:
    """What the provider said last, and when."""

    tokens: Tokens
    keys: list[VerifyKey]
    moment: float


class KeySet:
    """Checks tokens by the keys at an address. Safe to call from threads.

    Args:
        url: https, or http on loopback.
        issuer: whose tokens count.
        clock: seconds that only go up.

    Raises:
        ConfigError: another kind of address.
    """

    def __init__(self, url: str, issuer: Issuer, clock: Callable[[], float] = time.monotonic) -> None:
        check_url(url)
        self._url, self._issuer, self._clock = url, issuer, clock
        self._fetched: _Fetched | None = None
        self._tried: float | None = None
        self._looked, self._wanted, self._stopped = threading.Event(), threading.Event(), threading.Event()
        self.problem: str | None = None
        """Why the keys that count are not the provider's newest; None: they are."""

    @property
    def tokens(self) -> Tokens | None:
        """What checks tokens now; None: no keys are known, or they are too old."""
        fetched = self._fetched
        return fetched.tokens if fetched and self._clock() - fetched.moment < KEEP_SECONDS else None

    def want(self) -> None:
        """Look again soon: a token names a key that is not known."""
        self._wanted.set()

    def start(self) -> None:
        """Fetch the keys in a thread, which goes on. A provider that does not answer keeps nobody from starting."""
        threading.Thread(target=self._run, name="keys", daemon=True).start()
        self._looked.wait(ANSWER_SECONDS)

    def stop(self) -> None:
        """Look no more; waits for nothing."""
        self._stopped.set()
        self._wanted.set()

    def fetch(self) -> None:
        """Look at the keys, if `LEAST_SECONDS` have passed; an answer that can't be used changes nothing, and is
        logged."""
        now = self._clock()
        if self._tried is not None and now - self._tried < LEAST_SECONDS:
            return
        self._tried = now
        doing = f"fetching the keys of tokens, MODELPRESS_SERVING_JWT_KEYS_URL={self._url}"
        try:
            keys = parse_key_set(_get(self._url, doing), doing, skip=True)
        except ConfigError as error:
            if self.problem != str(error):
                log.error("whose tokens count is as it was before: %s", error)
            self.problem = str(error)
            return
        fetched = self._fetched
        if fetched is not None and fetched.keys == keys:
            self._fetched = replace(fetched, moment=now)
        else:
            self._fetched = _Fetched(Tokens(keys, self._issuer, unknown=self.want), keys, now)
            log.info("fetched %d keys of tokens from %s", len(keys), self._url)
        self.problem = None

    def _run(self) -> None:
        self.fetch()
        self._looked.set()
        while not self._stopped.is_set():
            self._wanted.wait(LEAST_SECONDS if self.problem else FETCH_SECONDS)
            waits = LEAST_SECONDS - (self._clock() - self._tried) if self._tried is not None else 0.0
            self._stopped.wait(max(0.0, waits))
            self._wanted.clear()
            if not self._stopped.is_set():
                self.fetch()


def check_url(url: str) -> None:
    """Refuse an address that others could answer for.

    Raises:
        ConfigError: it is not https, nor http on loopback, or carries a password.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        host, fits = parts.hostname or "", parts.scheme == "https"
    except ValueError:
        host, fits, parts = "", False, urllib.parse.urlsplit("")
    if host and "@" not in parts.netloc and (fits or (parts.scheme == "http" and _is_this_machine(host))):
        return
    raise ConfigError(
        "reading whose tokens count, MODELPRESS_SERVING_JWT_KEYS_URL",
        found=f"{parts.scheme or 'no'} address" + (" with a password" if "@" in parts.netloc else ""),
        expected="https://… (http:// on loopback alone): whoever changes the answer makes tokens",
    )


def _is_this_machine(host: str) -> bool:
    """By its letters: a name that leads here now may lead elsewhere at the next look."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _get(url: str, doing: str) -> bytes:
    """The whole answer.

    Raises:
        ConfigError: there is none, another status than 200, or more than `MAX_FILE_BYTES`.
    """
    deadline, data = time.monotonic() + ANSWER_SECONDS, bytearray()
    loopback = urllib.parse.urlsplit(url).scheme == "http"
    try:
        with (
            httpx.Client(timeout=SILENCE_SECONDS, follow_redirects=False, trust_env=not loopback) as client,
            client.stream("GET", url, headers={"accept": "application/json", "accept-encoding": "identity"}) as answer,
        ):
            if answer.status_code != 200:
                raise ConfigError(doing, found=f"status {answer.status_code}", expected="200, without a redirection")
            for piece in answer.iter_raw():
                data += piece
                if len(data) > MAX_FILE_BYTES:
                    raise ConfigError(doing, found=f"more than {MAX_FILE_BYTES} bytes", expected="public keys")
                if time.monotonic() > deadline:
                    raise ConfigError(doing, found=f"no end after {ANSWER_SECONDS:.0f} s", expected="a whole answer")
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        raise ConfigError(doing, found=type(error).__name__, expected="an answer of the provider") from error
    return bytes(data)
