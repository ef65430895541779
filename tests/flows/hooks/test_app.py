"""The receiver against whoever speaks to it: what MLflow signed once gets in, and nothing else has an effect."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from mlflow.webhooks import constants, delivery

from flows.hooks import app as receiver
from flows.hooks.app import Hint, StartError, create_app
from flows.hooks.deliveries import Deliveries
from flows.hooks.signed import DELIVERY, SIGNATURE, TIMESTAMP, sign
from modelpress.errors import SetupError

SECRET, OLD = "s" * 32, "o" * 32
NOW = 1_800_000_000.0
TOLERANCE, MOST = 300.0, 4096


@dataclass
class Looked:
    """Remembers where it was told to look; while `down`, it can't."""

    hints: list[Hint] = field(default_factory=list)
    down: bool = False
    alive: bool = True

    def look(self, hint: Hint) -> None:
        if self.down:
            raise StartError("nobody is there")
        self.hints.append(hint)


class Door:
    def __init__(self, folder: Path) -> None:
        self.folder, self.looker, self.now = folder, Looked(), NOW
        self.open()

    def open(self) -> None:
        """A fresh process, with the same disk."""
        deliveries = Deliveries(self.folder / "deliveries.sqlite", TOLERANCE)
        app = create_app(
            self.looker,
            deliveries,
            [SECRET.encode(), OLD.encode()],
            tolerance_seconds=TOLERANCE,
            max_body_bytes=MOST,
            clock=lambda: self.now,
        )
        self.transport = httpx.ASGITransport(app)

    def ask(self, method: str, path: str, **given: Any) -> httpx.Response:
        async def once() -> httpx.Response:
            async with httpx.AsyncClient(transport=self.transport, base_url="http://hooks") as client:
                return await client.request(method, path, **given)

        return asyncio.run(once())

    def post(self, body: bytes, headers: dict[str, str]) -> httpx.Response:
        return self.ask("POST", "/mlflow", content=body, headers=headers)

    @property
    def names(self) -> list[str]:
        return [hint.name for hint in self.looker.hints]


@pytest.fixture
def door(tmp_path: Path) -> Door:
    return Door(tmp_path)


def event(name: Any = "digits", entity: str = "model_version_alias", action: str = "created") -> bytes:
    data = {"name": name, "alias": "champion", "version": "3"}
    return json.dumps({"entity": entity, "action": action, "timestamp": "2026-11-22", "data": data}).encode()


def headers(body: bytes, *, secret: str = SECRET, id: str = "one", at: float = NOW) -> dict[str, str]:
    return {DELIVERY: id, TIMESTAMP: str(int(at)), SIGNATURE: sign(secret.encode(), id, str(int(at)), body)}


def test_headers_and_signature_are_those_of_the_installed_mlflow() -> None:
    names = (constants.WEBHOOK_SIGNATURE_HEADER, constants.WEBHOOK_TIMESTAMP_HEADER)
    assert tuple(name.lower() for name in names) == (SIGNATURE, TIMESTAMP)
    assert constants.WEBHOOK_DELIVERY_ID_HEADER.lower() == DELIVERY
    body = event("größer")
    theirs = delivery._generate_hmac_signature(SECRET, "id", "1800000000", body.decode())
    assert sign(SECRET.encode(), "id", "1800000000", body) == theirs


def test_a_signed_event_is_looked_at_once(door: Door) -> None:
    body = event()
    assert door.post(body, headers(body)).status_code == 202
    assert door.looker.hints == [Hint("digits", "one")]
    again = door.post(body, headers(body))
    assert (again.status_code, again.json()) == (409, {"error": "this delivery was taken before"})
    assert door.names == ["digits"]


def test_a_replay_is_refused_after_a_restart_too(door: Door) -> None:
    body = event()
    door.post(body, headers(body))
    door.open()
    door.now += TOLERANCE
    assert door.post(body, headers(body)).status_code == 409
    door.now += 1
    assert door.post(body, headers(body)).status_code == 401, "too old before it is forgotten"
    assert door.names == ["digits"]


def test_an_event_from_our_future_is_remembered_until_it_is_past(door: Door) -> None:
    body = event()
    early = headers(body, at=NOW + TOLERANCE)
    assert door.post(body, early).status_code == 202
    other = event("other")
    for later in (TOLERANCE, 2 * TOLERANCE):
        door.now = NOW + later
        door.post(other, headers(other, id=f"other-{later:.0f}", at=door.now))  # whatever is forgotten is now
        assert door.post(body, early).status_code == 409
    door.now += 1
    assert door.post(body, early).status_code == 401


def test_the_secret_before_is_taken_during_a_change(door: Door) -> None:
    body = event()
    assert door.post(body, headers(body, secret=OLD)).status_code == 202


def altered(**changes: str | None) -> dict[str, str]:
    given = headers(event()) | {name: value for name, value in changes.items() if value is not None}
    return {name: value for name, value in given.items() if changes.get(name, "") is not None}


