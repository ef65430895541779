"""An alias of a pack as an append-only log: who is `champion`, since when, why, and who was before.

Every entry is its own object, created only if absent, so that a store needs no conditional overwrite (not every S3
server has it) and the log is the audit. The highest number is current. Each entry carries the digest of the one
before it: `history` finds out an entry that was changed or removed later, unless it was the newest, and `current`
reads the newest alone. The newest is missed by whoever saw it before: a server refuses a log that got shorter.

With a key to sign with, entries are signed (version 2): over name, alias, number and the digest of the entry before,
so that none can be replayed elsewhere. A reader with a trust file takes no other, and keeps on disk how far it saw the
log: what it reads next must go on from there.
"""

from __future__ import annotations

import json
import random
import time
import uuid
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import model_validator

from modelpress import keys
from modelpress.errors import ConfigError, ConflictError, CorruptionError, LogCutError, NotFoundError
from modelpress.housekeeping.intents import Announcement, announced
from modelpress.housekeeping.turns import who
from modelpress.store.base import Store, get_capped, stands
from modelpress.trust import check_pack
from modelpress.trust import entries as trusted
from modelpress.trust.entries import PAYLOAD_TYPE, Entry, EntrySignature
from modelpress.trust.seen import Mark

if TYPE_CHECKING:
    from modelpress.trust import Signer

FORMAT_VERSION = 2
"""The newest version that is read. An entry without a signature is written as version 1."""
MAX_ENTRY_BYTES = 2**20
MAX_RACES = 20
PROMOTE = "promote"
"""Reason of an entry that a passed gate let through."""
OVERRIDE = "override"
"""The same of one that a person asked for although the gate did not let it through."""
ROLLBACK = "rollback"
RENEWAL = "renewal"
"""Reason of an entry that names the same pack as the one before, under another signature."""


