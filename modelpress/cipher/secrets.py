"""A model's secrets, wrapped, as a log of objects beside its packs.

Each entry is a whole: all secrets that the model ever had, oldest first, wrapped together by one key. The last secret
of the newest entry is the one that new packs are encrypted with; the others open older packs. Another key wraps the
same secrets in one more entry, and no blob is touched; the entries of the old key can be deleted then. Entries are
created only if absent, like a pointer's, so that of two writers at once one reads what the other wrote.

An id is derived from its secret and the model's name: a secret that opens but is another is found out.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import random
import secrets as random_source
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modelpress import keys, strictjson
from modelpress.cipher.stream import KEY_BYTES, derive
from modelpress.cipher.wrapping import MISSING, WrappingKey, first
from modelpress.config import PackName
from modelpress.errors import ConfigError, ConflictError, CorruptionError, EncryptionKeyError, NotFoundError
from modelpress.manifest import SecretId, canonical_json, check_version
from modelpress.store.base import Store, get_capped

FORMAT_VERSION: Final = 1
MAX_ENTRY_BYTES: Final = 2**16
MAX_SECRETS: Final = 100
"""KMS wraps 4096 bytes at most."""
MAX_RACES: Final = 20
ID_LABEL: Final = b"modelpress secret id v1"


class SecretsEntry(BaseModel):
    """One entry of the log."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    format_version: Literal[1] = FORMAT_VERSION
    """Version of this layout."""
    name: PackName
    """Pack name."""
    number: int = Field(ge=1)
    """Position in the log."""
    secrets: tuple[SecretId, ...] = Field(min_length=1, max_length=MAX_SECRETS)
    """Ids, oldest first; the last is that of new packs."""
    algorithm: Literal["AES-256-GCM", "aws-kms"]
    """How they are wrapped."""
    key: str = Field(min_length=1, max_length=2048)
    """Id of the key that wraps them."""
    wrapped: str = Field(min_length=1, max_length=MAX_ENTRY_BYTES)
    """The secrets, one after the other, wrapped; base64."""
    created: datetime
    """When, UTC."""

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return canonical_json(self.model_dump(mode="json"))


def history(store: Store, name: str) -> list[SecretsEntry]:
    """All entries, oldest first; empty where the model has no secrets.

    Raises:
        CorruptionError: an entry is not what its key says.
        UnsupportedFormatError: it was written by a newer modelpress.
    """
    return _read_listed(store, name, lambda numbers: numbers)


def find(store: Store, name: str, secret: str, wrapping: Sequence[WrappingKey]) -> bytes:
    """The secret with an id: from the newest entry that holds it and that one of the keys opens.

    Raises:
        EncryptionKeyError: no entry holds it, or none of the keys wrapped those that do.
        CorruptionError: what the key opened is another secret, or was changed.
        AccessDeniedError, StoreUnavailableError: of KMS.
    """
    doing = f"opening secret {secret} of model {name}"
    entries = [entry for entry in history(store, name) if secret in entry.secrets]
    if not entries:
        raise EncryptionKeyError(
            doing,
            found=f"no entry under {store.uri}/{keys.secrets(name)} that holds it",
            fix="restore the entry from a copy of the store; without it the packs of this secret stay closed",
        )
    for entry in reversed(entries):
        if (opened := _open(store, entry, wrapping)) is not None:
            return opened[secret]
    raise _closed(doing, entries, wrapping)


def current(store: Store, name: str, wrapping: Sequence[WrappingKey]) -> tuple[str, bytes]:
    """Id and secret for new packs; a model without secrets gets its first.

    Raises:
        EncryptionKeyError: no key is set, or the newest entry is wrapped by another.
        and see `find`.
    """
    first(wrapping, f"opening the secret of model {name}")
    entry = newest(store, name) or renew(store, name, wrapping)
    secret = entry.secrets[-1]
    return secret, _opened(store, entry, wrapping)[secret]


def newest(store: Store, name: str) -> SecretsEntry | None:
    """The entry that holds; None where the model has no secrets.

    Raises:
        see `history`.
    """
    found = _read_listed(store, name, lambda numbers: numbers[-1:])
    return found[0] if found else None


