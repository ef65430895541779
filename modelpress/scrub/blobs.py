"""Every byte of every blob, in the order of the keys, from where an earlier run stopped."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from modelpress import keys
from modelpress.errors import CorruptionError, NotFoundError
from modelpress.progress import Progress
from modelpress.reports.scrub import Finding, ScrubState
from modelpress.scrub.survey import Survey, of
from modelpress.store.base import ObjectInfo, Store

RANGE_BYTES = 8 * 2**20
SAVE_SECONDS = 10.0
"""Between two savings of the state: what a killed run reads again."""


@dataclass
class Counted:
    """What a run saw of the blobs."""

    state: ScrubState
    blobs: int
    blob_bytes: int
    findings: list[Finding]
    """Of the listing: foreign, missing and unreferenced objects. What is damaged stands in the state."""


def read_blobs(
    store: Store,
    found: Survey,
    state: ScrubState,
    save: Callable[[ScrubState], None],
    bytes_per_second: int,
    progress: Progress,
) -> Counted:
    """Read the blobs behind `state.after`, and those that were damaged when they were read last.

    Raises:
        StoreError: the store does not answer; the state was saved before.
    """
    counted = Counted(state, 0, 0, [])
    missing = dict(found.wanted)
    reader = _Reader(store, _Pace(bytes_per_second), state, save, progress)
    total = sum(info.size_bytes for info in store.list(keys.BLOBS))
    try:
        for info in store.list(keys.BLOBS):
            digest = info.key.removeprefix(keys.BLOBS)
            if not keys.is_digest(digest):
                problem = "blobs are named by their sha256"
                counted.findings.append(Finding(kind="foreign", key=info.key, pack="", problem=problem))
                continue
            counted.blobs, counted.blob_bytes = counted.blobs + 1, counted.blob_bytes + info.size_bytes
            wanted = missing.pop(digest, None)
            if wanted is None:
                problem = f"no pack lists these {info.size_bytes:,} bytes"
                counted.findings.append(Finding(kind="unreferenced", key=info.key, pack="", problem=problem))
            reader.read(info, digest, wanted[0] if wanted else None, of(wanted[1]) if wanted else "")
            progress(counted.blob_bytes, total, f"blob {digest[:12]}")
    finally:
        reader.save()
    reader.finish()
    counted.state = reader.state
    for digest, (size, place) in missing.items():
        if store.info(keys.manifest(place.name, place.digest)) is None or store.info(keys.blob(digest)) is not None:
            continue  # a pack that was removed, or published again, since it was read
        problem = f"no object, and the pack needs its {size:,} bytes"
        counted.findings.append(Finding(kind="missing", key=keys.blob(digest), pack=of(place), problem=problem))
    return counted


class _Reader:
    """Reads blobs, and keeps how far it came."""

    def __init__(
        self, store: Store, pace: _Pace, state: ScrubState, save: Callable[[ScrubState], None], progress: Progress
    ) -> None:
        self.state = state.model_copy(update={"damaged": ()})
        self._store, self._pace, self._save, self._progress = store, pace, save, progress
        self._again = {finding.key: finding for finding in state.damaged}
        """Damaged when they were read last: they stand in the state until they are read again."""
        self._saved = time.monotonic()

    def read(self, info: ObjectInfo, digest: str, size: int | None, pack: str) -> None:
        """One blob, unless it was read in this pass and was in order."""
        again = self._again.pop(info.key, None)
        if info.key <= self.state.after and again is None:
            return
        try:
            problem = self._problem(info, digest, size)
        except NotFoundError:  # deleted since it was listed
            return
        damaged = self.state.damaged
        if problem is not None:
            damaged = (*damaged, Finding(kind="damaged", key=info.key, pack=pack, problem=problem))
        self.state = self.state.model_copy(
            update={
                "after": max(self.state.after, info.key),
                "seen": datetime.now(UTC),
                "read_blobs": self.state.read_blobs + 1,
                "read_bytes": self.state.read_bytes + info.size_bytes,
                "damaged": damaged,
            }
        )
        if time.monotonic() - self._saved >= SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Keep the state as it is."""
        damaged = (*self.state.damaged, *self._again.values())
        self._save(self.state.model_copy(update={"damaged": damaged}))
        self._saved = time.monotonic()

    def finish(self) -> None:
        """The pass is over. Damaged blobs that are no longer there are none."""
        self._again.clear()
        self.state = self.state.model_copy(update={"finished": datetime.now(UTC)})
        self.save()

    def _problem(self, info: ObjectInfo, digest: str, size: int | None) -> str | None:
        if size is not None and info.size_bytes != size:
            return f"{info.size_bytes:,} bytes, and its pack says {size:,}"
        found = hashlib.sha256()
        for start in range(0, info.size_bytes, RANGE_BYTES):
            length = min(RANGE_BYTES, info.size_bytes - start)
            try:
                found.update(self._store.get(info.key, start, length))
            except CorruptionError as error:
                return f"it can't be read whole: {error.found}"
            self._pace.took(length)
        return None if found.hexdigest() == digest else f"its bytes have the sha256 {found.hexdigest()}"


class _Pace:
    """Holds reading back to so many bytes a second, on the whole run's average."""

    def __init__(self, bytes_per_second: int) -> None:
        self._rate, self._bytes, self._started = bytes_per_second, 0, time.monotonic()

    def took(self, count: int) -> None:
        """Wait until so many bytes more were allowed."""
        self._bytes += count
        if self._rate > 0:
            time.sleep(max(0.0, self._started + self._bytes / self._rate - time.monotonic()))
