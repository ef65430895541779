"""What was changed and who was refused, as JSON lines: for those who ask afterwards.

A line is written with one call to a file that is only appended to, and the file is looked at before each: `logrotate`
may move it away at any time (no `copytruncate`, which may lose lines). Without a file the lines go to the logger
`modelpress.serving.audit`. A disk that is full ends no request and no rollback: it is an error in the log.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from modelpress.access import Principal
from modelpress.errors import ConfigError

log = logging.getLogger("modelpress.serving")
lines = logging.getLogger("modelpress.serving.audit")

REFUSALS_A_MINUTE = 600
"""More are counted, and told by the first line of a later minute: who guesses keys must not fill the disk."""
MAX_CHARACTERS = 200
"""Of anything that a client chose."""


class Audit:
    """Writes lines. Safe to call from threads.

    Args:
        path: the file, made with mode 0640; None: the logger.
        clock: seconds since the epoch.

    Raises:
        ConfigError: the file can't be written.
    """

    def __init__(self, path: Path | None = None, clock: Callable[[], float] = time.time) -> None:
        self._path, self._clock = path, clock
        self._lock = threading.Lock()
        self._minute, self._refusals, self._suppressed = 0, 0, 0
        self._descriptor = -1
        if path is not None:
            try:
                self._open(path)
            except OSError as error:
                raise ConfigError(
                    f"opening the audit log, MODELPRESS_SERVING_AUDIT_FILE={path}",
                    found=error.strerror,
                    expected="a file that this process may append to",
                ) from error

    def done(
        self,
        principal: Principal,
        action: str,
        address: str,
        model: str | None,
        status: int,
        details: Mapping[str, Any],
    ) -> None:
        """Something was asked for that changes things; `status` says how it ended."""
        outcome = "done" if status < 400 else "refused" if status < 500 else "failed"
        who = {"who": principal.name, "via": principal.via} | ({"key": principal.id} if principal.id else {})
        what = {"action": action} | ({"model": model[:MAX_CHARACTERS]} if model is not None else {})
        self._write(who | what | {"from": address, "outcome": outcome, "status": status} | dict(details))

    def refused(self, address: str, method: str, path: str, status: int, why: str, who: str = "") -> None:
        """Somebody was not let in; `who` is empty where it is not known."""
        with self._lock:
            minute = int(self._clock() // 60)
            if minute != self._minute:
                self._minute, self._refusals = minute, 0
            self._refusals += 1
            if self._refusals > REFUSALS_A_MINUTE:
                self._suppressed += 1
                return
            suppressed, self._suppressed = self._suppressed, 0
        asked = f"{method} {path}"[:MAX_CHARACTERS]
        line = {"who": who or None, "action": "enter", "from": address, "outcome": "refused", "status": status}
        self._write(line | {"asked": asked, "why": why} | ({"suppressed": suppressed} if suppressed else {}))

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1

    def _write(self, document: dict[str, Any]) -> None:
        moment = datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="milliseconds")
        text = json.dumps({"time": moment} | document)  # ASCII: whatever a client sent, a line is a line
        if self._path is None:
            lines.info("%s", text)
            return
        try:
            with self._lock:
                self._follow(self._path)
                os.write(self._descriptor, text.encode("ascii") + b"\n")
        except OSError as error:
            log.error("the audit log %s can't be written (%s): %s", self._path, error.strerror, text)

    def _follow(self, path: Path) -> None:
        """Open the file anew where another, or none, stands in its place."""
        if self._descriptor >= 0:
            mine = os.fstat(self._descriptor)
            try:
                there = os.stat(path)
            except FileNotFoundError:
                pass
            else:
                if (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino):
                    return
            os.close(self._descriptor)
            self._descriptor = -1
        self._open(path)

    def _open(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
