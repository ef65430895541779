"""Which deliveries were taken: a file, so that a restart forgets none that would still pass for new."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from flows.hooks.signed import Delivery, RefusedError
from modelpress.errors import SetupError

BUSY_SECONDS = 5.0


class Deliveries:
    """Ids of deliveries, each taken once. Threads and processes of one machine may share the file.

    Args:
        path: of the file; its folder is made.
        keep_seconds: how long an id is kept: as long as its timestamp could pass.

    Raises:
        SetupError: the file can't be used.
    """

    def __init__(self, path: Path, keep_seconds: float) -> None:
        self._path, self._keep = path, keep_seconds
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with self._opened() as database:
                database.execute("CREATE TABLE IF NOT EXISTS deliveries (id TEXT PRIMARY KEY, sent INTEGER NOT NULL)")
        except (OSError, sqlite3.Error) as error:
            raise SetupError(
                f"opening {path}, which remembers deliveries",
                found=str(error),
                expected="a file that this process may write, on a local disk",
                fix="name another folder by MODELPRESS_HOOKS_FOLDER, or delete a damaged file: what was delivered in "
                "the last minutes could then be replayed, to no effect but a look",
            ) from error

    def take(self, delivery: Delivery, now: float) -> None:
        """Note a delivery, on disk when this returns.

        Raises:
            RefusedError: it was taken before, or it can't be noted.
        """
        try:
            with self._opened() as database:
                # Twice the time: a clock ahead of ours signs in our future.
                database.execute("DELETE FROM deliveries WHERE sent < ?", (now - 2 * self._keep,))
                database.execute("INSERT INTO deliveries VALUES (?, ?)", (delivery.id, delivery.sent))
        except sqlite3.IntegrityError as error:
            raise RefusedError(409, "this delivery was taken before") from error
        except sqlite3.Error as error:
            raise RefusedError(503, f"deliveries can't be remembered now ({error})") from error

    def forget(self, delivery: Delivery) -> None:
        """Let a delivery come again: nothing came of it."""
        with self._opened() as database:
            database.execute("DELETE FROM deliveries WHERE id = ?", (delivery.id,))

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self._path, timeout=BUSY_SECONDS)) as database, database:
            yield database
