"""What a long stage says while it runs, whichever of its threads reports; on a clock that the test moves."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import pytest

from tasks import progress
from tasks.progress import StageProgress

RUN: ContextVar[str] = ContextVar("run")
"""What a flow run leaves in its context: Prefect's log and artifacts need it, and a bare thread has it not."""


def test_threads_of_a_stage_may_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the threads of an upload do."""
    now, lines, artifacts = [100.0], list[str](), list[float]()

    def artifact(*_: object, **values: Any) -> str:
        assert RUN.get() == "a flow run"
        artifacts.append(values["progress"])
        return "artifact"

    log = SimpleNamespace(info=lambda text, *values, **_: lines.append(text % values))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(progress, "create_progress_artifact", artifact)
    monkeypatch.setattr(progress, "update_progress_artifact", artifact)
    monkeypatch.setattr(progress, "get_run_logger", lambda: log if RUN.get() else None)
    token = RUN.set("a flow run")
    try:
        with ThreadPoolExecutor(4) as pool, StageProgress("upload") as report:
            now[0] += 20
            for result in [pool.submit(report, done, 100, "shards") for done in range(1, 20)]:
                result.result()
    finally:
        RUN.reset(token)
    assert len(artifacts) == 2
    assert artifacts[-1] == 100.0
    assert len(lines) == 1
    assert lines[0].startswith("upload: ")
