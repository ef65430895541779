"""How a long stage shows that it moves: a bar in a terminal, else lines in the log; a progress artifact in Prefect."""

from __future__ import annotations

import contextvars
import sys
import threading
import time
from types import TracebackType
from typing import cast
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.logging import get_run_logger
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

QUIET_SECONDS = 1.0
"""A stage that ends sooner shows nothing: each call to the server costs more than it tells."""
ARTIFACT_SECONDS = 3.0
"""Between updates of the Prefect artifact."""
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
        self._artifact: UUID | None = None
        self._started = self._updated = self._logged = time.monotonic()

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
        if self._artifact is not None and error is None:
            update_progress_artifact(self._artifact, progress=100.0, description=f"{self._stage}: done")

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Show `done` of `total`, no more often than eyes and servers can take."""
        with self._lock:
            self._show(done, total, note)

    def _show(self, done: int, total: int, note: str) -> None:
        now = time.monotonic()
        if self._bar is not None and self._bar_task is not None:
            self._bar.update(self._bar_task, completed=done, total=total, description=note)
        if now - self._started < QUIET_SECONDS:
            return
        share = 100.0 * done / total if total else 0.0
        if self._artifact is None or now - self._updated >= ARTIFACT_SECONDS:
            self._context.run(self._publish, share, note)
            self._updated = now
        if self._bar is None and now - self._logged >= LOG_SECONDS:
            left = f"{share:.0f} %, about {(now - self._started) * (total - done) / done:.0f} s left, " if done else ""
            self._log.info("%s: %s%s", self._stage, left, note, extra={"stage": self._stage})
            self._logged = now

    def _publish(self, share: float, note: str) -> None:
        description = f"{self._stage}: {note}" if note else self._stage
        if self._artifact is None:
            key = f"progress-{self._stage}"
            self._artifact = cast(UUID, create_progress_artifact(progress=share, key=key, description=description))
        else:
            update_progress_artifact(self._artifact, progress=share, description=description)
