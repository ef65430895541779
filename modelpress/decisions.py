"""What gates decided, kept beside the packs: who let which bytes be served, by which conditions, on which numbers.

Each decision is an object of its own, `packs/<name>/decisions/<pack>/<sha256>.json`, named by the sha256 of its bytes
and created only if absent. None is ever changed; refusals are kept as well as promotions, and an override with the name
of who gave it. It holds the pack's name and digest, so that it counts for no other, and is signed as pointer entries
are where there is a key to sign with. A pointer's entry that a gate wrote holds the digest of its decision, so that one
which was deleted later is missed. Decisions outlive their packs.

A reader with a trust file counts a decision only where a key that may move aliases signed it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from modelpress import keys, strictjson
from modelpress.errors import ConfigError, ConflictError, CorruptionError, FormatError, NotFoundError, TrustError
from modelpress.housekeeping.turns import who
from modelpress.manifest import canonical_json, check_version
from modelpress.reports import Decision
from modelpress.store.base import Store, get_capped, stands
from modelpress.trust import entries as trusted
from modelpress.trust.entries import DECISION_TYPE, EntrySignature

if TYPE_CHECKING:
    from modelpress.trust import Signer

FORMAT_VERSION: Final = 1
MAX_RECORD_BYTES = 2**20
RECORD = "record"
"""Key in a pointer entry's decision: the digest of the kept one."""

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Record(BaseModel):
    """One decision, and what it rests on."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    format_version: Literal[1] = FORMAT_VERSION
    """Version of this layout."""
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
        return self

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return canonical_json(self.model_dump(mode="json", exclude=None if self.signature else {"signature"}))

    def unsigned_bytes(self) -> bytes:
        """What is signed: canonical JSON of everything but the signature."""
        return canonical_json(self.model_dump(mode="json", exclude={"signature"}))

    def signed(self, signer: Signer | None) -> Record:
        """This record with a signature; as it is where there is no signer."""
        if signer is None:
            return self
        return self.model_copy(update={"signature": trusted.sign(signer, self.unsigned_bytes(), DECISION_TYPE)})

    @property
    def digest(self) -> str:
        """sha256 (hex) of `to_bytes`: its name."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


@dataclass(frozen=True)
class Kept:
    """A decision that stands in a store, for people who look through them."""

    key: str
    record: Record | None
    """None where it can't be read."""
    problem: FormatError | TrustError | None
    """Why it does not count; None where it does, and where nothing is asked (there is no trust file)."""


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
    """Write a decision beside its pack, signed with the store's key where it has one; the same one twice is one.

    Raises:
        ConfigError: it is larger than `MAX_RECORD_BYTES`, or holds what is no JSON.
        ConflictError: other bytes stand under its name.
        StoreError: it can't be written.
    """
    made = Record(
        name=name,
        pack=pack,
        alias=alias,
        champion=champion,
        after=after,
        gate=gate,
        decision=decision,
        created=datetime.now(UTC),
        who=who(),
    ).signed(store.signer)
    key, data = keys.decision(name, pack, made.digest), made.to_bytes()
    if len(data) > MAX_RECORD_BYTES:
        found, most = f"{len(data)} bytes", f"at most {MAX_RECORD_BYTES}: fewer slices and metrics to judge"
        raise ConfigError(f"keeping the decision on {name}@{pack[:12]}", found=found, expected=most)
    if not store.put(key, data, if_absent=True) and not stands(store, key, data):
        raise ConflictError(
            f"keeping the decision on {name}@{pack[:12]}",
            found=f"other bytes under {store.uri}/{key}",
            expected="no object, or this decision",
            fix="the object was damaged or tampered with: keep it for inquiry, delete it, and judge again",
        )
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
    _admit(store, found)
    return found


def kept(store: Store, name: str, pack: str = "") -> list[Kept]:
    """All decisions on packs of a name, or on one pack, the oldest first; those that do not count as well.

    Raises:
        StoreError: the store does not answer.
    """
    found = list(_kept(store, name, pack))
    return sorted(found, key=lambda one: (one.record is None, one.record.created if one.record else _EVER, one.key))


_EVER = datetime.min.replace(tzinfo=UTC)


def _kept(store: Store, name: str, pack: str) -> Iterator[Kept]:
    for info in store.list(keys.decisions(name, pack)):
        place = keys.place(info.key)
        if place is None or place.kind != "decision":
            continue
        record: Record | None = None
        problem: FormatError | TrustError | None = None
        try:
            record = _read(store, name, place.digest, place.record)
            _admit(store, record)
        except NotFoundError:  # deleted since it was listed
            continue
        except (FormatError, TrustError) as error:
            problem = error
        yield Kept(info.key, record, problem)


def _read(store: Store, name: str, pack: str, record: str) -> Record:
    """A decision that is what its key says; who vouches for it is not asked."""
    doing = _doing(store, name, pack, record)
    data = get_capped(store, keys.decision(name, pack, record), MAX_RECORD_BYTES, doing)
    found = _parse(data, record, doing)
    if (found.name, found.pack) != (name, pack):
        raise CorruptionError(doing, found=f"a decision on {found.name}@{found.pack}", expected=f"one on {name}@{pack}")
    return found


def _admit(store: Store, record: Record) -> None:
    """Hold a decision to the store's trust."""
    if store.trust is not None:
        doing = _doing(store, record.name, record.pack, record.digest)
        unsigned = record.unsigned_bytes()
        trusted.check(store.trust.policy(), record.signature, unsigned, record.name, doing, DECISION_TYPE)


def _doing(store: Store, name: str, pack: str, record: str) -> str:
    return f"reading the decision {store.uri}/{keys.decision(name, pack, record)}"


def _parse(data: bytes, digest: str, doing: str) -> Record:
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise CorruptionError(doing, found=f"sha256 {found}", expected=f"sha256 {digest}")
    document = strictjson.loads(data, doing)
    check_version(document.get("format_version"), doing, FORMAT_VERSION)
    try:
        record = Record.model_validate(document)
        same = record.to_bytes() == data
    except (ValidationError, ConfigError, ValueError, RecursionError) as error:
        told = str(error.errors(include_url=False)[0]) if isinstance(error, ValidationError) else str(error)
        raise CorruptionError(doing, found=told[:300], expected="a decision") from error
    if not same:
        raise CorruptionError(doing, found="another spelling", expected="canonical JSON, as this writes it")
    return record
