"""A stage's progress while Prefect's server is away: the work waits for nothing, and the display comes back."""

from __future__ import annotations

import threading
import uuid
from typing import Any

import httpx
import pytest
from prefect.logging import disable_run_logger

from tasks import progress
from tasks.progress import StageProgress


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(progress, "ARTIFACT_SECONDS", 0.0)


def test_work_goes_on_while_a_call_hangs_and_the_newest_is_shown_then(monkeypatch: pytest.MonkeyPatch) -> None:
    hangs, asked, shown = threading.Event(), threading.Event(), []

    def create(**given: Any) -> uuid.UUID:
        asked.set()
        assert hangs.wait(60)
        shown.append(given["progress"])
        return uuid.uuid4()

    monkeypatch.setattr(progress, "create_progress_artifact", create)
    monkeypatch.setattr(progress, "update_progress_artifact", lambda _, **given: shown.append(given["progress"]))
    with disable_run_logger(), StageProgress("train") as show:
        show(1, 10)
        assert asked.wait(60)
        for done in range(2, 10):  # would never return
            show(done, 10)
        hangs.set()
    assert shown == [10.0, 100.0], "what came between was overtaken"


def test_a_server_that_is_away_is_told_once_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []
    done = threading.Event()

    def create(**given: Any) -> uuid.UUID:
        calls.append(given["progress"])
        done.set()
        if len(calls) < 3:
            raise httpx.ConnectError("refused")
        return uuid.uuid4()

    told: list[str] = []

    class Log:
        def warning(self, text: str, *given: object) -> None:
            told.append(text % given)

        def info(self, *_: object, **__: object) -> None:
            pass

    monkeypatch.setattr(progress, "create_progress_artifact", create)
    monkeypatch.setattr(progress, "update_progress_artifact", lambda _, **given: calls.append(given["progress"]))
    monkeypatch.setattr(progress, "get_run_logger", Log)
    with StageProgress("train") as show:
        for part in (1, 2, 3):
            done.clear()
            show(part, 10)
            assert done.wait(60)
    assert calls == [10.0, 20.0, 30.0, 100.0]
    assert told == ["train: its progress is not shown: refused"]
