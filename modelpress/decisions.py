"""What gates decided, kept beside the packs: who let which bytes be served, by which conditions, on which numbers.

Each decision is an object of its own, `packs/<name>/decisions/<pack>/<sha256>.json`, named by the sha256 of its bytes
and created only if absent. None is ever changed; refusals are kept as well as promotions, and an override with the name
of who gave it. It holds the pack's name and digest, so that it counts for no other, and is signed as pointer entries
are where there is a key to sign with. Decisions outlive their packs.

One that was deleted later is missed: a pointer's entry that a gate wrote holds the digest of its decision, and each
decision holds the digests of those that came right before it, on any pack of the name (`before`). That is mostly one;
two, where two gates judged at a time. What nobody can miss is the end of this chain: refusals that were deleted before
the next decision was made.

A reader with a trust file counts a decision only where a key that may move aliases signed it.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import AwareDatetime, Field, StringConstraints, model_validator

from modelpress import keys
from modelpress.errors import FormatError, NotFoundError, TrustError
from modelpress.housekeeping.turns import who
from modelpress.pointer import Pointer
from modelpress.reports import Decision
from modelpress.store.base import ObjectInfo, Store, put_once
from modelpress.trust import entries as trusted
from modelpress.trust.entries import DECISION_TYPE, Entry, EntrySignature

FORMAT_VERSION: Final = 2
"""The newest version that is read, and the one that is written. The first has no `before`."""
MAX_RECORD_BYTES = 2**20
PAGE = 50
"""Decisions that `kept` reads at once unless it is told otherwise."""
RECENT = 16
"""Of the newest decisions, how many a new one looks at for those that came right before it. More judgements of one
name at the same time than this leave some unchained."""
RECORD = "record"
"""Key in a pointer entry's decision: the digest of the kept one."""

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Record(Entry):
    """One decision, and what it rests on; its digest is its name."""

    what: ClassVar[str] = "decision"
    payload_type: ClassVar[str] = DECISION_TYPE
    newest_version: ClassVar[int] = FORMAT_VERSION

    format_version: Literal[1, 2] = FORMAT_VERSION
    """Version of this layout."""
    before: Annotated[tuple[Digest, ...], Field(max_length=RECENT)] | None = None
    """Digests of the decisions on packs of this name that came right before, sorted; None, and not spelled, in
    version 1."""
    name: str
    """Name of the pack."""
    pack: Digest
    """Digest of what was judged."""
    alias: str
    """The pointer that was at stake."""
    champion: Digest | None
    """Digest of the pack that it was judged against; None where there was none."""
    after: int = Field(ge=0)
    """Number of the pointer's entry that stood; 0 for an empty log. A promotion is the next one, or came to nothing."""
    gate: dict[str, Any]
    """The conditions."""
    decision: Decision
    """What was decided, check by check, and who overrode it."""
    created: AwareDatetime
    """When, UTC."""
    who: str
    """User and host of the process that judged."""
    signature: EntrySignature | None = None
    """By whom it is signed; not spelled where nobody did."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not keys.is_name(self.name) or not keys.is_alias(self.alias):
            raise ValueError(f"{self.name!r}@{self.alias!r} is no alias of a pack")
        if (self.before is None) != (self.format_version == 1):
            raise ValueError(f"`before` is {self.before} in version {self.format_version}")
        if self.before is not None and list(self.before) != sorted(set(self.before)):
            raise ValueError("`before` is not sorted, or names one twice")
        return self

    def _spelled(self, without: set[str]) -> bytes:
        return super()._spelled(without | ({"before"} if self.before is None else set()))


@dataclass(frozen=True)
class Kept:
    """A decision that stands in a store, or should, for people who look through them."""

    key: str
    record: Record | None
    """None where it can't be read."""
    problem: FormatError | TrustError | NotFoundError | None
    """Why it does not count; None where it does, and where nothing is asked (there is no trust file)."""


@dataclass(frozen=True)
class Page:
    """Some of the decisions that a store has."""

    found: list[Kept]
    """The newest first; those that do not count as well."""
    gone: list[Kept]
    """Those that one of them names as the one before, and that are not there; their key has `*` for the pack."""
    older: str | None
    """To ask for the next page with; None: there is none."""


def keep(
    store: Store,
    name: str,
    pack: str,
    alias: str,
    decision: Decision,
    *,
    champion: str | None,
    after: int,
    gate: dict[str, Any],
) -> Record:
    """Write a decision beside its pack, signed with the store's key where it has one, and naming those before it.

    Raises:
        ConfigError: it is larger than `MAX_RECORD_BYTES`, as too many slices and metrics make it, or holds what no
            reader takes.
        ConflictError: other bytes stand under its name.
        StoreError: it can't be written.
    """
    doing = f"keeping the decision on {name}@{pack[:12]}"
    judged = Record(
        before=_newest(store, name),
        name=name,
        pack=pack,
        alias=alias,
        champion=champion,
        after=after,
        gate=gate,
        decision=decision,
        created=datetime.now(UTC),
        who=who(),
    )
    made, data = trusted.seal(judged, store.signer, MAX_RECORD_BYTES, doing)
    key = keys.decision(name, pack, made.digest)
    put_once(store, key, data, doing, expected="no object, or this decision", again="judge")
    return made


