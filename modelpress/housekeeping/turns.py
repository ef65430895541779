"""Collectors take turns: one may delete at a time, in rounds that are short, and writers wait for a round to end.

A round is an object `collections/<number>.json`, created only if absent; the highest number is the one that counts. A
collector goes on by creating the next number, so it finds out when another took over; `<number>.ended` says that it is
over. Nothing is ever written twice, so a request that arrives late changes nothing.

Deletes are begun in the first `ROUND_SECONDS` of a round, by a clock that runs on while the machine sleeps. A round
counts as over when its lease has expired by the store's own clock: later than any delete of it is answered, by
`MARGIN_SECONDS`. So no two machines' clocks are compared.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import socket
import time
import uuid
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modelpress import keys, strictjson
from modelpress.errors import ConflictError, CorruptionError, NotFoundError, StoreError, UnsupportedFormatError
from modelpress.manifest import canonical_json
from modelpress.progress import Progress, silent
from modelpress.store.base import Store, get_capped
from modelpress.store.clock import awake

FORMAT_VERSION = 1
ROUND_SECONDS = 60.0
"""Deletes are begun this long after a round began, and no longer."""
MARGIN_SECONDS = 120.0
"""How long after a caller gave a request up the store may still act on it."""
MAX_LEASE_SECONDS = 24 * 3600.0
MAX_TURN_BYTES = 2**16
POLL_SECONDS = 0.2
MAX_POLL_SECONDS = 5.0

Document = TypeVar("Document", bound="Stated")


class Stated(BaseModel):
    """Base of the small documents by which writers and collectors tell each other what they do."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    format_version: int = FORMAT_VERSION
    """Version of this layout."""
    who: str
    """User and host."""
    created: datetime
    """When, by the writer's own clock: for people alone."""

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return canonical_json(self.model_dump(mode="json"))


class Turn(Stated):
    """One round of one collector."""

    number: int = Field(ge=1)
    """Its number."""
    token: str
    """Names the round: a request that was sent twice meets its own object and knows it."""
    lease_seconds: float = Field(gt=0, le=MAX_LEASE_SECONDS)
    """When it counts as over, from the time at which its object was written."""


