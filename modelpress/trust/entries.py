"""Entries: pointers' entries, decisions and runs. Their one spelling, and the signature inside, over all else in it."""

from __future__ import annotations

import base64
import hashlib
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from modelpress import keys, strictjson
from modelpress.errors import ConfigError, CorruptionError, KeyRefusedError, SignatureError, UnsignedError
from modelpress.manifest import canonical_json, check_version
from modelpress.store.base import check_digest, get_capped
from modelpress.trust.dsse import Envelope
from modelpress.trust.packs import check_signer
from modelpress.trust.policy import KeyId, Policy, now
from modelpress.trust.signer import Signer, holds

if TYPE_CHECKING:
    from modelpress.store.base import Store

PAYLOAD_TYPE = "application/vnd.modelpress.pointer+json"
"""Binds what is signed to what it is: no signature of anything else is one of an entry."""
DECISION_TYPE = "application/vnd.modelpress.decision+json"
"""The same of what a gate decided."""
RUN_TYPE = "application/vnd.modelpress.run+json"
"""The same of what a run did."""


class EntrySignature(BaseModel):
    """One signature of an entry."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    keyid: KeyId
    """The key's id."""
    sig: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9+/]{86}==$")]
    """Base64 of the Ed25519 signature over DSSE's encoding of the payload type and the entry without `signature`."""


class Entry(BaseModel):
    """What pointers' entries, decisions and runs have in common: each kind declares the fields, in its own order.

    Nothing may be left unspelled but what `_spelled` says. So a field that comes later comes with a version of its own,
    and the kind's `_spelled` leaves it out of those before.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    what: ClassVar[str]
    """What errors call it, behind an article: `decision`."""
    payload_type: ClassVar[str]
    """What its signatures are bound to."""
    newest_version: ClassVar[int]
    """The newest `format_version` that is read."""

    if TYPE_CHECKING:
        name: str
        pack: str
        signature: EntrySignature | None

    def to_bytes(self) -> bytes:
        """Canonical JSON; without `signature`, where there is none."""
        return self._spelled(set() if self.signature else {"signature"})

    def unsigned_bytes(self) -> bytes:
        """What is signed: canonical JSON of everything but the signature."""
        return self._spelled({"signature"})

    def _spelled(self, without: set[str]) -> bytes:
        return canonical_json(self.model_dump(mode="json", exclude=without))

    def signed(self, signer: Signer | None) -> Self:
        """This entry with a signature; as it is where there is no signer."""
        if signer is None:
            return self
        return self.model_copy(update={"signature": sign(signer, self.unsigned_bytes(), self.payload_type)})

    @property
    def digest(self) -> str:
        """sha256 (hex) of `to_bytes`."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


EntryT = TypeVar("EntryT", bound=Entry)


def parse(data: bytes, kind: type[EntryT], doing: str) -> EntryT:
    """An entry from untrusted bytes, which must be the very bytes that it is written as: none counts twice.

    Raises:
        CorruptionError: they are none; the message begins with `doing`.
        UnsupportedFormatError: written by a newer modelpress.
    """
    document = strictjson.loads(data, doing)
    check_version(document.get("format_version"), doing, kind.newest_version)
    try:
        entry = kind.model_validate(document)
        same = entry.to_bytes() == data
    except (ConfigError, ValueError, RecursionError) as error:  # spelling follows any depth, and stops at some
        raise CorruptionError(doing, found=_told(error), expected=f"a {kind.what}") from error
    if not same:
        raise CorruptionError(doing, found="another spelling", expected="canonical JSON, as this writes it")
    return entry


def seal(entry: EntryT, signer: Signer | None, most: int, doing: str) -> tuple[EntryT, bytes]:
    """Sign an entry, if there is somebody to, and spell it as readers will take it.

    Args:
        entry: the unsigned one.
        signer: who signs; None leaves it as it is.
        most: bytes that readers take.
        doing: how errors begin.

    Raises:
        ConfigError: it is larger, or holds what no reader takes: what is no JSON, or too deep.
    """
    try:
        made = entry.signed(signer)
        data = made.to_bytes()
        if len(data) <= most:
            parse(data, type(made), doing)
    except (ConfigError, CorruptionError, ValueError, RecursionError) as error:
        raise ConfigError(doing, found=_told(error), expected=f"a {entry.what} that can be read again") from error
    if len(data) > most:
        raise ConfigError(doing, found=f"a {entry.what} of {len(data)} bytes", expected=f"at most {most}")
    return made, data


