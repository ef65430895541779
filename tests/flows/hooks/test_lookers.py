"""The thread that looks: what it does first, what it leaves out, and what does not end it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from flows.hooks import lookers
from flows.hooks.app import Hint, StartError
from flows.hooks.lookers import ByWorker, Here
from modelpress.errors import SetupError
from modelpress.settings import Settings
from modelpress.store.local import LocalStore
from registry import runs
from tests.databases import Databases
from tests.registry.shelf import Shelf


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


class Watched(Here):
    """Notes what it is asked to look at, and waits at each until it is let go."""

    def __init__(self, poll_seconds: float = 0.0) -> None:
        super().__init__(poll_seconds)
        self.seen: list[str | None] = []
        self.free = threading.Semaphore(0)
        self.broken = False

    def _look_at(self, name: str | None) -> None:
        self.seen.append(name)
        self.free.acquire(timeout=60)
        if self.broken:
            raise ZeroDivisionError("nobody foresaw this")


@pytest.fixture
def watched() -> Iterator[Watched]:
    found = Watched()
    found.start()
    yield found
    found.stop()
    found.free.release(100)


def test_everything_comes_first_and_a_model_waits_once(watched: Watched) -> None:
    eventually(lambda: watched.seen == [None])
    for name in ("one", "other", "one", "one", "other"):
        watched.look(Hint(name, "id"))
    watched.free.release()
    eventually(lambda: watched.seen == [None, "one"])
    watched.look(Hint("one", "a click while it is looked at"))
    watched.free.release(100)
    eventually(lambda: watched.seen == [None, "one", "other", "one"])


def test_hints_without_end_hold_up_no_poll() -> None:
    looker = Watched(poll_seconds=0.05)
    looker.start()
    looker.free.release(10_000)
    try:
        end = time.monotonic() + 60
        while looker.seen.count(None) < 4 and time.monotonic() < end:
            looker.look(Hint("busy", "id"))
        assert looker.seen.count(None) >= 4
    finally:
        looker.stop()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_nobody_foresaw_shows_in_the_health_and_takes_no_more_events(watched: Watched) -> None:
    watched.broken = True
    watched.free.release()
    eventually(lambda: not watched.alive)
    with pytest.raises(StartError, match="has ended"):
        watched.look(Hint("one", "id"))


def test_a_flood_of_names_is_bounded(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookers, "MAX_WAITING", 3)
    eventually(lambda: watched.seen == [None])
    for name in "abc":
        watched.look(Hint(name, "id"))
    with pytest.raises(StartError, match="3 models wait"):
        watched.look(Hint("d", "id"))
    watched.look(Hint("a", "it waits already"))


def test_a_dead_prefect_and_a_dead_mlflow_end_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, databases: Databases
) -> None:
    databases.mlflow(tmp_path)
    monkeypatch.setenv("MODELPRESS_HOME", str(tmp_path))
    for name in ("MODELPRESS_STORE", "MODELPRESS_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    client = runs.open_client(Settings(home=tmp_path))
    shelf = Shelf(LocalStore(tmp_path / "store"), client, tmp_path / "packs", "waits")
    shelf.click(shelf.publish())
    looker = Here(0.0)
    dead = {PREFECT_API_URL: "http://127.0.0.1:9/api", PREFECT_CLIENT_MAX_RETRIES: 0}
    with temporary_settings(dead):
        looker._look_at("waits")
        assert "PREFECT_API_URL" in caplog.text
        by_worker = ByWorker("reconcile/reconcile")
        with pytest.raises(SetupError, match="PREFECT_API_URL"):
            by_worker.check()
        with pytest.raises(StartError):
            by_worker.look(Hint("waits", "id"))
    monkeypatch.setenv("MODELPRESS_TRACKING_URI", "http://127.0.0.1:9")
    looker._look_at("waits")
    assert "MODELPRESS_TRACKING_URI" in caplog.text
    assert shelf.served() is None
