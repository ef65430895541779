"""How a long stage shows that it moves: a bar in a terminal, else lines in the log; a progress artifact in Prefect."""

from __future__ import annotations

import contextvars
import sys
import threading
import time
from types import TracebackType
from typing import cast
from uuid import UUID

import httpx
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.exceptions import PrefectException
from prefect.logging import get_run_logger
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

QUIET_SECONDS = 1.0
"""A stage that ends sooner shows nothing: each call to the server costs more than it tells."""
ARTIFACT_SECONDS = 3.0
"""Between updates of the Prefect artifact."""
CLOSE_SECONDS = 5.0
"""How long the end of a stage waits for its last update."""
LOG_SECONDS = 10.0
"""Between log lines where there is no terminal."""


class StageProgress:
    """A `modelpress.progress.Progress` for the time of one stage; made to be called often, and from any thread.

    Threads of a stage know nothing of the flow run: its log and its context are taken where this is made.
    """

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._log, self._context, self._lock = get_run_logger(), contextvars.copy_context(), threading.Lock()
        self._bar: Progress | None = None
        self._bar_task: TaskID | None = None
        self._artifact: _Artifact | None = None
        self._started = self._updated = self._logged = time.monotonic()
        self._first, self._last = (self._started, 0), (0, -1)

    def __enter__(self) -> StageProgress:
        if sys.stderr.isatty():
            columns = (
                TextColumn("  {task.fields[stage]:<10}"),
                BarColumn(30),
                TextColumn("{task.percentage:3.0f} %"),
                TimeRemainingColumn(),
                TextColumn("[dim]{task.description}"),
            )
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._bar_task = self._bar.add_task("", total=None, stage=self._stage)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._artifact is not None:
            if error is None:
                self._artifact.show(100.0, f"{self._stage}: done")
            self._artifact.close()

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Show `done` of `total`, no more often than eyes and servers can take."""
        with self._lock:
            self._show(done, total, note)

    def _show(self, done: int, total: int, note: str) -> None:
        now = time.monotonic()
        if total != self._last[1] or done < self._last[0]:  # another part of the work is counted
            self._first = (now, done)
        self._last = (done, total)
        if self._bar is not None and self._bar_task is not None:
            self._bar.update(self._bar_task, completed=done, total=total, description=note)
        if now - self._started < QUIET_SECONDS:
            return
        share = 100.0 * done / total if total else 0.0
        if self._artifact is None or now - self._updated >= ARTIFACT_SECONDS:
            self._publish(share, " · ".join(part for part in (note, self._pace(now, done, total)) if part))
            self._updated = now
        if self._bar is None and now - self._logged >= LOG_SECONDS:
            parts = (f"{share:.0f} %" if done else "", self._pace(now, done, total), note)
            said = ", ".join(part for part in parts if part)
            self._log.info("%s: %s", self._stage, said, extra={"stage": self._stage})
            self._logged = now

    def _pace(self, now: float, done: int, total: int) -> str:
        """Rate and time left, from what was done here: a stage that goes on where another run stopped begins late."""
        began, before = self._first
        if done <= before or now <= began:
            return ""
        rate = (done - before) / (now - began)
        return f"{_number(rate)}/s, {_duration((total - done) / rate)} left"

    def _publish(self, share: float, note: str) -> None:
        if self._artifact is None:
            self._artifact = _Artifact(self._stage, self._context)
        self._artifact.show(share, f"{self._stage}: {note}" if note else self._stage)


class _Artifact:
    """A progress artifact, written by a thread of its own: while Prefect's server is away, each call takes a minute and
    then fails, and the work has not to wait for either."""

    def __init__(self, stage: str, context: contextvars.Context) -> None:
        self._stage = stage
        self._latest: tuple[float, str] | None = None
        self._changed, self._closed = threading.Event(), False
        # The artifact belongs to the flow run that the context names.
        self._thread = threading.Thread(target=context.run, args=(self._write,), name=f"progress-{stage}", daemon=True)
        self._thread.start()

    def show(self, share: float, description: str) -> None:
        """Write this, unless something newer comes first."""
        self._latest = (share, description)
        self._changed.set()

    def close(self) -> None:
        """Write what is left, for as long as a server that is there takes."""
        self._closed = True
        self._changed.set()
        self._thread.join(CLOSE_SECONDS)

    def _write(self) -> None:
        artifact: UUID | None = None
        lost = False
        while True:
            self._changed.wait()
            self._changed.clear()
            latest, self._latest = self._latest, None
            if latest is not None:
                share, text = latest
                try:
                    if artifact is None:
                        key = f"progress-{self._stage}"
                        artifact = cast(UUID, create_progress_artifact(progress=share, key=key, description=text))
                    else:
                        update_progress_artifact(artifact, progress=share, description=text)
                except (httpx.HTTPError, PrefectException) as error:
                    if not lost:
                        get_run_logger().warning("%s: its progress is not shown: %s", self._stage, error)
                    lost = True
            if self._closed and self._latest is None:
                return


def _number(value: float) -> str:
    """Three digits, with k, M and G."""
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


def _duration(seconds: float) -> str:
    """`40 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