class Pointer(Entry):
    """One entry of an alias's log; its digest is what the next entry's `previous` holds."""

    what: ClassVar[str] = "pointer entry"
    payload_type: ClassVar[str] = PAYLOAD_TYPE
    newest_version: ClassVar[int] = FORMAT_VERSION

    format_version: int = 1
    """Version of this layout: 2 where it is signed."""
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
    """User and host that appended it; before them, who asked, where that is another."""
    token: str
    """Names the attempt: a retry that carries it meets its own earlier entry instead of adding one."""
    signature: EntrySignature | None = None
    """By whom it is signed; None, and not spelled, in version 1."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.signature is not None) != (self.format_version > 1):
            raise ValueError(f"version {self.format_version} {'with' if self.signature else 'without'} a signature")
        return self

    def signed(self, signer: Signer | None) -> Self:
        """This entry with a signature, in version 2; as it is where there is no signer."""
        return self if signer is None else Entry.signed(self.model_copy(update={"format_version": 2}), signer)

    def _spelled(self, without: set[str]) -> bytes:  # it has its own spelling, in ASCII, from before the others
        document = self.model_dump(mode="json", exclude=without)
        return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


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
    accepted: Store | None = None,
    by: str | None = None,
) -> Pointer:
    """Point `alias` at `pack` by one more entry, and tell the servers that the store's settings name.

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
        accepted: the same store, held to what counts as the log for this once: to leave entries of a revoked key.
        by: who asked for it, where that is not who runs this process.

    Raises:
        NotFoundError: no manifest of this digest is published under `name`.
        ConflictError: `after` is not the last entry any more, or the race was lost too often.
        ConfigError: the entry, with its decision, is larger than `MAX_ENTRY_BYTES`.
        TrustError: no reader with this trust would take the pack, or an entry that is signed by this store's key.
    """
    check_may_append(store, name, alias)
    if store.trust is not None:
        check_pack(store, store.trust.policy(), name, pack)
    keys.pointer(name, alias, 1), keys.manifest(name, pack)  # legal names, or nothing is written
    with announced(store, name, pack) as announcement:  # so that retention keeps it
        made = _append(store, name, alias, pack, reason, decision, after, token, accepted or store, announcement, by)
    if store.nudger is not None:
        store.nudger.tell(name, alias)
    return made


def _append(
    store: Store,
    name: str,
    alias: str,
    pack: str,
    reason: str,
    decision: dict[str, Any] | None,
    after: int | None,
    token: str | None,
    accepted: Store,
    announcement: Announcement,
    by: str | None,
) -> Pointer:
    _check_published(store, name, alias, pack)
    if token is not None:
        for entry in history(accepted, name, alias):
            if entry.token == token:
                return entry
    for attempt in range(MAX_RACES):
        last = current(accepted, name, alias)
        number = last.number if last else 0
        if after is not None and number != after:
            raise ConflictError(
                f"moving {name}@{alias} to pack {pack}",
                found=f"entry {number} ({last.reason} to {last.pack} by {last.who})" if last else "an empty log",
                expected=f"entry {after} to be the last one, as it was when this was decided",
                fix="judge again against the champion that stands now",
            )
        entry = _next(last, name, alias, pack, reason, decision, token, by).signed(store.signer)
        while not announcement.holds():  # it lay asleep for days: the pack may have been removed
            announcement.announce()
            _check_published(store, name, alias, pack)
        if _create(store, entry):
            return entry
        time.sleep(random.uniform(0, min(1.0, 0.02 * 2**attempt)))
    raise ConflictError(
        f"moving {name}@{alias} to pack {pack}",
        found=f"{MAX_RACES} lost races for the next entry",
        fix="find out who moves this alias all the time, then run it again",
    )


def _check_published(store: Store, name: str, alias: str, pack: str) -> None:
    if store.info(keys.manifest(name, pack)) is None:
        raise NotFoundError(
            f"pointing {name}@{alias} at pack {pack}",
            found=f"no manifest {store.uri}/{keys.manifest(name, pack)}",
            fix="publish the pack first; `modelpress inspect` shows what is published",
        )


def renew(store: Store, accepted: Store, name: str, alias: str) -> Pointer | None:
    """Sign what an alias points at again, by one more entry for the same pack; None when the alias was never set.

    Args:
        store: the publication store, with the key to sign with.
        accepted: the same store, held to what counts for this once: no trust at all, or a pardoned key.
        name: pack name.
        alias: the alias.

    Raises:
        ConflictError: the alias was moved by someone else meanwhile.
        TrustError: the entry that stands is not accepted, or the pack, or our own key.
        CorruptionError: the log is broken.
    """
    entries = history(accepted, name, alias)
    if not entries:
        return None
    last = entries[-1]
    return append(store, name, alias, last.pack, RENEWAL, after=last.number, accepted=accepted)


def check_may_append(store: Store, name: str, alias: str) -> None:
    """Refuse to move an alias, before anything else is done for it, where no reader would take the entry.

    Raises:
        TrustError: there is a trust file, and the key to sign with is none of it, or there is no key.
    """
    if store.trust is not None:
        trusted.check_may_sign(store.trust.policy(), store.signer, name, f"moving {name}@{alias}")


def current(store: Store, name: str, alias: str) -> Pointer | None:
    """The highest entry; None when the alias was never set.

    Raises:
        CorruptionError: the entry is not what its key says.
        UnsupportedFormatError: it was written by a newer modelpress.
        TrustError: the store has a trust file, and no key of it vouches for the entry.
        LogCutError: with a trust file: the log does not go on from what was seen before.
    """
    mark = store.trust.seen.read(store.uri, name, alias) if store.trust else None  # before the log: it only grows
    numbers = _numbers(store, name, alias)
    entry = _read(store, name, alias, numbers[-1]) if numbers else None
    _admit(store, entry, mark)
    return entry


def _admit(store: Store, entry: Pointer | None, mark: Mark | None) -> None:
    """Hold the newest entry to the store's trust, and to what was seen of the log before."""
    if store.trust is None:
        return
    if entry is not None:
        trusted.admit(store, entry, keys.pointer(entry.name, entry.alias, entry.number))
    if mark is not None:
        _check_goes_on(store, entry, mark)
    if entry is not None and (mark is None or entry.number > mark.number):
        new = Mark(store=store.uri, name=entry.name, alias=entry.alias, number=entry.number, entry=entry.digest)
        store.trust.seen.note(new)


def _check_goes_on(store: Store, entry: Pointer | None, mark: Mark) -> None:
    """The log from the newest entry back to the one that was seen, link by link.

    Raises:
        LogCutError: it does not lead there.
    """
    number, digest = (entry.number, entry.digest) if entry else (0, None)
    while entry is not None and number > mark.number:
        number, digest = number - 1, entry.previous
        if number > mark.number:
            entry = _read(store, mark.name, mark.alias, number)
            if entry.digest != digest:
                break
    if (number, digest) != (mark.number, mark.entry):
        raise LogCutError(
            f"following the log of {mark.name}@{mark.alias} on {store.uri}",
            found=f"entry {number} (sha256 {digest})" if entry else "an empty log",
            expected=f"entry {mark.number} (sha256 {mark.entry}), which was seen here before, or later ones after it",
            fix="find out who changed the log, and restore it; `modelpress trust forget` takes it as it is",
        )


