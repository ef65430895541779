"""A nudge: whoever moves an alias tells the servers that follow it to look at once, instead of at their next poll.

It is a signed hint and nothing more: a server that gets one reads the pointer, as it does at each poll, and believes
that alone. HMAC-SHA256 over `id.timestamp.body` with a secret that both sides have. Losing one costs a poll's time.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

from modelpress import keys, strictjson
from modelpress.errors import ConfigError, CorruptionError, ModelpressError
from modelpress.settings import Settings, without_logins
from modelpress.store.local import read_secret

log = logging.getLogger("modelpress.nudge")

PATH: Final = "/v2/repository/nudge"
ID: Final = "x-modelpress-nudge"
TIMESTAMP: Final = "x-modelpress-timestamp"
SIGNATURE: Final = "x-modelpress-signature"
MAX_BODY_BYTES: Final = 2**16
TOLERANCE_SECONDS: Final = 300.0
"""How far the two clocks may differ, and how long a nudge counts."""
LEAST_CHARACTERS: Final = 32
"""Of a secret."""
TIMEOUT_SECONDS: Final = 3.0
"""How long a server may take to connect, and to answer."""
_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_SECONDS = re.compile(r"[0-9]{1,12}")


class RefusedNudgeError(ModelpressError):
    """No nudge of ours: it is answered with `status`, and has no other effect."""

    status: ClassVar[int] = 401


@dataclass(frozen=True)
class Nudge:
    """What one says, whose signature held."""

    id: str
    """The sender's name for it; a repeat of the same request carries the same."""
    sent: int
    """Unix seconds, by the sender's clock."""
    name: str
    """Of the pack to look at."""
    alias: str
    """That moved."""


def sign(secret: bytes, nudge: str, timestamp: str, body: bytes) -> str:
    """The value of the header `SIGNATURE`."""
    signed = b".".join((nudge.encode(), timestamp.encode(), body))
    return "v1," + base64.b64encode(hmac.new(secret, signed, hashlib.sha256).digest()).decode()


def check(headers: Mapping[str, str], body: bytes, secrets: Sequence[bytes], *, now: float) -> Nudge:
    """The nudge that a request carries, if one of the secrets signed it within `TOLERANCE_SECONDS`.

    Every secret is tried, each in constant time, before anything of the body is read.

    Raises:
        RefusedNudgeError: a header is missing, the signature does not hold, it is not of now, or it says nothing.
    """
    doing = "checking a nudge"
    nudge, timestamp = headers.get(ID, ""), headers.get(TIMESTAMP, "")
    given = headers.get(SIGNATURE, "").encode("latin-1", "replace")
    legal = _ID.fullmatch(nudge) is not None and _SECONDS.fullmatch(timestamp) is not None
    holds = [hmac.compare_digest(given, sign(secret, nudge, timestamp, body).encode()) for secret in secrets]
    if not legal or not any(holds):
        raise RefusedNudgeError(doing, found="no signature of ours")
    if abs(now - int(timestamp)) > TOLERANCE_SECONDS:
        found = f"one signed {now - int(timestamp):.0f} s ago"
        raise RefusedNudgeError(doing, found=found, expected=f"at most {TOLERANCE_SECONDS:.0f} s, or clocks that agree")
    try:
        document = strictjson.loads(body, doing)
    except CorruptionError as error:
        raise RefusedNudgeError(doing, found=error.found, expected="a JSON object") from error
    name, alias = document.get("name"), document.get("alias")
    if not (isinstance(name, str) and keys.is_name(name) and isinstance(alias, str) and keys.is_alias(alias)):
        raise RefusedNudgeError(doing, found="another document", expected="the name of a pack and an alias")
    return Nudge(nudge, int(timestamp), name, alias)


def read_secrets(path: Path, variable: str) -> list[bytes]:
    """The secrets in a file, one a line. All are accepted, and the first signs: so they are changed without a gap.

    Raises:
        ConfigError: the file can't be read, others can read it, or it holds none of `LEAST_CHARACTERS`; `variable` is
            named.
    """
    doing = f"reading the secret that nudges are signed with, {variable}={path}"
    lines = read_secret(path, doing).split()
    if not lines or min(map(len, lines)) < LEAST_CHARACTERS:
        found = f"one of {min(map(len, lines))} characters" if lines else "none"
        raise ConfigError(
            doing,
            found=found,
            expected=f"at least {LEAST_CHARACTERS} characters in each line",
            fix="openssl rand -hex 32",
        )
    return [line.encode() for line in lines]


class Nudger:
    """Tells servers to look. It never raises: who moved an alias has moved it, and servers poll.

    Args:
        urls: where the servers are, each with its scheme.
        secret: what is signed with.
    """

    def __init__(self, urls: Sequence[str], secret: bytes) -> None:
        self._urls, self._secret = list(urls), secret

    def tell(self, name: str, alias: str) -> list[str]:
        """Nudge every server, all at once; the ones that did not take it, each of which is a warning in the log."""
        body = json.dumps({"name": name, "alias": alias}, sort_keys=True).encode()
        with ThreadPoolExecutor(min(len(self._urls), 16), thread_name_prefix="nudge") as pool:
            problems = list(pool.map(lambda url: self._post(url, body), self._urls))
        failed = [(url, problem) for url, problem in zip(self._urls, problems, strict=True) if problem]
        for url, problem in failed:
            text = "%s@%s moved, and %s was not told: %s; it will see it at its next poll"
            log.warning(text, name, alias, without_logins(url), problem)
        return [url for url, _ in failed]

    def _post(self, url: str, body: bytes) -> str | None:
        """What went wrong; None: nothing."""
        import httpx

        nudge, timestamp = uuid.uuid4().hex, str(int(time.time()))
        headers = {ID: nudge, TIMESTAMP: timestamp, SIGNATURE: sign(self._secret, nudge, timestamp, body)}
        headers["content-type"] = "application/json"
        try:
            answer = httpx.post(url.rstrip("/") + PATH, content=body, headers=headers, timeout=TIMEOUT_SECONDS)
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            return f"{type(error).__name__}: {error}"[:300]
        return None if answer.status_code == 202 else f"it answered {answer.status_code}: {answer.text[:200]}"


def open_nudger(settings: Settings) -> Nudger | None:
    """Who tells the servers that the settings name; None where they name none.

    Raises:
        ConfigError: an address is none, or there is no secret for them.
    """
    urls = [url.strip() for url in settings.nudge_urls.split(",") if url.strip()]
    if not urls:
        return None
    doing = "reading MODELPRESS_NUDGE_URLS"
    wrong = [url for url in urls if not re.match(r"https?://[^/\s]+", url)]
    if wrong:
        raise ConfigError(doing, found=without_logins(wrong[0]), expected="http://HOST:PORT or https://…, with commas")
    if settings.nudge_secret_file is None:
        raise ConfigError(
            doing, found="no secret", expected="MODELPRESS_NUDGE_SECRET_FILE, the file that the servers have as well"
        )
    return Nudger(urls, read_secrets(settings.nudge_secret_file, "MODELPRESS_NUDGE_SECRET_FILE")[0])
