"""The log of a run: JSON lines where `MODELPRESS_LOG=json` asks for them, else Prefect's own lines."""

from __future__ import annotations

import functools
import json
import logging
import os
import select
import stat
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from prefect.context import FlowRunContext
from prefect.logging.handlers import APILogHandler

from modelpress.errors import ModelpressError
from modelpress.settings import read_settings

LOGGERS = (None, "prefect.flow_runs", "prefect.task_runs", "mlflow")
"""Whose handlers write to the terminal."""
FIELDS = {"flow_run": "flow_run_name", "flow_run_id": "flow_run_id", "task_run": "task_run_name", "stage": "stage"}
"""Keys of a line that records carry themselves, by the record's names."""


_pack: ContextVar[str] = ContextVar("modelpress_pack", default="")


class JsonLines(logging.Formatter):
    """One JSON object for each record; docs/operations.md says what is in it."""

    def format(self, record: logging.LogRecord) -> str:
        """Keys that have no value are left out."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_run(),
            **{key: str(getattr(record, name)) for key, name in FIELDS.items() if getattr(record, name, None)},
            "pack": _pack.get(),
        }
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            line["error"] = type(error).__name__
            if isinstance(error, ModelpressError):
                line |= {"doing": error.doing, "found": error.found, "expected": error.expected, "fix": error.fix}
            line["traceback"] = "".join(traceback.format_exception(error))
        return json.dumps({key: value for key, value in line.items() if value}, ensure_ascii=False)


@contextmanager
def run_log(pack: str) -> Iterator[None]:
    """The log of a flow run while this is open; the library's own lines join those of the run in Prefect."""
    outlive_readers()
    if read_settings().log == "json":
        write_json()
    library, to_prefect = logging.getLogger("modelpress"), APILogHandler()
    to_prefect.addFilter(lambda _: FlowRunContext.get() is not None)  # a thread of the library's has no run to name
    library.addHandler(to_prefect)
    token = _pack.set(pack)
    try:
        yield
    finally:
        _pack.reset(token)
        library.removeHandler(to_prefect)


@functools.cache
def outlive_readers() -> None:
    """Let this process go on when nobody reads its lines any more: a worker reads those of its runs, and may be killed.

    What writes into a pipe without a reader fails, and of that rich, by which Prefect logs, ends the process. So a pipe
    whose reader is gone is replaced by nothing as soon as the system says so.
    """
    pipes = [fd for fd in (1, 2) if _is_pipe(fd)]
    if pipes and hasattr(select, "poll"):
        threading.Thread(target=_replace_broken, args=(pipes,), name="outlive-readers", daemon=True).start()


def _is_pipe(fd: int) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(fd).st_mode)
    except OSError:
        return False  # closed


def _replace_broken(pipes: list[int]) -> None:
    watched, left = select.poll(), set(pipes)
    for fd in pipes:
        watched.register(fd, 0)  # that the reader is gone is told always
    while left:
        for fd, _ in watched.poll():
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, fd)
            os.close(nothing)
            watched.unregister(fd)
            left.discard(fd)


def write_json() -> None:
    """Let what goes to the terminal be JSON from here on, to the end of the process: Prefect says how a run ended after
    it is over."""
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers = [_plain(handler) for handler in logger.handlers]


def _plain(handler: logging.Handler) -> logging.Handler:
    """In place of what writes to the terminal, one that writes JSON: Prefect's own would colour and wrap the lines."""
    if not isinstance(handler, logging.StreamHandler):
        return handler
    if handler.stream not in (sys.stderr, sys.stdout) and not type(handler.stream).__module__.startswith("mlflow."):
        return handler
    plain = logging.StreamHandler(sys.stdout if handler.stream is sys.stdout else sys.stderr)
    plain.setLevel(handler.level)
    for one in handler.filters:
        plain.addFilter(one)
    plain.setFormatter(JsonLines())
    return plain


def _run() -> dict[str, str]:
    """The flow run of this thread: records of the library do not carry it."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return {}
    return {"flow_run": context.flow_run.name, "flow_run_id": str(context.flow_run.id)}
