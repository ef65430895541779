"""What runs did, kept beside the packs that they made: the numbers of each run, and the page that was drawn of them.

A run is two objects, each named by the sha256 of its bytes and created only if absent: the record,
`packs/<name>/runs/<pack>/<sha256>.json`, and its page, the same with `.html`. The record holds the pack's name and
digest, and its page's digest, and is signed as decisions are where there is a key to sign with, so that a signature
vouches for both. Times, speeds and machines are in it, which a manifest has none of: the same pack may have been
measured by several runs. They go with their pack.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Annotated, ClassVar, Final, Literal

from pydantic import AwareDatetime, StringConstraints

from modelpress import keys
from modelpress.errors import ConfigError, ConflictError, CorruptionError, FormatError, NotFoundError, TrustError
from modelpress.housekeeping.turns import who
from modelpress.reports import RunReport
from modelpress.store.base import Store, get_capped, stands
from modelpress.trust import entries as trusted
from modelpress.trust.entries import RUN_TYPE, Entry, EntrySignature

FORMAT_VERSION: Final = 1
MAX_RECORD_BYTES = 2**24
MAX_PAGE_BYTES = 2**24
MOST = 200
"""Runs of one pack that are read."""

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class RunRecord(Entry):
    """One run, as it is kept; its digest is its name."""

    what: ClassVar[str] = "run"
    payload_type: ClassVar[str] = RUN_TYPE
    newest_version: ClassVar[int] = FORMAT_VERSION

    format_version: Literal[1] = FORMAT_VERSION
    """Version of this layout."""
    name: str
    """Name of the pack."""
    pack: Digest
    """Digest of the pack."""
    run: RunReport
    """What the run did."""
    page: Digest
    """Digest of the page that was drawn when the run ended."""
    created: AwareDatetime
    """When, UTC."""
    who: str
    """User and host of the process that ran it."""
    signature: EntrySignature | None = None
    """By whom it is signed; not spelled where nobody did."""


@dataclass(frozen=True)
class KeptRun:
    """A record that stands in a store, for people who look through them."""

    key: str
    record: RunRecord | None
    """None where it can't be read."""
    problem: FormatError | TrustError | None
    """Why it does not count; None where it does, and where nothing is asked (there is no trust file)."""


def keep(store: Store, run: RunReport, page: bytes) -> RunRecord:
    """Keep a run that published, and its page, beside the pack; the page first, so that no record lacks its page.

    Raises:
        ConfigError: it published nothing, record or page are larger than `MAX_RECORD_BYTES`, `MAX_PAGE_BYTES`, or the
            record holds what no reader takes.
        ConflictError: other bytes stand under one of the names.
        StoreError: they can't be written.
    """
    doing = f"keeping the run of {run.name}"
    if run.pack is None:
        raise ConfigError(doing, found="a run that published nothing", expected="the digest of its pack")
    shown = hashlib.sha256(page).hexdigest()
    if len(page) > MAX_PAGE_BYTES:
        raise ConfigError(doing, found=f"a page of {len(page)} bytes", expected=f"at most {MAX_PAGE_BYTES}")
    record = RunRecord(name=run.name, pack=run.pack, run=run, page=shown, created=datetime.now(UTC), who=who())
    made, data = trusted.seal(record, store.signer, MAX_RECORD_BYTES, doing)
    for key, content in (
        (keys.page(run.name, run.pack, shown), page),
        (keys.run(run.name, run.pack, made.digest), data),
    ):
        if not store.put(key, content, if_absent=True) and not stands(store, key, content):
            raise ConflictError(
                doing,
                found=f"other bytes under {store.uri}/{key}",
                expected="no object, or these bytes",
                fix="the object was damaged or tampered with: keep it for inquiry, delete it, and run again",
            )
    return made


def read(store: Store, name: str, pack: str, record: str) -> RunRecord:
    """One record, held to its digest and to the store's trust.

    Raises:
        NotFoundError: there is none.
        CorruptionError: its bytes do not have this digest, are no record, or one of another pack.
        UnsupportedFormatError: written by a newer modelpress.
        TrustError: the store has a trust file, and no key of it vouches for the record.
    """
    found = read_unasked(store, name, pack, record)
    trusted.admit(store, found, keys.run(name, pack, record))
    return found


def read_page(store: Store, record: RunRecord) -> bytes:
    """The page of a record, held to its digest.

    Raises:
        NotFoundError: it is not there.
        CorruptionError: its bytes do not have the digest that the record says.
    """
    key = keys.page(record.name, record.pack, record.page)
    doing = f"reading the page {store.uri}/{key}"
    data = get_capped(store, key, MAX_PAGE_BYTES, doing)
    found = hashlib.sha256(data).hexdigest()
    if found != record.page:
        raise CorruptionError(doing, found=f"sha256 {found}", expected=f"sha256 {record.page}")
    return data


def kept(store: Store, name: str, pack: str) -> list[KeptRun]:
    """The first `MOST` records of one pack, the oldest first; those that do not count as well, unreadable ones first.

    Raises:
        StoreError: the store does not answer.
    """
    found = []
    for info in islice(store.list(keys.runs(name, pack)), 2 * MOST):
        place = keys.place(info.key)
        if place is None or place.kind != "run":
            continue
        record: RunRecord | None = None
        problem: FormatError | TrustError | None = None
        try:
            record = read_unasked(store, name, place.digest, place.record)
            trusted.admit(store, record, info.key)
        except NotFoundError:  # deleted since it was listed
            continue
        except (FormatError, TrustError) as error:
            problem = error
        found.append(KeptRun(info.key, record, problem))
    return sorted(found, key=lambda one: (one.record.created if one.record else _EVER, one.key))


def newest(store: Store, name: str, pack: str) -> RunReport | None:
    """The newest run of a pack that counts; None where there is none."""
    counting = [one.record for one in kept(store, name, pack) if one.record is not None and one.problem is None]
    return counting[-1].run if counting else None


_EVER = datetime.min.replace(tzinfo=UTC)


def read_unasked(store: Store, name: str, pack: str, record: str) -> RunRecord:
    """A record that is what its key says; who vouches for it is not asked.

    Raises:
        see `read`, but for TrustError.
    """
    return trusted.read_beside(store, RunRecord, keys.run(name, pack, record), MAX_RECORD_BYTES)
