"""What runs did, kept beside the packs that they made: the numbers of each run, and the page that was drawn of them.

A run is two objects, each named by the sha256 of its bytes and created only if absent: the record,
`packs/<name>/runs/<pack>/<sha256>.json`, and its page, the same with `.html`. The record holds the pack's name and
digest, and its page's digest, and is signed as decisions are where there is a key to sign with, so that a signature
vouches for both. Times, speeds and machines are in it, which a manifest has none of: the same pack may have been
measured by several runs. They go with their pack.

A run whose page could not be drawn is kept without one: its numbers are what a page is made from, at any time. Beside
an encrypted pack both are sealed under the pack's secret; the record then tells the pack, when and who, and no more.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Annotated, ClassVar, Final, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, StringConstraints, ValidationError, model_validator

from modelpress import keys, strictjson
from modelpress.cipher import open_bytes, seal_bytes, secret_of
from modelpress.errors import ConfigError, CorruptionError, FormatError, NotFoundError, TrustError
from modelpress.housekeeping.turns import who
from modelpress.manifest import Encryption, Plain, canonical_json
from modelpress.reports import RunReport
from modelpress.store.base import Store, get_capped, put_once
from modelpress.trust import entries as trusted
from modelpress.trust.entries import RUN_TYPE, Entry, EntrySignature

FORMAT_VERSION: Final = 2
"""The newest version that is read. It is written where version 1 can't say it: a run without a page, or sealed."""
MAX_RECORD_BYTES = 2**24
MAX_PAGE_BYTES = 2**24
MOST = 200
"""Runs of one pack that are read."""

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Sealed(BaseModel):
    """What a record tells of a run to who has a key."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    encryption: Encryption
    """As the manifest of the pack has it."""
    run: Plain
    """The run as canonical JSON, before it was sealed."""
    data: str
    """The sealed run, base64."""
    page: Plain | None
    """The page before it was sealed; None where there is none."""


class RunRecord(Entry):
    """One run, as it is kept; its digest is its name."""

    what: ClassVar[str] = "run"
    payload_type: ClassVar[str] = RUN_TYPE
    newest_version: ClassVar[int] = FORMAT_VERSION

    format_version: Literal[1, 2]
    """Version of this layout."""
    name: str
    """Name of the pack."""
    pack: Digest
    """Digest of the pack."""
    run: RunReport | None = None
    """What the run did; None, and not spelled, where it is sealed. `told` has it in either case."""
    sealed: Sealed | None = None
    """The same beside an encrypted pack, in version 2; else None, and not spelled."""
    page: Digest | None
    """Digest of the page's bytes, as they are stored; None, in version 2, where it could not be drawn."""
    created: AwareDatetime
    """When, UTC."""
    who: str
    """User and host of the process that ran it."""
    signature: EntrySignature | None = None
    """By whom it is signed; not spelled where nobody did."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.run is None) == (self.sealed is None):
            raise ValueError("a run is told in one of two ways: `run`, or `sealed`")
        if (self.page is None or self.sealed is not None) != (self.format_version == 2):
            raise ValueError(f"what a record of version {3 - self.format_version} would say, in {self.format_version}")
        if self.sealed is not None and (self.sealed.page is None) != (self.page is None):
            raise ValueError("a page before it was sealed, or after that, and not both")
        return self

    def _spelled(self, without: set[str]) -> bytes:
        return super()._spelled(without | {"run" if self.run is None else "sealed"})


@dataclass(frozen=True)
class KeptRun:
    """A record that stands in a store, for people who look through them."""

    key: str
    record: RunRecord | None
    """None where it can't be read."""
    problem: FormatError | TrustError | None
    """Why it does not count; None where it does, and where nothing is asked (there is no trust file)."""


def keep(store: Store, run: RunReport, page: bytes | None, encryption: Encryption | None = None) -> RunRecord:
    """Keep a run that published, and its page, beside the pack; the page first, so that no record lacks its page.

    Args:
        store: the publication store.
        run: what the run did.
        page: HTML; None where it could not be drawn: the numbers are kept, and a page can be made of them later.
        encryption: of the pack's manifest; None where the pack is not encrypted.

    Raises:
        ConfigError: it published nothing, record or page are larger than `MAX_RECORD_BYTES`, `MAX_PAGE_BYTES`, or the
            record holds what no reader takes.
        ConflictError: other bytes stand under one of the names.
        EncryptionKeyError: none of the keys opens the pack's secret; nothing is kept.
        StoreError: they can't be written.
    """
    doing = f"keeping the run of {run.name}"
    if run.pack is None:
        raise ConfigError(doing, found="a run that published nothing", expected="the digest of its pack")
    sealed = None
    if encryption is not None:
        sealed, page = _sealed(store, run, page, encryption, doing)
    if page is not None and len(page) > MAX_PAGE_BYTES:
        raise ConfigError(doing, found=f"a page of {len(page)} bytes", expected=f"at most {MAX_PAGE_BYTES}")
    record = RunRecord(
        format_version=1 if page is not None and sealed is None else 2,
        name=run.name,
        pack=run.pack,
        run=run if sealed is None else None,
        sealed=sealed,
        page=hashlib.sha256(page).hexdigest() if page is not None else None,
        created=datetime.now(UTC),
        who=who(),
    )
    made, data = trusted.seal(record, store.signer, MAX_RECORD_BYTES, doing)
    wanted = [(_page_key(made), page)] if page is not None else []
    for key, content in [*wanted, (keys.run(run.name, run.pack, made.digest), data)]:
        put_once(store, key, content, doing, expected="no object, or these bytes", again="run")
    return made


