"""What a long stage says while it runs: how far, how fast, and how much longer; on a clock that the test moves."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context, ContextVar
from types import SimpleNamespace

import pytest

from tasks import progress
from tasks.progress import StageProgress

RUN: ContextVar[str] = ContextVar("run")
"""What a flow run leaves in its context: Prefect's log and artifacts need it, and a bare thread has it not."""


class Seen:
    """What would go to Prefect and to the log."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now, self.lines = 100.0, list[str]()
        self.artifacts: list[tuple[float, str]] = []
        patch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: self.now))
        patch.setattr(progress, "_Artifact", self.artifact)  # the real one leaves out what its thread is too slow for
        log = SimpleNamespace(info=lambda text, *values, **_: self.lines.append(text % values))
        RUN.set("a flow run")
        patch.setattr(progress, "get_run_logger", lambda: log if RUN.get() else None)

    def artifact(self, _stage: str, context: Context) -> SimpleNamespace:
        assert context[RUN] == "a flow run"
        return SimpleNamespace(show=lambda share, text: self.artifacts.append((share, text)), close=lambda: None)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Seen:
    caplog.set_level(logging.INFO)
    return Seen(monkeypatch)


def test_artifact_and_log_have_rate_and_time_left(seen: Seen) -> None:
    with StageProgress("distill") as report:
        report(0, 1000, "epoch 1")
        seen.now += 10
        report(50, 1000, "epoch 1: loss 0.5")
        seen.now += 10
        report(100, 1000, "epoch 1: loss 0.4")
    assert seen.artifacts[:2] == [
        (5.0, "distill: epoch 1: loss 0.5 · 5/s, 3 min 10 s left"),
        (10.0, "distill: epoch 1: loss 0.4 · 5/s, 3 min 0 s left"),
    ]
    assert seen.artifacts[-1] == (100.0, "distill: done")
    assert seen.lines[0] == "distill: 5 %, 5/s, 3 min 10 s left, epoch 1: loss 0.5"


def test_a_stage_that_goes_on_at_half_is_not_called_twice_as_fast(seen: Seen) -> None:
    with StageProgress("distill") as report:
        report(500, 1000, "goes on")
        seen.now += 10
        report(510, 1000, "")
    assert seen.artifacts[0] == (51.0, "distill: 1/s, 8 min 10 s left")


def test_a_count_that_begins_anew_is_timed_anew(seen: Seen) -> None:
    with StageProgress("prune") as report:
        report(0, 10, "scores")
        seen.now += 100
        report(10, 10, "scores")
        report(0, 40, "recovery")
        seen.now += 10
        report(20, 40, "recovery")
    assert seen.artifacts[-2] == (50.0, "prune: recovery · 2/s, 10 s left")


def test_before_anything_is_done_no_rate_is_made_up(seen: Seen) -> None:
    with StageProgress("upload") as report:
        report(0, 0, "hashing")
        seen.now += 20
        report(0, 5 * 10**9, "first shard")
        seen.now += 1000
        report(10**9, 5 * 10**9)
    assert seen.artifacts[0] == (0.0, "upload: first shard")
    assert seen.artifacts[1][1] == "upload: 1 M/s, 1 h 6 min left"


def test_threads_of_a_stage_may_report(seen: Seen) -> None:
    """As the threads of an upload do."""
    with ThreadPoolExecutor(4) as pool, StageProgress("upload") as report:
        seen.now += 20
        for result in [pool.submit(report, done, 100, "shards") for done in range(1, 20)]:
            result.result()
    assert len(seen.artifacts) == 2
    assert len(seen.lines) == 1
    assert seen.artifacts[0][1].startswith("upload: shards")
