"""Whether anybody still waits for a job: what the run that handed it out says, and what its ranks make of that.

The run has no right to end ranks that others started, and does not know where they are. So it leaves a word in the
job's folder every few seconds, and another one when it goes without the result: cancelled, failed, told to stop. Ranks
look there, and end when they read that one, or when the run has said nothing for a while: it was killed. Clocks of
different machines are never compared: a word is new when it is another one than before.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator

from modelpress.errors import NotFoundError, StoreError
from modelpress.store.base import Store

BEAT, GONE = "waiting", "gone"
"""Keys in a job's folder."""
BEAT_SECONDS = 15.0
"""Between two words of the run."""
LOOK_SECONDS = 5.0
"""Between two looks of a rank."""
LEAST_PATIENCE_SECONDS = 60.0
"""Silence that a run may need for other things."""


class Beat:
    """The run's word that it waits."""

    def __init__(self, store: Store) -> None:
        self._store, self._run = store, uuid.uuid4().hex
        self._said, self._number = float("-inf"), 0

    def __call__(self) -> None:
        """Say it, unless that was just done.

        Raises:
            StoreError: the store did not take it.
        """
        now = time.monotonic()
        if now - self._said >= BEAT_SECONDS:
            self._number += 1
            self._store.put(BEAT, f"{self._run} {self._number}".encode())
            self._said = now


@contextlib.contextmanager
def waiting(store: Store) -> Iterator[Beat]:
    """Wait for ranks within this block; who leaves it by an exception tells them that nobody waits any more."""
    store.delete(GONE)  # of an attempt before
    beat = Beat(store)
    beat()
    came = False
    try:
        yield beat
        came = True
    finally:
        if not came:
            with contextlib.suppress(StoreError):  # then they find out by the silence
                store.put(GONE, b"the run that waited for it was cancelled, or failed")


class Watch:
    """What a rank knows of the run that waits for it.

    Args:
        store: the job's folder.
        patience: seconds of silence after which the run counts as gone.
        clock: seconds; of this process alone.
    """

    def __init__(self, store: Store, patience: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._patience, self._clock = store, patience, clock
        self._heard: bytes | None = None
        self._since = clock()

    def gone(self) -> str | None:
        """Why nobody waits for this job any more, after one look; None where somebody may.

        Who finds it out by the silence leaves the word for the others.
        """
        now = self._clock()
        try:
            told = _read(self._store, GONE)
            heard = _read(self._store, BEAT)
            if told is None and heard == self._heard and now - self._since >= self._patience:
                told = f"the run that waited for it has said nothing for {self._patience:g} s".encode()
                self._store.put(GONE, told)
        except StoreError:
            self._since = now  # the run could not say anything either
            return None
        if heard != self._heard:
            self._heard, self._since = heard, now
        return None if told is None else told.decode(errors="replace")


def _read(store: Store, key: str) -> bytes | None:
    try:
        return store.get(key)
    except NotFoundError:
        return None