def renew(store: Store, name: str, wrapping: Sequence[WrappingKey]) -> SecretsEntry:
    """Give the model one more secret, which packs are encrypted with from now on: the first, or after a leak.

    Who wrote an entry meanwhile has renewed in our place where there was none, and is followed otherwise.

    Raises:
        ConfigError: it has `MAX_SECRETS`.
        ConflictError: the race was lost too often.
        and see `find`.
    """
    wrapper, began_empty = first(wrapping, f"making a secret for model {name}"), newest(store, name) is None
    for attempt in range(MAX_RACES):
        last = newest(store, name)
        if last is not None and began_empty:
            return last
        opened = _opened(store, last, wrapping) if last else {}
        if len(opened) >= MAX_SECRETS:
            found = f"{len(opened)} secrets"
            raise ConfigError(f"making a secret for model {name}", found=found, expected=f"less than {MAX_SECRETS}")
        secret = random_source.token_bytes(KEY_BYTES)
        held = [*opened.values(), secret]
        if (entry := _append(store, name, last, held, wrapper)) is not None:
            return entry
        time.sleep(random.uniform(0, min(1.0, 0.02 * 2**attempt)))
    raise _too_many_races(name)


def rewrap(store: Store, name: str, wrapping: Sequence[WrappingKey]) -> SecretsEntry:
    """Wrap all secrets with the first of the keys, in one more entry; where the newest is so, it is left.

    Raises:
        EncryptionKeyError: the model has no secrets, or no key opens the newest entry.
        ConflictError: the race was lost too often.
        and see `find`.
    """
    doing = f"wrapping the secrets of model {name} anew"
    wrapper = first(wrapping, doing)
    for attempt in range(MAX_RACES):
        last = newest(store, name)
        if last is None:
            raise EncryptionKeyError(doing, found=f"no secrets under {store.uri}/{keys.secrets(name)}")
        held = _opened(store, last, wrapping)
        if _open(store, last, [wrapper]) is not None:
            return last
        if (entry := _append(store, name, last, list(held.values()), wrapper)) is not None:
            return entry
        time.sleep(random.uniform(0, min(1.0, 0.02 * 2**attempt)))
    raise _too_many_races(name)


def forget(store: Store, name: str, wrapping: Sequence[WrappingKey]) -> list[SecretsEntry]:
    """Delete all entries but the newest, once it is proved that the first of the keys opens every secret from it.

    Raises:
        EncryptionKeyError: another key wrapped the newest entry.
        CorruptionError: an older entry has a secret that the newest has not.
    """
    doing = f"deleting old entries of the secrets of model {name}"
    wrapper, entries = first(wrapping, doing), history(store, name)
    if not entries:
        raise EncryptionKeyError(doing, found=f"no secrets under {store.uri}/{keys.secrets(name)}")
    held, old = _opened(store, entries[-1], [wrapper]), entries[:-1]
    for entry in old:
        if lost := sorted(set(entry.secrets) - set(held)):
            found = f"secret {lost[0]} in entry {entry.number}"
            raise CorruptionError(doing, found=found, expected=f"it in entry {entries[-1].number} too")
    for entry in old:
        store.delete(keys.secret(name, entry.number))
    return old


def secret_id(name: str, secret: bytes) -> str:
    """The id of a model's secret: 32 hex digits that tell nothing of it."""
    return derive(secret, ID_LABEL + name.encode(), 16).hex()


def _append(
    store: Store, name: str, last: SecretsEntry | None, held: list[bytes], wrapper: WrappingKey
) -> SecretsEntry | None:
    """The entry after `last`; None where another writer was first."""
    number, ids = (last.number if last else 0) + 1, tuple(secret_id(name, secret) for secret in held)
    key, wrapped = wrapper.wrap(b"".join(held), _context_of(name, number, ids))
    entry = SecretsEntry.model_validate(
        {
            "name": name,
            "number": number,
            "secrets": ids,
            "algorithm": wrapper.algorithm,
            "key": key,
            "wrapped": base64.b64encode(wrapped).decode(),
            "created": datetime.now(UTC),
        }
    )
    where, data = keys.secret(name, number), entry.to_bytes()
    # False and the same bytes: our own write, whose answer was lost and which the client sent again.
    return entry if store.put(where, data, if_absent=True) or store.get(where) == data else None