def entry(store: Store, name: str, alias: str, number: int) -> Pointer:
    """One entry, its signature checked where the store has a trust file. Its place in the log is not looked at.

    Raises:
        NotFoundError: there is none of this number.
        CorruptionError: it is not what its key says.
        TrustError: the store has a trust file, and no key of it vouches for the entry.
    """
    found = _read(store, name, alias, number)
    trusted.admit(store, found, keys.pointer(name, alias, number))
    return found


def history(store: Store, name: str, alias: str) -> list[Pointer]:
    """All entries, oldest first, with the chain of digests verified.

    With a trust file the newest entry's signature must count: it vouches for the chain before it, whose own signatures
    may be by keys that were revoked since, or missing.

    Raises:
        CorruptionError: an entry is missing or was changed after it was written.
        UnsupportedFormatError: an entry was written by a newer modelpress.
        TrustError, LogCutError: see `current`.
    """
    mark = store.trust.seen.read(store.uri, name, alias) if store.trust else None
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
    _admit(store, entries[-1] if entries else None, mark)
    return entries


def rollback(
    store: Store,
    name: str,
    alias: str,
    to: str | None = None,
    *,
    token: str | None = None,
    accepted: Store | None = None,
    by: str | None = None,
) -> Pointer:
    """Point `alias` back by one more entry: at pack `to`, or at the one that stood before the current pack.

    Rollbacks in a row go further back, not to and fro: after A, B, C, the first returns to B and the second to A. A
    retry that carries the `token` of the first attempt meets its entry, and goes no further. `accepted`, `by`: see
    `append`.

    Raises:
        NotFoundError: there is nothing to go back to.
        ConflictError: the alias was moved by someone else meanwhile.
    """
    entries = history(accepted or store, name, alias)
    for entry in entries:
        if token is not None and entry.token == token:
            return entry
    back = standing(entries)
    if to is None and len(back) < 2:
        found = f"only pack {back[0]}" if back else "an alias that was never set"
        raise NotFoundError(f"rolling back {name}@{alias}", found=found, expected="an earlier pack to go back to")
    pack = to or back[-2]
    return append(store, name, alias, pack, ROLLBACK, after=len(entries), token=token, accepted=accepted, by=by)


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


def _next(
    last: Pointer | None,
    name: str,
    alias: str,
    pack: str,
    reason: str,
    decision: dict[str, Any] | None,
    token: str | None,
    by: str | None,
) -> Pointer:
    return Pointer(
        name=name,
        alias=alias,
        number=last.number + 1 if last else 1,
        pack=pack,
        previous=last.digest if last else None,
        reason=reason,
        decision=decision,
        created=datetime.now(UTC),
        who=f"{by} by {who()}" if by else who(),
        token=token or uuid.uuid4().hex,
    )


def _create(store: Store, entry: Pointer) -> bool:
    """Create the entry's object; True also when it is there already, byte for byte: our own write, whose answer was
    lost and which the client sent again."""
    key, data = keys.pointer(entry.name, entry.alias, entry.number), entry.to_bytes()
    if len(data) > MAX_ENTRY_BYTES:
        raise ConfigError(
            f"writing {key}", found=f"{len(data)} bytes", expected=f"at most {MAX_ENTRY_BYTES}: a shorter decision"
        )
    return store.put(key, data, if_absent=True) or stands(store, key, data)


def _numbers(store: Store, name: str, alias: str) -> list[int]:
    found = (keys.pointer_number(info.key) for info in store.list(keys.pointers(name, alias)))
    return sorted(number for number in found if number is not None)


def _read(store: Store, name: str, alias: str, number: int) -> Pointer:
    key = keys.pointer(name, alias, number)
    doing = f"reading pointer {store.uri}/{key}"
    data = get_capped(store, key, MAX_ENTRY_BYTES, doing)
    entry = trusted.parse(data, Pointer, doing)
    if (entry.name, entry.alias, entry.number) != (name, alias, number):
        raise CorruptionError(
            doing, found=f"entry {entry.number} of {entry.name}@{entry.alias}", expected="the entry that the key names"
        )
    return entry
