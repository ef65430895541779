"""Requests that must be refused, to a real server: `python -m benchmarks.refusals [--quick]`.

10,000 requests over every route and method that needs a key: without one, with wrong, expired, revoked and under-scoped
ones, and with tokens that were forged. Counted is what was refused with the status that it should have (401, or 403
where the key counts and is not for this). As the control, each route is asked with a key that is for it, and must not
refuse. The run fails if anything went in, or if a sound key did not.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import NamedTuple

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from benchmarks._report import Row, main
from modelpress.access import SCOPES, KeyFile, new_key
from modelpress.store import Store, open_store
from serving.scopes import NEEDS
from tests.serving.conftest import publish_pack, scale_model

REQUESTS, QUICK = 10_000, 1_000
THREADS = 4
ISSUER, AUDIENCE = "https://login.example.org", "modelpress"
UNREADABLE = 0
"""In place of a status: the connection ended without an answer."""


class Trial(NamedTuple):
    """One request, and the statuses that are right."""

    kind: str
    method: str
    path: str
    headers: tuple[tuple[str, str], ...]
    right: frozenset[int]


class Ring:
    """Files of keys for a server, and what can be brought to it."""

    def __init__(self, folder: Path) -> None:
        now = datetime.now(UTC)
        self._provider, self._stranger = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
        made = {scope: new_key(scope, [scope], None, now) for scope in SCOPES}
        past, taken = (new_key("gone", SCOPES, now + timedelta(days=1), now) for _ in range(2))
        others = new_key("others", SCOPES, None, now, ["other"])
        kept = [key for _, key in (*made.values(), others)]
        kept += [past[1].model_copy(update={"expires": now}), taken[1].model_copy(update={"revoked": now})]
        (folder / "keys.json").write_bytes(KeyFile(keys=tuple(kept)).to_bytes())
        public = self._provider.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (folder / "provider.pem").write_bytes(public)
        self.sound: dict[str, str] = {scope: text for scope, (text, _) in made.items()}
        self.others = others[0]
        self._past, self._taken, self._now = past[0], taken[0], int(now.timestamp())
        self.environment = {
            "MODELPRESS_SERVING_KEYS_FILE": str(folder / "keys.json"),
            "MODELPRESS_SERVING_JWT_KEYS_FILE": str(folder / "provider.pem"),
            "MODELPRESS_SERVING_JWT_ISSUER": ISSUER,
            "MODELPRESS_SERVING_JWT_AUDIENCE": AUDIENCE,
            "MODELPRESS_SERVING_ROLLBACK": "true",
            "MODELPRESS_SERVING_AUDIT_FILE": str(folder / "audit.jsonl"),
        }

    def wrong(self, kind: str, rng: random.Random) -> list[str]:
        """Headers `Authorization` that do not count."""
        good = rng.choice(list(self.sound.values()))
        place = rng.randrange(17, len(good))
        changed = good[:place] + chr((ord(good[place]) - 33 + 1 + rng.randrange(90)) % 93 + 33) + good[place + 1 :]
        made = {
            "no key": [],
            "a key with one letter changed": [f"Bearer {changed}" if changed != good else "Bearer x"],
            "a key cut short": [f"Bearer {good[:place]}"],
            "a random key": [f"Bearer {new_key('x', ['infer'], None, datetime.now(UTC))[0]}"],
            "an expired key": [f"Bearer {self._past}"],
            "a revoked key": [f"Bearer {self._taken}"],
            "two keys": [f"Bearer {good}", f"Bearer {good}"],
            "another scheme": [f"{rng.choice(['Basic', 'Digest', 'Token', 'Negotiate'])} {good}"],
            "a stranger's token": [f"Bearer {self.token(signed_by=self._stranger)}"],
            "a token without a signature": [f"Bearer {self.token().rpartition('.')[0]}."],
            "an expired token": [f"Bearer {self.token(exp=self._now - 3600)}"],
            "a token for others": [f"Bearer {self.token(aud='others')}"],
        }
        return made[kind]

    def token(self, signed_by: Ed25519PrivateKey | None = None, **changes: object) -> str:
        """A token of the provider with every scope."""
        claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "x", "nbf": self._now - 60, "exp": self._now + 86_400}
        claims |= {"scope": " ".join(SCOPES)} | changes
        return jwt.encode(claims, signed_by or self._provider, "EdDSA")


OTHERS = "a key for other models"
KINDS = (
    *("no key", "a key with one letter changed", "a key cut short", "a random key", "an expired key"),
    *("a revoked key", "two keys", "another scheme", "a stranger's token", "a token without a signature"),
    *("an expired token", "a token for others", "a key without the scope", "a token without the scope"),
    OTHERS,
)


def trials(ring: Ring, pack: str, count: int, seed: int) -> Iterator[Trial]:
    """Requests that must be refused, a like number of each kind."""
    rng = random.Random(seed)
    closed = {path: needs for path, needs in NEEDS.items() if needs is not None}
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        template = rng.choice([path for path, needs in closed.items() if set(needs) != set(SCOPES)])
        if kind == OTHERS:
            template = rng.choice([path for path in closed if "{name}" in path])
        elif not kind.endswith("without the scope"):
            template = rng.choice([*closed, "/nowhere"])
        path = template.replace("{name}", "scale").replace("{version}", pack)
        method = rng.choice(["GET", "POST", "PUT", "DELETE"])
        if kind == OTHERS:
            brought = [f"Bearer {ring.others}"]
        elif kind.endswith("without the scope"):
            scope = rng.choice([one for one in SCOPES if one not in closed[template]])
            brought = [f"Bearer {ring.sound[scope] if kind.startswith('a key') else ring.token(scope=scope)}"]
        else:
            brought = ring.wrong(kind, rng)
        right = frozenset({403 if kind == OTHERS or kind.endswith("without the scope") else 401})
        yield Trial(kind, method, path, tuple(("Authorization", one) for one in brought), right)


def controls(ring: Ring, pack: str) -> Iterator[Trial]:
    """Requests that must not be refused: each route by a key that is for it."""
    for template, needs in NEEDS.items():
        path = template.replace("{name}", "scale").replace("{version}", pack)
        headers = (("Authorization", f"Bearer {ring.sound[needs[0]]}"),) if needs else ()
        yield Trial("control", "GET", path, headers, frozenset(range(200, 600)) - {401, 403})


def ask(address: tuple[str, int], trial: Trial) -> int:
    """The status of the answer."""
    connection = HTTPConnection(*address, timeout=60)
    try:
        connection.putrequest(trial.method, trial.path)
        for name, value in trial.headers:
            connection.putheader(name, value)
        connection.putheader("Content-Length", "0")
        connection.endheaders()
        return connection.getresponse().status
    except (HTTPException, OSError):
        return UNREADABLE
    finally:
        connection.close()


@contextmanager
def served(store: Store, environment: dict[str, str]) -> Iterator[tuple[str, int]]:
    """The address of a server process."""
    command = [sys.executable, "-m", "modelpress.cli", "serve", "scale", "--port", "0", "--threads", "1"]
    more = os.environ | {"MODELPRESS_STORE": store.uri} | environment
    with subprocess.Popen(command, env=more, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if found := re.search(r"listening on http://([\d.]+):(\d+)", line):
                    yield found[1], int(found[2])
                    break
            else:
                raise RuntimeError("the server did not start")
        finally:
            process.terminate()
            process.stderr.read()


def measure(quick: bool) -> Iterator[Row]:
    """A row of counts for each kind, and their sum."""
    asked, refused, other = Counter[str](), Counter[str](), Counter[int]()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(THREADS) as pool:
        folder = Path(name)
        store = open_store(f"{name}/store")
        pack = publish_pack(store, folder, scale_model(2.0), "scale")
        ring = Ring(folder)
        with served(store, ring.environment) as address:
            every = list(trials(ring, pack, QUICK if quick else REQUESTS, seed=0))
            for trial, status in zip(every, pool.map(lambda trial: ask(address, trial), every), strict=True):
                asked[trial.kind] += 1
                refused[trial.kind] += status in trial.right
                other[status] += status not in trial.right
            sound = [(trial, ask(address, trial)) for trial in controls(ring, pack)]
    for kind in KINDS:
        yield from _rows(kind, asked[kind], refused[kind])
    yield from _rows("all", sum(asked.values()), sum(refused.values()))
    let_in = sum(status in trial.right for trial, status in sound)
    yield Row("sound keys", "modelpress", "routes", "1", len(sound))
    yield Row("sound keys", "modelpress", "let in", "1", let_in)
    if asked != refused or let_in != len(sound):
        raise SystemExit(f"not refused as they should be: {dict(+other)}; sound: {sound}")


def _rows(kind: str, asked: int, refused: int) -> Iterator[Row]:
    yield Row(f"refused: {kind}", "modelpress", "requests", "1", asked)
    yield Row(f"refused: {kind}", "modelpress", "refused", "1", refused)


if __name__ == "__main__":
    main("refusals", measure)
