"""What writes to a store says first what it needs, so that a collection leaves it alone.

An intent lies under `uploads/<name>/<token>.json` from before its writer looks at what is there until after the
manifest (or the entry of an alias's log) stands, and is written again now and then: the time of its object says that
the writer lives. One that was not written again for as long as it says itself counts as abandoned.
"""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Collection, Iterator
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from pydantic import Field

from modelpress import keys
from modelpress.errors import NotFoundError, StoreError, StoreUnavailableError
from modelpress.housekeeping.turns import Stated, parse, pass_by, who
from modelpress.manifest import Sha256
from modelpress.progress import Progress, silent
from modelpress.settings import read_settings
from modelpress.store.base import Store, get_capped
from modelpress.store.clock import awake

MAX_INTENT_BYTES = 256 * 2**20
MAX_LIFE_SECONDS = 366 * 24 * 3600.0
BEAT_SECONDS = 900.0
"""An intent is written again this often, or ten times in its life."""


class Intent(Stated):
    """What one writer needs until it is done."""

    name: str
    """Pack name."""
    pack: Sha256
    """Digest of the manifest that is to stand, or to be pointed at."""
    base: Sha256 | None = None
    """Digest of the pack that it is stored as a difference to."""
    blobs: tuple[Sha256, ...] = ()
    """Every blob of the pack."""
    lives_seconds: float = Field(gt=0, le=MAX_LIFE_SECONDS)
    """How long it counts after it was written last."""


class Found(NamedTuple):
    """An intent in a store."""

    key: str
    intent: Intent
    modified: datetime
    size_bytes: int

    def lives(self, now: datetime) -> bool:
        """Whether it counts at `now`, by the store's clock."""
        return now - self.modified <= timedelta(seconds=self.intent.lives_seconds)


class Announcement:
    """An intent that stands in the store while its writer works."""

    def __init__(self, store: Store, intent: Intent, progress: Progress) -> None:
        self._store, self._intent, self._progress = store, intent, progress
        self._data, self._keys = intent.to_bytes(), list[str]()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._beat = threading.Thread(target=self._renew_until_ended, name="intent", daemon=True)
        self._renewed = 0.0

    def announce(self) -> None:
        """Write it, under a new name, and wait until every collector that may delete from now on will read it.

        Under its old name it may be taken for abandoned by a collection that is at work just now, and go.
        """
        with self._lock:
            self._keys.append(keys.intent(self._intent.name, uuid.uuid4().hex))
            self._renew()
        pass_by(self._store, f"writing {self._intent.name}", self._progress)

    def holds(self) -> bool:
        """Whether it was written lately enough to rest a commit on it. If not (the machine slept for days), what was
        there may be gone: `announce` again, and look again."""
        return awake() - self._renewed < self._intent.lives_seconds / 2

    def withdraw(self) -> None:
        """Take it back. If the store refuses, it ends by itself, later."""
        self._ended.set()
        if self._beat.is_alive():
            self._beat.join()  # or what it is writing now would stay
        with contextlib.suppress(StoreError):
            for key in self._keys:
                self._store.delete(key)

    def start(self) -> None:
        """Write it, and keep it alive from a thread of its own."""
        self.announce()
        self._beat.start()

    def stop(self) -> None:
        """Let it stand, and keep it alive no longer."""
        self._ended.set()

    def _renew(self) -> None:
        began = awake()
        self._store.put(self._keys[-1], self._data)
        self._renewed = began

    def _renew_until_ended(self) -> None:
        while not self._ended.wait(min(BEAT_SECONDS, self._intent.lives_seconds / 10)):
            with self._lock, contextlib.suppress(StoreError):  # `holds` tells when it was too often
                if self.holds():
                    self._renew()


@contextlib.contextmanager
def announced(
    store: Store,
    name: str,
    pack: str,
    *,
    base: str | None = None,
    blobs: Collection[str] = (),
    resumable: bool = False,
    progress: Progress = silent,
) -> Iterator[Announcement]:
    """Say what is needed while the body runs; look at what the store has only inside of it.

    Args:
        store: the publication store.
        name: pack name.
        pack: digest of the manifest.
        base: digest of the manifest that it is a difference to.
        blobs: every blob of the pack.
        resumable: after an error the intent stays, so that what was sent is there for the next run.
        progress: told while a collection is waited for.

    Raises:
        StoreError: see `modelpress.store.Store`.
        CorruptionError: a collector's turn is not readable.
    """
    lives = read_settings().upload_abandoned_days * 24 * 3600
    intent = Intent(
        who=who(),
        created=datetime.now(UTC),
        name=name,
        pack=pack,
        base=base,
        blobs=tuple(sorted(blobs)),
        lives_seconds=lives,
    )
    announcement = Announcement(store, intent, progress)
    try:
        announcement.start()
        yield announcement
    except BaseException as error:
        announcement.stop()
        # A store that does not answer is not asked again: that would be another deadline. The intent ends by itself.
        if not resumable and isinstance(error, Exception) and not isinstance(error, StoreUnavailableError):
            announcement.withdraw()
        raise
    announcement.withdraw()


def read_intents(store: Store) -> list[Found]:
    """Every intent in a store, living or not.

    Raises:
        CorruptionError: one is not readable, and may need anything.
        UnsupportedFormatError: one was written by a newer modelpress.
    """
    found = []
    for info in store.list(keys.UPLOADS):
        if keys.is_intent(info.key):
            doing = f"reading intent {store.uri}/{info.key}"
            with contextlib.suppress(NotFoundError):  # it was withdrawn since it was listed: what it needed stands
                intent = parse(Intent, get_capped(store, info.key, MAX_INTENT_BYTES, doing), doing)
                found.append(Found(info.key, intent, info.modified, info.size_bytes))
    return found