def read_beside(store: Store, kind: type[EntryT], key: str, most: int) -> EntryT:
    """An entry that stands beside a pack, and is what its key says; who vouches for it is not asked.

    Args:
        store: the publication store.
        kind: what it must be.
        key: its own, from `keys`: it holds the pack's name and digest, and the entry's.
        most: bytes that are read.

    Raises:
        NotFoundError: there is none.
        CorruptionError: it is larger, its bytes do not have this digest, are no such entry, or one of another pack.
        UnsupportedFormatError: written by a newer modelpress.
    """
    place = keys.place(key)
    assert place is not None
    doing = f"reading the {kind.what} {store.uri}/{key}"
    data = get_capped(store, key, most, doing)
    check_digest(doing, hashlib.sha256(data).hexdigest(), place.record)
    entry = parse(data, kind, doing)
    if (entry.name, entry.pack) != (place.name, place.digest):
        found = f"a {kind.what} on {entry.name}@{entry.pack}"
        raise CorruptionError(doing, found=found, expected=f"one on {place.name}@{place.digest}")
    return entry


def admit(store: Store, entry: Entry, key: str) -> None:
    """Hold an entry that stands under `key` to the store's trust; nothing is asked where it has no trust file.

    Raises:
        TrustError: see `check`.
    """
    if store.trust is not None:
        check(store.trust.policy(), entry, f"checking the signature of {store.uri}/{key}")


def _told(error: Any) -> str:
    """What went wrong, for people."""
    told = str(error.errors(include_url=False)[0]) if isinstance(error, ValidationError) else str(error)
    return told[:300]


def sign(signer: Signer, entry: bytes, payload_type: str = PAYLOAD_TYPE) -> EntrySignature:
    """The signature of an entry's bytes without signature."""
    envelope = signer.envelope(payload_type, entry)
    return EntrySignature(keyid=envelope.key_id, sig=base64.b64encode(envelope.signature).decode())


def check(policy: Policy, entry: Entry, doing: str) -> None:
    """Refuse an entry that no key vouches for.

    Args:
        policy: whose signatures count.
        entry: the entry.
        doing: how errors begin.

    Raises:
        UnsignedError: it has no signature.
        KeyRefusedError: its key does not count for this.
        SignatureError: the signature is wrong.
    """
    expected = f"an entry signed by a {' or '.join(policy.pointers)}"
    signature = entry.signature
    if signature is None:
        fix = "whoever may move this alias signs it: modelpress sign --all; or promote again, with a key"
        raise UnsignedError(doing, found="no signature", expected=expected, fix=fix)
    key = policy.find(signature.keyid)
    if key is None:
        raise KeyRefusedError(doing, found=f"key {signature.keyid}, not in the trust file", expected=expected)
    refusal = key.refusal(entry.name, now()) or (None if key.role in policy.pointers else f"of role {key.role}")
    if refusal is not None:
        fix = "sign it again with a key that counts: modelpress sign --all --signed-by KEY"
        found = f"key {key.id[:12]} of {key.owner}: {refusal}"
        raise KeyRefusedError(doing, found=found, expected=expected, fix=fix)
    raw = base64.b64decode(signature.sig)
    one_spelling = base64.b64encode(raw).decode() == signature.sig
    signed = Envelope(entry.payload_type, entry.unsigned_bytes(), signature.keyid, raw)
    if not one_spelling or not holds(key.verifier(), signed):
        found = f"a signature that key {key.id[:12]} of {key.owner} did not make of this entry"
        raise SignatureError(doing, found=found, expected=expected)


def check_may_sign(policy: Policy, signer: Signer | None, name: str, doing: str) -> None:
    """Refuse to write an entry that no reader with this trust would take; see `packs.check_signer`."""
    check_signer(policy, signer, name, policy.pointers, doing)
