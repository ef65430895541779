"""An alias of a pack as an append-only log: who is `champion`, since when, why, and who was before.

Every entry is its own object, created only if absent, so that a store needs no conditional overwrite (not every S3
server has it) and the log is the audit. The highest number is current. Each entry carries the digest of the one
before it: `history` finds out an entry that was changed or removed later, unless it was the newest, and `current`
reads the newest alone. The newest is missed by whoever saw it before: a server refuses a log that got shorter.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import random
import socket
import time
import uuid
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from modelpress import keys, strictjson
from modelpress.errors import ConfigError, ConflictError, CorruptionError, NotFoundError, UnsupportedFormatError
from modelpress.housekeeping.intents import announced
from modelpress.store.base import Store, get_capped

FORMAT_VERSION = 1
MAX_ENTRY_BYTES = 2**20
MAX_RACES = 20
ROLLBACK = "rollback"


class Pointer(BaseModel):
    """One entry of an alias's log."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    format_version: int = FORMAT_VERSION
    """Version of this layout."""
    name: str
    """Pack name."""
    alias: str
    """The alias."""
    number: int
    """Position in the log, from 1."""
    pack: str
    """Digest of the manifest that the alias points at from here on."""
    previous: str | None
    """sha256 (hex) of the bytes of the entry before; None for the first."""
    reason: str
    """Why: `promote`, `rollback`, or the caller's own word."""
    decision: dict[str, Any] | None = None
    """What the gate decided, when a gate did."""
    created: datetime
    """When, UTC."""
    who: str
    """User and host that appended it."""
    token: str
    """Names the attempt: a retry that carries it meets its own earlier entry instead of adding one."""

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":")).encode()

    @property
    def digest(self) -> str:
        """sha256 (hex) of `to_bytes`: what the next entry's `previous` holds."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def append(
    store: Store,
    name: str,
    alias: str,
    pack: str,
    reason: str,
    decision: dict[str, Any] | None = None,
    *,
    after: int | None = None,
    token: str | None = None,
) -> Pointer:
    """Point `alias` at `pack` by one more entry.

    Args:
        store: the publication store.
        name: pack name.
        alias: the alias to move.
        pack: digest of a published manifest of `name`.
        reason: `promote`, `rollback` or another word for the audit.
        decision: the gate's decision, as JSON.
        after: number of the entry that the caller's decision rests on (0 for an empty log); the append is refused
            if another entry came since.
        token: names the attempt over retries, also those of a restarted process; an entry with this token is returned
            as it is. By default each call is an attempt of its own.

    Raises:
        NotFoundError: no manifest of this digest is published under `name`.
        ConflictError: `after` is not the last entry any more, or the race was lost too often.
        ConfigError: the entry, with its decision, is larger than `MAX_ENTRY_BYTES`.
    """
    keys.pointer(name, alias, 1), keys.manifest(name, pack)  # legal names, or nothing is written
    with announced(store, name, pack):  # so that retention keeps it
        return _append(store, name, alias, pack, reason, decision, after, token)


def _append(
    store: Store,
    name: str,
    alias: str,
    pack: str,
    reason: str,
    decision: dict[str, Any] | None,
    after: int | None,
    token: str | None,
) -> Pointer:
    if store.info(keys.manifest(name, pack)) is None:
        raise NotFoundError(
            f"pointing {name}@{alias} at pack {pack}",
            found=f"no manifest {store.uri}/{keys.manifest(name, pack)}",
            fix="publish the pack first; `modelpress inspect` shows what is published",
        )
    if token is not None:
        for entry in history(store, name, alias):
            if entry.token == token:
                return entry
    for attempt in range(MAX_RACES):
        last = current(store, name, alias)
        number = last.number if last else 0
        if after is not None and number != after:
            raise ConflictError(
                f"moving {name}@{alias} to pack {pack}",
                found=f"entry {number} ({last.reason} to {last.pack} by {last.who})" if last else "an empty log",
                expected=f"entry {after} to be the last one, as it was when this was decided",
                fix="judge again against the champion that stands now",
            )
        entry = Pointer(
            name=name,
            alias=alias,
            number=number + 1,
            pack=pack,
            previous=last.digest if last else None,
            reason=reason,
            decision=decision,
            created=datetime.now(UTC),
            who=_who(),
            token=token or uuid.uuid4().hex,
        )
        if _create(store, entry):
            return entry
        time.sleep(random.uniform(0, min(1.0, 0.02 * 2**attempt)))
    raise ConflictError(
        f"moving {name}@{alias} to pack {pack}",
        found=f"{MAX_RACES} lost races for the next entry",
        fix="find out who moves this alias all the time, then run it again",
    )


def current(store: Store, name: str, alias: str) -> Pointer | None:
    """The highest entry; None when the alias was never set.

    Raises:
        CorruptionError: the entry is not what its key says.
        UnsupportedFormatError: it was written by a newer modelpress.
    """
    numbers = _numbers(store, name, alias)
    return _read(store, name, alias, numbers[-1]) if numbers else None


def history(store: Store, name: str, alias: str) -> list[Pointer]:
    """All entries, oldest first, with the chain of digests verified.

    Raises:
        CorruptionError: an entry is missing or was changed after it was written.
        UnsupportedFormatError: an entry was written by a newer modelpress.
    """
    entries: list[Pointer] = []
    for number in _numbers(store, name, alias):
        entry = _read(store, name, alias, number)
        expected = entries[-1].digest if entries else None
        if number != len(entries) + 1 or entry.previous != expected:
            raise CorruptionError(
                f"following the log of {name}@{alias} at entry {number}",
                found=f"previous {entry.previous}",
                expected=f"entry {len(entries) + 1} with previous {expected}",
                fix="an entry was removed or changed; compare with the object store's own audit log",
            )
        entries.append(entry)
    return entries


def rollback(store: Store, name: str, alias: str, to: str | None = None, *, token: str | None = None) -> Pointer:
    """Point `alias` back by one more entry: at pack `to`, or at the one that stood before the current pack.

    Rollbacks in a row go further back, not to and fro: after A, B, C, the first returns to B and the second to A. A
    retry that carries the `token` of the first attempt meets its entry, and goes no further.

    Raises:
        NotFoundError: there is nothing to go back to.
        ConflictError: the alias was moved by someone else meanwhile.
    """
    entries = history(store, name, alias)
    for entry in entries:
        if token is not None and entry.token == token:
            return entry
    back = standing(entries)
    if to is None and len(back) < 2:
        found = f"only pack {back[0]}" if back else "an alias that was never set"
        raise NotFoundError(f"rolling back {name}@{alias}", found=found, expected="an earlier pack to go back to")
    return append(store, name, alias, to or back[-2], ROLLBACK, after=len(entries), token=token)


def standing(entries: list[Pointer]) -> list[str]:
    """The packs that a rollback can return to, newest last: promotions push, rollbacks cut back."""
    packs: list[str] = []
    for entry in entries:
        if packs and packs[-1] == entry.pack:
            continue
        if entry.reason == ROLLBACK and entry.pack in packs:
            while packs[-1] != entry.pack:
                packs.pop()
        else:
            packs.append(entry.pack)
    return packs


def _create(store: Store, entry: Pointer) -> bool:
    """Create the entry's object; True also when it is there already, byte for byte: our own write, whose answer was
    lost and which the client sent again."""
    key, data = keys.pointer(entry.name, entry.alias, entry.number), entry.to_bytes()
    if len(data) > MAX_ENTRY_BYTES:
        raise ConfigError(
            f"writing {key}", found=f"{len(data)} bytes", expected=f"at most {MAX_ENTRY_BYTES}: a shorter decision"
        )
    return store.put(key, data, if_absent=True) or store.get(key) == data


def _numbers(store: Store, name: str, alias: str) -> list[int]:
    found = (keys.pointer_number(info.key) for info in store.list(keys.pointers(name, alias)))
    return sorted(number for number in found if number is not None)


def _read(store: Store, name: str, alias: str, number: int) -> Pointer:
    key = keys.pointer(name, alias, number)
    doing = f"reading pointer {store.uri}/{key}"
    data = get_capped(store, key, MAX_ENTRY_BYTES, doing)
    document = strictjson.loads(data, doing)
    try:
        version = document["format_version"]
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise UnsupportedFormatError(
                doing, found=f"format version {version}", expected=f"at most {FORMAT_VERSION}", fix="update modelpress"
            )
        entry = Pointer.model_validate(document)
        same = entry.to_bytes() == data
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        found = str(error) if not isinstance(error, ValidationError) else str(error.errors(include_url=False)[0])
        raise CorruptionError(doing, found=found, expected="a pointer entry") from error
    if (entry.name, entry.alias, entry.number) != (name, alias, number) or not same:
        raise CorruptionError(
            doing, found=f"entry {entry.number} of {entry.name}@{entry.alias}", expected="the entry that the key names"
        )
    return entry


def _who() -> str:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user id without a name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"