FORGED = {
    "no headers": {},
    "no signature": altered(**{SIGNATURE: None}),
    "no id": altered(**{DELIVERY: None}),
    "no timestamp": altered(**{TIMESTAMP: None}),
    "another id": altered(**{DELIVERY: "two"}),
    "another time": altered(**{TIMESTAMP: str(int(NOW) + 1)}),
    "another secret": headers(event(), secret="x" * 32),
    "another body": headers(event("other")),
    "no version": altered(**{SIGNATURE: headers(event())[SIGNATURE].removeprefix("v1,")}),
    "another version": altered(**{SIGNATURE: headers(event())[SIGNATURE].replace("v1", "v2")}),
    "two signatures": altered(**{SIGNATURE: f"v1,AAAA {headers(event())[SIGNATURE]}"}),
    "an empty signature": altered(**{SIGNATURE: "v1,"}),
    "a signature that is no ASCII": altered(**{SIGNATURE: "v1,\xe9\xff"}),
    "a time that is no number": altered(**{TIMESTAMP: "now"}),
    "a time of other digits": altered(**{TIMESTAMP: "١٢٣"}),
    "a negative time": altered(**{TIMESTAMP: "-1"}),
    "a time without end": altered(**{TIMESTAMP: "9" * 4000}),
    "an id without end": altered(**{DELIVERY: "a" * 4000}),
    "an id with dots": altered(**{DELIVERY: "one.1800000000"}),
}


@pytest.mark.parametrize("kind", FORGED)
def test_what_mlflow_did_not_sign_is_refused_alike(door: Door, kind: str) -> None:
    given = [(name.encode(), value.encode("utf-8")) for name, value in FORGED[kind].items()]
    answer = door.post(event(), given)  # type: ignore[arg-type]
    assert (answer.status_code, answer.json()) == (401, {"error": "not signed by MLflow"})
    assert door.names == []
    body = event()
    assert door.post(body, headers(body)).status_code == 202, "a forgery spoils no delivery"


@pytest.mark.parametrize("age", [TOLERANCE + 1, -TOLERANCE - 1])
def test_old_and_future_signatures_are_refused(door: Door, age: float) -> None:
    body = event()
    answer = door.post(body, headers(body, at=NOW - age))
    assert answer.status_code == 401
    assert "clocks that differ" in answer.json()["error"]
    assert door.names == []


@pytest.mark.parametrize(
    "body",
    [
        event(entity="registered_model"),
        event(entity="prompt_alias"),
        event(action="set"),
        event("A Name That No Pack Has"),
        event("../../etc"),
        b"{}",
        b'{"entity": ["model_version_alias"], "action": {}}',
        b'{"a":' * 600 + b"1" + b"}" * 600,
    ],
)
def test_events_of_others_are_taken_without_effect(door: Door, body: bytes) -> None:
    answer = door.post(body, headers(body))
    assert answer.status_code == 200
    assert door.names == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{",
        b'{"entity": NaN}',
        b'{"entity": "a", "entity": "b"}',
        event(None),
        event(7),
        b'{"entity": "model_version_alias", "action": "created"}',
        b'{"entity": "model_version_alias", "action": "created", "data": []}',
    ],
)
def test_garbage_that_is_signed_is_refused_without_effect(door: Door, body: bytes) -> None:
    answer = door.post(body, headers(body))
    assert answer.status_code == 400
    assert door.names == []


def test_a_large_body_is_refused_unread(door: Door) -> None:
    body = event("x" * MOST)
    assert door.post(body, headers(body)).status_code == 413
    asked = 0

    async def without_end() -> Any:
        nonlocal asked
        while True:
            asked += 1
            yield b"x" * 1024

    async def stream() -> httpx.Response:
        async with httpx.AsyncClient(transport=door.transport, base_url="http://hooks") as client:
            return await client.post("/mlflow", content=without_end(), headers=headers(b""))

    assert asyncio.run(stream()).status_code == 413
    assert asked <= MOST / 1024 + 2
    assert door.names == []


def test_a_body_that_never_ends_is_given_up(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiver, "BODY_SECONDS", 0.05)

    async def slow() -> Any:
        yield b"{"
        await asyncio.sleep(30)
        yield b"}"

    async def stream() -> httpx.Response:
        async with httpx.AsyncClient(transport=door.transport, base_url="http://hooks") as client:
            return await client.post("/mlflow", content=slow(), headers=headers(b"{}"))

    assert asyncio.run(stream()).status_code == 408


def test_what_could_not_be_started_may_come_again(door: Door) -> None:
    body = event()
    door.looker.down = True
    assert door.post(body, headers(body)).status_code == 503, "which MLflow repeats"
    door.looker.down = False
    assert door.post(body, headers(body)).status_code == 202
    assert door.names == ["digits"]


def test_of_many_at_once_one_is_taken(door: Door) -> None:
    body, answers = event(), []
    threads = [
        threading.Thread(target=lambda: answers.append(door.post(body, headers(body)).status_code)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [202] + [409] * 7
    assert door.names == ["digits"]


def test_health_says_whether_somebody_looks(door: Door) -> None:
    assert door.ask("GET", "/health").status_code == 200
    door.looker.alive = False
    assert door.ask("GET", "/health").status_code == 503
    assert door.ask("GET", "/mlflow").status_code == 405
    assert door.ask("POST", "/").status_code == 404


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    path = tmp_path / "damaged.sqlite"
    path.write_bytes(b"this is no database" * 100)
    return path


def test_a_damaged_memory_is_an_error_with_the_way_out(damaged: Path) -> None:
    with pytest.raises(SetupError, match="MODELPRESS_HOOKS_FOLDER"):
        Deliveries(damaged, TOLERANCE)


def test_without_a_memory_nothing_is_taken(door: Door) -> None:
    (door.folder / "deliveries.sqlite").unlink()
    (door.folder / "deliveries.sqlite").mkdir()
    body = event()
    assert door.post(body, headers(body)).status_code == 503
    assert door.names == []


def test_no_answer_and_no_log_has_the_secret(door: Door, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG"):
        body = event()
        said = [door.post(body, headers(body)).text, door.post(body, {}).text, door.post(body, headers(body)).text]
    assert not any(secret in text for secret in (SECRET, OLD) for text in (*said, caplog.text))
