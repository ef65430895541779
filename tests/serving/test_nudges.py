"""The door for nudges: signed ones are looked at at once and once, others have no effect at all."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from modelpress import pointer
from modelpress.canary import log
from modelpress.nudge import ID, PATH, SIGNATURE, TIMESTAMP, Nudge, sign
from modelpress.settings import Settings
from modelpress.store import Store, open_store
from serving import nudge as doors
from serving.app import create_app
from serving.nudge import Nudges, ReplayedNudgeError
from serving.refusals import NotServedError
from serving.repository import Repository
from tests.canary.states import config, state
from tests.serving.conftest import Server, scale_model
from tests.serving.test_app import check_error
from tests.serving.test_process import wait_for
from tests.serving.test_repository import answer

Call = Callable[..., Any]
SECRET = b"s" * 64
BODY = b'{"alias": "champion", "name": "scale"}'
pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def headers(number: int, body: bytes = BODY, at: float | None = None, secret: bytes = SECRET) -> dict[str, str]:
    stamp = str(int(time.time() if at is None else at))
    return {ID: f"n{number}", TIMESTAMP: stamp, SIGNATURE: sign(secret, f"n{number}", stamp, body)}


@pytest.fixture
def models(press: Call, repository: Call) -> Repository:
    press(scale_model(2.0))
    return repository("scale")


@pytest.fixture
def nudges(models: Repository) -> Iterator[Nudges]:
    with Nudges(models, [b"o" * 64, SECRET], round_seconds=0.0) as made:
        yield made


@pytest.fixture
async def client(models: Repository, nudges: Nudges) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(models, poll_seconds=0.0, workers=1, routes=[nudges.route()])
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://t") as made:
        yield made


async def test_a_nudge_is_followed(client: httpx.AsyncClient, models: Repository, press: Call) -> None:
    press(scale_model(3.0))
    found = await client.post(PATH, content=BODY, headers=headers(1))
    assert (found.status_code, found.json()) == (202, {"look": "scale"})
    wait_for(lambda: answer(models) == 3.0)


async def test_what_nobody_signed_has_no_effect(client: httpx.AsyncClient, models: Repository, press: Call) -> None:
    press(scale_model(3.0))
    check_error(await client.post(PATH, content=BODY), 401)
    check_error(await client.post(PATH, content=BODY, headers=headers(1, secret=b"x" * 64)), 401)
    check_error(await client.post(PATH, content=BODY + b" ", headers=headers(2)), 401)
    check_error(await client.post(PATH, content=BODY, headers=headers(3, at=time.time() - 400)), 401)
    check_error(await client.post(PATH, content=b" " * (2**16 + 1), headers=headers(4)), 413)
    assert (await client.get(PATH)).status_code == 405
    assert answer(models) == 2.0


async def test_a_nudge_counts_once(client: httpx.AsyncClient) -> None:
    given = headers(1)
    assert (await client.post(PATH, content=BODY, headers=given)).status_code == 202
    check_error(await client.post(PATH, content=BODY, headers=given), 409)


async def test_a_nudge_for_another_model_is_refused(client: httpx.AsyncClient) -> None:
    other = b'{"alias": "champion", "name": "other"}'
    check_error(await client.post(PATH, content=other, headers=headers(1, other)), 404, "scale")


async def test_without_a_secret_nobody_can_nudge(models: Repository) -> None:
    app = create_app(models, poll_seconds=0.0, workers=1, routes=[Nudges(models, []).route()])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        check_error(await client.post(PATH, content=BODY, headers=headers(1)), 401)
        check_error(await client.post(PATH, content=BODY, headers=headers(1, secret=b"")), 401)


def test_a_server_of_all_packs_finds_a_new_one(store: Store, press: Call) -> None:
    models = Repository(store, threads=1, retry_seconds=0.0)
    models.start()
    with Nudges(models, [SECRET], round_seconds=0.0) as nudges:
        press(scale_model(2.0), "fresh")
        body = b'{"alias": "champion", "name": "fresh"}'
        nudges.take(headers(1, body), body)
        wait_for(lambda: [model.name for model in models.models()] == ["fresh"])
        wait_for(lambda: models.ready)
        assert answer(models, "fresh") == 2.0


def test_many_nudges_are_one_look(models: Repository) -> None:
    """While one look runs, all that come are one more; listeners get what the newest says."""
    looked, told = list[str](), list[Nudge]()
    going, go_on = threading.Event(), threading.Event()
    look = models.look

    def slow(name: str) -> None:
        looked.append(name)
        going.set()
        assert go_on.wait(30)
        look(name)

    models.look = slow  # type: ignore[method-assign]
    with Nudges(models, [SECRET], [told.append], round_seconds=0.0) as nudges:
        nudges.take(headers(0), BODY)
        assert going.wait(30)
        for number in range(1, 50):
            body = b'{"alias": "canary-%d", "name": "scale"}' % number
            nudges.take(headers(number, body), body)
        go_on.set()
        wait_for(lambda: len(looked) == 2)
    assert [nudge.alias for nudge in told] == ["champion", "canary-49"]


def test_what_is_remembered_is_bounded_and_forgotten(models: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doors, "MAX_SEEN", 3)
    now = [1_900_000_000.0]
    nudges = Nudges(models, [SECRET], clock=lambda: now[0])
    for number in range(3):
        nudges.take(headers(number, at=now[0]), BODY)
    with pytest.raises(doors.ManyNudgesError):
        nudges.take(headers(3, at=now[0]), BODY)
    with pytest.raises(ReplayedNudgeError):
        nudges.take(headers(0, at=now[0]), BODY)
    now[0] += 601
    nudges.take(headers(3, at=now[0]), BODY)
    assert len(nudges._seen) == 1


def test_models_that_wait_are_bounded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doors, "MAX_WAITING", 2)
    nudges = Nudges(Repository(store, threads=1), [SECRET])  # nobody looks: the thread was not started
    for number, name in enumerate(("a", "b", "a")):
        body = b'{"alias": "champion", "name": "%s"}' % name.encode()
        nudges.take(headers(number, body), body)
    body = b'{"alias": "champion", "name": "c"}'
    with pytest.raises(doors.ManyNudgesError):
        nudges.take(headers(9, body), body)
    named = Nudges(Repository(store, ["a"], threads=1), [SECRET])
    with pytest.raises(NotServedError):
        named.take(headers(9, body), body)


def test_a_canary_and_a_promotion_reach_a_server_that_does_not_poll(
    store: Store, press: Call, serve: Call, tmp_path: Path
) -> None:
    """From the promotion's settings to the answer of another process, by sockets and files alone."""
    first = press(scale_model(2.0))
    secret = tmp_path / "secret"
    secret.write_text("s" * 64)
    secret.chmod(0o600)
    server: Server = serve("scale", "--poll-seconds", "3600", MODELPRESS_SERVING_NUDGE_SECRET_FILE=str(secret))
    second = press(scale_model(3.0), alias=None)
    telling = open_store(str(tmp_path / "store"), Settings(nudge_urls=server.url, nudge_secret_file=secret))
    metadata = lambda: server.client.get("/v2/models/scale").json()  # noqa: E731
    begun = state(0, config({"mode": "shadow", "share": 1.0}), candidate=second, champion=first)
    log.write(telling, "scale", begun, 0, first)
    wait_for(lambda: "canary" in metadata()["parameters"])
    pointer.append(telling, "scale", "champion", second, "promote")
    wait_for(lambda: metadata()["versions"] == [second])
    assert server.stop() == 0