class Lease:
    """A collector's right to delete, in rounds. Use it as a context: it is released at the end, unless a delete was
    begun whose answer is not known; then it expires."""

    def __init__(self, store: Store, what: str) -> None:
        self.store, self._what = store, what
        self._number, self._began = 0, 0.0
        self.uncertain = False
        """Set this before a delete is begun, and take it back when all have been answered."""

    def __enter__(self) -> Lease:
        """Begin the first round.

        Raises:
            ConflictError: another collector is at work.
        """
        number, ended = _highest(self.store)
        if number and not ended and (other := _live(self.store, number)) is not None:
            raise self._lost(other)
        self._begin(number + 1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.uncertain:
            return
        with contextlib.suppress(StoreError):  # then it expires
            self.store.put(keys.turn(self._number, ended=True), b"", if_absent=True)

    def next_round(self) -> None:
        """Begin the next round: from here on, what writers say has to be read anew.

        Raises:
            ConflictError: this lease expired, and another collector took over.
        """
        assert not self.uncertain
        self._begin(self._number + 1)

    def holds(self) -> bool:
        """Whether a delete may be begun now."""
        return awake() - self._began < ROUND_SECONDS

    def now(self) -> datetime:
        """The store's clock, when this round began."""
        return self._modified

    def _begin(self, number: int) -> None:
        began = awake()
        lease = ROUND_SECONDS + self.store.patience_seconds + MARGIN_SECONDS
        turn = Turn(who=who(), created=datetime.now(UTC), number=number, token=uuid.uuid4().hex, lease_seconds=lease)
        key, data = keys.turn(number), turn.to_bytes()
        mine = self.store.put(key, data, if_absent=True) or self.store.get(key) == data
        highest, _ = _highest(self.store)
        info = self.store.info(key)
        if not mine or highest != number or info is None:
            # A number that was cleaned up was free again, and is not the highest: no harm, but no lease.
            raise self._lost(None)
        self._number, self._began, self._modified = number, began, info.modified
        for older in self.store.list(keys.COLLECTIONS):
            if (found := keys.turn_number(older.key)) is not None and found[0] < number:
                self.store.delete(older.key)

    def _lost(self, other: Turn | None) -> ConflictError:
        found = "another one" if other is None else f"one by {other.who} since {other.created:%Y-%m-%d %H:%M} UTC"
        wait = f"; if it died, its lease ends by itself after {other.lease_seconds:.0f} s" if other else ""
        return ConflictError(
            f"{self._what} {self.store.uri}",
            found=f"{found} at work",
            expected="one collection at a time",
            fix=f"wait until it has ended{wait}",
        )


def pass_by(store: Store, doing: str, progress: Progress = silent) -> None:
    """Return when every collector that may delete from now on will read what is in the store now.

    Whoever calls this has written an intent before. If a round is under way, its collector may have read the intents
    before that; the next round, or the end of this one, is waited for: at most the lease of a round.

    Raises:
        CorruptionError: the turn that counts is not readable.
        UnsupportedFormatError: it was written by a newer modelpress.
    """
    first, ended = _highest(store)
    if not first or ended or (turn := _live(store, first)) is None:
        return
    give_up, pause = awake() + turn.lease_seconds + MARGIN_SECONDS, POLL_SECONDS
    while awake() < give_up:  # by then it has expired by any clock
        progress(0, 0, f"{doing}: waiting for a round of the collection by {turn.who}")
        time.sleep(pause)
        pause = min(MAX_POLL_SECONDS, pause * 1.5)
        number, ended = _highest(store)
        if number != first or ended or _live(store, first) is None:
            return


def store_time(store: Store) -> datetime:
    """The store's own clock, by writing a small object and looking at its time."""
    key = f"doctor/{uuid.uuid4().hex}"
    store.put(key, b"clock")
    try:
        info = store.info(key)
    finally:
        with contextlib.suppress(StoreError):
            store.delete(key)
    if info is None:
        raise CorruptionError(f"reading the clock of {store.uri}", found="no object where one was written")
    return info.modified


def who() -> str:
    """User and host, for people who look at the store."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user id without a name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"


def parse(cls: type[Document], data: bytes, doing: str) -> Document:
    """Read what `Stated.to_bytes` wrote.

    Raises:
        CorruptionError: it is not that.
        UnsupportedFormatError: it was written by a newer modelpress.
    """
    document = strictjson.loads(data, doing)
    version = document.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UnsupportedFormatError(
            doing, found=f"format version {version}", expected=f"at most {FORMAT_VERSION}", fix="update modelpress"
        )
    try:
        return cls.model_validate(document)
    except ValidationError as error:
        raise CorruptionError(
            doing,
            found=f"sha256 {hashlib.sha256(data).hexdigest()}: {error.errors(include_url=False)[0]['msg']}",
            expected=f"a {cls.__name__.lower()} as modelpress writes it",
            fix="find out what wrote it; delete it only when no upload and no collection runs",
        ) from error


def _highest(store: Store) -> tuple[int, bool]:
    """Number of the round that counts (0: none), and whether it is over."""
    found = sorted(number for info in store.list(keys.COLLECTIONS) if (number := keys.turn_number(info.key)))
    return found[-1] if found else (0, False)


def _live(store: Store, number: int) -> Turn | None:
    """The round, unless its lease has expired by the store's clock, or a later one has swept it away."""
    key = keys.turn(number)
    info = store.info(key)
    if info is None:
        return None
    try:
        turn = parse(Turn, get_capped(store, key, MAX_TURN_BYTES, f"reading {store.uri}/{key}"), f"reading {key}")
    except NotFoundError:
        return None
    return turn if store_time(store) - info.modified <= timedelta(seconds=turn.lease_seconds) else None
