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
    """A `modelpress.progress.Progress` for the time of one stage; made to be called often."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._bar: Progress | None = None
        self._bar_task: TaskID | None = None
        self._artifact: _Artifact | None = None
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
        if self._artifact is not None:
            if error is None:
                self._artifact.show(100.0, f"{self._stage}: done")
            self._artifact.close()

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Show `done` of `total`, no more often than eyes and servers can take."""
        now = time.monotonic()
        if self._bar is not None and self._bar_task is not None:
            self._bar.update(self._bar_task, completed=done, total=total, description=note)
        if now - self._started < QUIET_SECONDS:
            return
        share = 100.0 * done / total if total else 0.0
        if self._artifact is None or now - self._updated >= ARTIFACT_SECONDS:
            self._publish(share, note)
            self._updated = now
        if self._bar is None and now - self._logged >= LOG_SECONDS:
            left = f"{share:.0f} %, about {(now - self._started) * (total - done) / done:.0f} s left, " if done else ""
            get_run_logger().info("%s: %s%s", self._stage, left, note, extra={"stage": self._stage})
            self._logged = now

    def _publish(self, share: float, note: str) -> None:
        if self._artifact is None:
            self._artifact = _Artifact(self._stage)
        self._artifact.show(share, f"{self._stage}: {note}" if note else self._stage)


class _Artifact:
    """A progress artifact, written by a thread of its own: while Prefect's server is away, each call takes a minute and
    then fails, and the work has not to wait for either."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._latest: tuple[float, str] | None = None
        self._changed, self._closed = threading.Event(), False
        run = contextvars.copy_context().run  # the artifact belongs to the flow run that the context names
        self._thread = threading.Thread(target=run, args=(self._write,), name=f"progress-{stage}", daemon=True)
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