def _sealed(
    store: Store, run: RunReport, page: bytes | None, encryption: Encryption, doing: str
) -> tuple[Sealed, bytes | None]:
    """The run, and the page, as they are stored; what no reader takes is refused, as `trusted.seal` does it."""
    secret = secret_of(store, run.name, encryption)
    try:
        content = canonical_json(run.model_dump(mode="json"))
        _parse(content, doing)
    except (ConfigError, CorruptionError, ValueError, RecursionError) as error:
        raise ConfigError(doing, found=str(error)[:300], expected="a run that can be read again") from error
    plain, data = seal_bytes(content, secret, encryption, doing)
    sealed = Sealed(encryption=encryption, run=plain, data=base64.b64encode(data).decode(), page=None)
    if page is None:
        return sealed, None
    shown, stored = seal_bytes(page, secret, encryption, doing)
    return sealed.model_copy(update={"page": shown}), stored


def _parse(data: bytes, doing: str) -> RunReport:
    try:
        return RunReport.model_validate(strictjson.loads(data, doing))
    except ValidationError as error:
        found = str(error.errors(include_url=False)[0])[:300]
        raise CorruptionError(doing, found=found, expected="a run") from error


def _page_key(record: RunRecord) -> str:
    assert record.page is not None
    return keys.page(record.name, record.pack, record.page, sealed=record.sealed is not None)


def _doing(store: Store, record: RunRecord) -> str:
    return f"reading the run {store.uri}/{keys.run(record.name, record.pack, record.digest)}"


def told(store: Store, record: RunRecord) -> RunReport:
    """What a run did, opened where it is sealed.

    Raises:
        EncryptionKeyError: none of the keys that the settings name opens it.
        CorruptionError: what was sealed is no run of this pack, or it was not sealed under the pack's secret.
    """
    if record.run is not None:
        return record.run
    assert record.sealed is not None
    sealed, doing = record.sealed, _doing(store, record)
    secret = secret_of(store, record.name, sealed.encryption)
    try:
        data = base64.b64decode(sealed.data, validate=True)
    except binascii.Error as error:
        raise CorruptionError(doing, found=str(error), expected="a sealed run as base64") from error
    run = _parse(open_bytes(data, sealed.run, secret, sealed.encryption, doing), doing)
    if (run.name, run.pack) != (record.name, record.pack):
        found = f"a run of {run.name}@{run.pack}"
        raise CorruptionError(doing, found=found, expected=f"one of {record.name}@{record.pack}")
    return run


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
    """The page of a record, held to its digest, and opened where it is sealed.

    Raises:
        NotFoundError: it is not there, or none was drawn.
        CorruptionError: its bytes do not have the digest that the record says.
        EncryptionKeyError: none of the keys that the settings name opens it.
    """
    data, sealed = check_page(store, record), record.sealed
    if sealed is None:
        return data
    assert sealed.page is not None
    secret = secret_of(store, record.name, sealed.encryption)
    return open_bytes(data, sealed.page, secret, sealed.encryption, f"reading the page {store.uri}/{_page_key(record)}")


def check_page(store: Store, record: RunRecord) -> bytes:
    """The page of a record as it is stored, held to its digest; no key is needed.

    Raises:
        NotFoundError, CorruptionError: see `read_page`.
    """
    if record.page is None:
        raise NotFoundError(
            f"{_doing(store, record)}, its page",
            found="a run whose page could not be drawn when it ended",
            fix=f"`modelpress report {record.name}@{record.pack}` draws one of its numbers",
        )
    key = _page_key(record)
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


def counts(store: Store, name: str, pack: str) -> bool:
    """Whether a run that counts is kept beside a pack.

    Raises:
        StoreError: the store does not answer.
    """
    return any(one.record is not None and one.problem is None for one in kept(store, name, pack))


def newest(store: Store, name: str, pack: str) -> tuple[RunReport | None, list[FormatError | TrustError]]:
    """The newest run of a pack that counts; where there is none, None and why those that are there do not.

    Raises:
        EncryptionKeyError: it is sealed, and none of the keys that the settings name opens it.
        StoreError: the store does not answer.
    """
    found = kept(store, name, pack)
    problems = [one.problem for one in found if one.problem is not None]
    for one in reversed(found):
        if one.record is None or one.problem is not None:
            continue
        try:
            return told(store, one.record), []
        except FormatError as error:
            problems.append(error)
    return None, problems


_EVER = datetime.min.replace(tzinfo=UTC)


def read_unasked(store: Store, name: str, pack: str, record: str) -> RunRecord:
    """A record that is what its key says; who vouches for it is not asked.

    Raises:
        see `read`, but for TrustError.
    """
    return trusted.read_beside(store, RunRecord, keys.run(name, pack, record), MAX_RECORD_BYTES)