def read(store: Store, name: str, pack: str, record: str) -> Record:
    """One decision, held to its digest and to the store's trust.

    Raises:
        NotFoundError: there is none.
        CorruptionError: its bytes do not have this digest, are no decision, or one on another pack.
        UnsupportedFormatError: written by a newer modelpress.
        TrustError: the store has a trust file, and no key of it vouches for the decision.
    """
    found = _read(store, name, pack, record)
    trusted.admit(store, found, keys.decision(name, pack, record))
    return found


def kept(store: Store, name: str, pack: str = "", *, most: int = PAGE, older: str | None = None) -> Page:
    """Decisions on packs of a name, or on one pack, the newest first by the store's clock.

    All keys of the name are listed, and at most `most` decisions are read.

    Args:
        store: the publication store.
        name: of the packs.
        pack: digest of the one pack that is meant; empty: all of them.
        most: how many.
        older: `PACK/DECISION`, the digests of one of them: those that are older than it. None begins with the newest.

    Raises:
        NotFoundError: there is no decision `older` among them.
        StoreError: the store does not answer.
    """
    everything = sorted(_listed(store, name), key=lambda row: _age(row[1]), reverse=True)
    rows = [info for _, info in everything if info.key.startswith(keys.decisions(name, pack))]
    start = 0
    if older is not None:
        places = [number for number, info in enumerate(rows) if _cursor(name, info) == older]
        if not places:
            doing = f"looking for decisions on {name} in {store.uri} that are older than {older}"
            raise NotFoundError(doing, found="no such decision", expected="PACK/DECISION, the digests of one of them")
        start = places[0] + 1
    page = rows[start : start + most]
    found = [one for info in page if (one := _looked_at(store, name, info)) is not None]
    found.sort(key=lambda one: (one.record is not None, one.record.created if one.record else _EVER), reverse=True)
    gone = _gone(name, found, {record for record, _ in everything})
    return Page(found, gone, _cursor(name, page[-1]) if page and start + most < len(rows) else None)


def unkept(store: Store, name: str, entries: Iterable[Pointer]) -> dict[int, str]:
    """By number, the entries of a pointer's log whose decision is not there any more, with its digest.

    Raises:
        StoreError: the store does not answer.
    """
    named = {entry.number: record for entry in entries if (record := named_by(entry)) is not None}
    there = {info.key for _, info in _listed(store, name)} if named else set()
    packs = {entry.number: entry.pack for entry in entries}
    return {number: one for number, one in named.items() if keys.decision(name, packs[number], one) not in there}


def named_by(entry: Pointer) -> str | None:
    """Digest of the kept decision that a pointer's entry rests on; None where it names none."""
    record = (entry.decision or {}).get(RECORD)
    return record if isinstance(record, str) and keys.is_digest(record) else None


_EVER = datetime.min.replace(tzinfo=UTC)


def _age(info: ObjectInfo) -> tuple[datetime, str]:
    return info.modified, info.key


def _cursor(name: str, info: ObjectInfo) -> str:
    return info.key.removeprefix(keys.decisions(name)).removesuffix(".json")


def _listed(store: Store, name: str) -> Iterator[tuple[str, ObjectInfo]]:
    """Digest and object of each decision on packs of a name."""
    for info in store.list(keys.decisions(name)):
        place = keys.place(info.key)
        if place is not None and place.kind == "decision":
            yield place.record, info


def _looked_at(store: Store, name: str, info: ObjectInfo) -> Kept | None:
    """A decision that was listed; None where it was deleted since."""
    place, record = keys.place(info.key), None
    assert place is not None
    try:
        record = _read(store, name, place.digest, place.record)
        trusted.admit(store, record, info.key)
    except NotFoundError:
        return None
    except (FormatError, TrustError) as error:
        return Kept(info.key, record, error)
    return Kept(info.key, record, None)


def _gone(name: str, found: list[Kept], there: Collection[str]) -> list[Kept]:
    """What those that count name as before them and is not there."""
    missed: dict[str, Kept] = {}
    for one in found:
        if one.record is None or one.problem is not None:  # whoever can write to the store could name anything
            continue
        for digest in set(one.record.before or ()).difference(there):
            key = f"{keys.decisions(name)}*/{digest}.json"
            problem = NotFoundError(f"looking for {key}", found=f"deleted: {one.record.digest[:12]} came after it")
            missed[digest] = Kept(key, None, problem)
    return [missed[digest] for digest in sorted(missed)]


def _newest(store: Store, name: str) -> tuple[str, ...]:
    """The decisions that no other one names as before it, among the newest that count."""
    recent = heapq.nlargest(RECENT, (info for _, info in _listed(store, name)), key=_age)
    records = [
        one.record
        for info in recent
        if (one := _looked_at(store, name, info)) is not None and one.record is not None and one.problem is None
    ]
    named = {digest for record in records for digest in record.before or ()}
    return tuple(sorted({record.digest for record in records} - named))


def _read(store: Store, name: str, pack: str, record: str) -> Record:
    """A decision that is what its key says; who vouches for it is not asked."""
    return trusted.read_beside(store, Record, keys.decision(name, pack, record), MAX_RECORD_BYTES)