def _opened(store: Store, entry: SecretsEntry, wrapping: Sequence[WrappingKey]) -> dict[str, bytes]:
    """The secrets of an entry by id, oldest first.

    Raises:
        EncryptionKeyError: none of the keys wrapped it.
    """
    opened = _open(store, entry, wrapping)
    if opened is None:
        raise _closed(f"opening the secrets of model {entry.name}", [entry], wrapping)
    return opened


def _open(store: Store, entry: SecretsEntry, wrapping: Sequence[WrappingKey]) -> dict[str, bytes] | None:
    """As `_opened`, and None where none of the keys wrapped it."""
    doing = f"opening {store.uri}/{keys.secret(entry.name, entry.number)}"
    fix = "restore the entry from a copy of the store, or delete it if an older one holds the same secrets"
    try:
        wrapped = base64.b64decode(entry.wrapped, validate=True)
    except binascii.Error:
        raise CorruptionError(doing, found="no base64", expected="wrapped secrets", fix=fix) from None
    for key in wrapping:
        if key.algorithm != entry.algorithm:
            continue
        try:
            data = key.unwrap(entry.key, wrapped, _context(entry))
        except CorruptionError as error:
            raise CorruptionError(doing, found=error.found, expected=error.expected, fix=fix) from error
        if data is None:
            continue
        held = [data[start : start + KEY_BYTES] for start in range(0, len(data), KEY_BYTES)]
        if tuple(secret_id(entry.name, secret) for secret in held) != entry.secrets:
            found = "secrets with other ids: of another model, or not of this entry"
            raise CorruptionError(doing, found=found, expected=", ".join(entry.secrets), fix=fix)
        return dict(zip(entry.secrets, held, strict=True))
    return None


def _closed(doing: str, entries: Sequence[SecretsEntry], wrapping: Sequence[WrappingKey]) -> EncryptionKeyError:
    here = ", ".join(str(key) for key in wrapping) or "none"
    wrapped = sorted({f"{entry.algorithm} key {entry.key}" for entry in entries})
    return EncryptionKeyError(doing, found=f"keys in the settings: {here}", expected=" or ".join(wrapped), fix=MISSING)


def _context(entry: SecretsEntry) -> dict[str, str]:
    return _context_of(entry.name, entry.number, entry.secrets)


def _context_of(name: str, number: int, ids: Sequence[str]) -> dict[str, str]:
    """What a wrapping is bound to: with KMS its encryption context, which policies and audit logs see."""
    place = canonical_json({"format_version": FORMAT_VERSION, "name": name, "number": number, "secrets": list(ids)})
    return {"modelpress:name": name, "modelpress:entry": hashlib.sha256(place).hexdigest()}


def _read_listed(store: Store, name: str, choose: Callable[[list[int]], list[int]]) -> list[SecretsEntry]:
    """Those entries that are chosen of the numbers of all, in order."""
    before: list[int] = []
    while True:
        found = (keys.pointer_number(info.key) for info in store.list(keys.secrets(name)))
        numbers = sorted(number for number in found if number is not None)
        try:
            return [_read(store, name, number) for number in choose(numbers)]
        except NotFoundError:  # forgotten since it was listed: whoever did that had written a newer one
            if numbers == before:
                raise
            before = numbers


def _read(store: Store, name: str, number: int) -> SecretsEntry:
    key = keys.secret(name, number)
    doing = f"reading secrets {store.uri}/{key}"
    data = get_capped(store, key, MAX_ENTRY_BYTES, doing)
    document = strictjson.loads(data, doing)
    check_version(document.get("format_version"), doing, FORMAT_VERSION)
    try:
        entry = SecretsEntry.model_validate(document)
    except ValidationError as error:
        first_problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first_problem["loc"]) or "entry"
        raise CorruptionError(doing, found=f"{where}: {first_problem['msg']}", expected="an entry of secrets") from None
    if (entry.name, entry.number) != (name, number) or entry.to_bytes() != data:
        found = f"entry {entry.number} of {entry.name}, or another spelling"
        raise CorruptionError(doing, found=found, expected="the entry that the key names, in canonical JSON")
    return entry


def _too_many_races(name: str) -> ConflictError:
    return ConflictError(
        f"writing the secrets of model {name}",
        found=f"{MAX_RACES} lost races for the next entry",
        fix="find out who writes them all the time, then run it again",
    )
