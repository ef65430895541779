"""Who may ask a server for what: the scopes, and the file of keys, each of them hashed.

::

    {"format_version": 1, "keys": [{
        "id": "3f9c0a77d1e2",                  stands in the key itself, so that a key can be named without being shown
        "name": "team-a",                      who has it: the tenant of its requests, and what the audit says
        "scopes": ["infer"],
        "models": ["digits", "team-a-*"],      names of models that it may be used for; * stands for any characters
        "sha256": "9b1c…",                     of the whole key, in hex
        "created": "2026-11-22T12:00:00Z",
        "expires": "2027-02-20T12:00:00Z",     or null: never
        "revoked": null}]}                     or a moment: from when the file says so, whatever the date

A key is `mpk_ID_SECRET` with 256 random bits, made here and never thought up by a person. So one round of SHA-256 keeps
it: nobody goes through 2^256 of them, and a slow hash (scrypt), made for passwords, would cost each request its time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import stat
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from modelpress import strictjson
from modelpress.errors import ConfigError, CorruptionError, NotFoundError
from modelpress.store.local import local_errors

Scope = Literal["infer", "admin", "promote", "metrics"]
SCOPES: tuple[Scope, ...] = ("infer", "admin", "promote", "metrics")
"""What a key may be for. None includes another; a key may have several.

`infer` asks models and reads their metadata, `admin` loads and unloads, `promote` moves a pointer, `metrics` reads
numbers.
"""

PREFIX = "mpk_"
ID_BYTES, SECRET_BYTES = 6, 32
MAX_FILE_BYTES = 2**23
MAX_KEYS = 10_000
UNITS = {"m": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1)}

EVERY = ("*",)

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._@-]{0,63}$")]


@dataclass(frozen=True)
class Principal:
    """Who asks, once it is known."""

    name: str
    """The key's name or the token's subject: the tenant."""
    scopes: frozenset[str]
    """What it may ask for."""
    via: Literal["key", "token", "jwt", "nobody"]
    """How it is known; `nobody`: the server asks nobody who they are."""
    id: str = ""
    """Id of the key, where it has one."""
    models: tuple[str, ...] = EVERY
    """Names of the models that it may ask for, with `*`."""

    def may_ask(self, model: str) -> bool:
        """Whether it is for this model; `NAME:processed`, as servers have it, is the model NAME."""
        name = model.partition(":")[0]
        return self.models == EVERY or any(fnmatchcase(name, pattern) for pattern in self.models)


class Key(BaseModel):
    """What is kept of a key: all but the key."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    id: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{12}$")]
    """Stands in the key, and names it."""
    name: Name
    """Who has it. Several keys may have one name: the new and the old one of a change."""
    scopes: tuple[Scope, ...] = Field(min_length=1)
    """What it is for."""
    models: tuple[Annotated[str, StringConstraints(pattern=r"^[a-z0-9._*-]{1,64}$")], ...] = Field(EVERY, min_length=1)
    """Names of the models that it is for; `*` stands for any characters."""
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    """Of the whole key, in hex."""
    created: AwareDatetime
    """When it was made."""
    expires: AwareDatetime | None
    """From this moment on it does not count; None: it always does."""
    revoked: AwareDatetime | None
    """When it was revoked: whatever the date, it does not count."""

    def state(self, now: datetime) -> str:
        """`counts`, or why it does not."""
        if self.revoked is not None:
            return f"revoked ({self.revoked.isoformat(' ', 'seconds')})"
        if self.expires is not None and now >= self.expires:
            return f"expired ({self.expires.isoformat(' ', 'seconds')})"
        return "counts"


class KeyFile(BaseModel):
    """What a file of keys says."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    format_version: Literal[1] = 1
    """Version of this layout."""
    keys: tuple[Key, ...] = Field(default=(), max_length=MAX_KEYS)
    """The keys. Those that were revoked stay in the list: it says who had what."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for field in ("id", "sha256"):
            values = [getattr(key, field) for key in self.keys]
            if len(set(values)) != len(values):
                raise ValueError(f"two keys have the same {field}")
        return self

    def to_bytes(self) -> bytes:
        """JSON, for people too."""
        return self.model_dump_json(indent=1).encode() + b"\n"


def new_key(
    name: str, scopes: Sequence[str], expires: datetime | None, now: datetime, models: Sequence[str] = EVERY
) -> tuple[str, Key]:
    """A key, to be shown once, and what is kept of it.

    Raises:
        ConfigError: an illegal name, scope or name of models, no scope, or an end that is past.
    """
    doing = f"making a key for {name!r}"
    if expires is not None and expires <= now:
        raise ConfigError(doing, found=f"an end at {expires.isoformat(' ', 'seconds')}", expected="one in the future")
    identity = secrets.token_hex(ID_BYTES)
    text = f"{PREFIX}{identity}_{secrets.token_urlsafe(SECRET_BYTES)}"
    kept = {"id": identity, "name": name, "scopes": list(dict.fromkeys(scopes)), "sha256": digest(text).hex()}
    kept |= {"models": list(dict.fromkeys(models))}
    try:
        return text, Key.model_validate(kept | {"created": now, "expires": expires, "revoked": None})
    except ValidationError as error:
        raise ConfigError(doing, found=_problem(error), expected=f"scopes among {', '.join(SCOPES)}") from error


def digest(key: str) -> bytes:
    """SHA-256 of a key, 32 bytes."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def parse_expiry(text: str, now: datetime) -> datetime | None:
    """The end that `90d`, `12h`, `30m`, `2027-01-31T00:00:00Z` or `never` says.

    Raises:
        ConfigError: it says none.
    """
    if text == "never":
        return None
    if match := re.fullmatch(r"([0-9]{1,5})([mhd])", text):
        return (now + int(match[1]) * UNITS[match[2]]).replace(microsecond=0)
    with contextlib.suppress(ValueError):
        moment = datetime.fromisoformat(text)
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    raise ConfigError(
        "reading when a key ends", found=repr(text), expected="such as 90d, 12h, 2027-01-31T00:00:00Z or never"
    )


def read_keys(path: Path) -> KeyFile:
    """The keys in a file.

    Raises:
        ConfigError: it can't be read, others may change it, or it holds something else.
    """
    doing, fix = f"reading the file of keys {path}", "make one: modelpress access create NAME --scope infer"
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(doing, found=error.strerror, expected="a file that can be read", fix=fix) from error
    if os.name == "posix" and mode & stat.S_IWOTH:
        raise ConfigError(doing, found="a file that everyone may change", fix=f"chmod o-w {path}, and look at it")
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(doing, found=f"more than {MAX_FILE_BYTES} bytes", expected="a list of keys")
    try:
        return KeyFile.model_validate(strictjson.loads(data, doing))
    except CorruptionError as error:
        raise ConfigError(doing, found=error.found, expected=error.expected, fix=fix) from error
    except ValidationError as error:
        raise ConfigError(doing, found=_problem(error), expected="a list of keys", fix=fix) from error


def add_key(
    path: Path, name: str, scopes: Sequence[str], expires: datetime | None, models: Sequence[str] = EVERY
) -> str:
    """Make a key, keep its digest in the file (made with mode 0600 where there is none), and return it.

    Raises:
        ConfigError: see `new_key` and `read_keys`.
        StoreError: the file can't be written; it stays as it was.
    """
    text, key = new_key(name, scopes, expires, datetime.now(UTC), models)
    with _changing(path) as known:
        _replace(path, KeyFile(keys=(*known.keys, key)))
    return text


def revoke_keys(path: Path, which: str) -> list[Key]:
    """Revoke the key of this id, or all keys of this name; those that it changed.

    Raises:
        NotFoundError: no such key counts.
        ConfigError, StoreError: see `add_key`.
    """
    now = datetime.now(UTC).replace(microsecond=0)
    with _changing(path) as known:
        chosen = {key.id for key in known.keys if which in (key.id, key.name) and key.revoked is None}
        if not chosen:
            names = sorted({key.name for key in known.keys if key.revoked is None})
            raise NotFoundError(
                f"revoking {which!r} in {path}",
                found="no key of this id or name that is not revoked",
                expected=f"one of {', '.join(names)}" if names else "a key",
            )
        keys = [key.model_copy(update={"revoked": now}) if key.id in chosen else key for key in known.keys]
        _replace(path, KeyFile(keys=tuple(keys)))
    return [key for key in keys if key.id in chosen]


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[KeyFile]:
    """What the file says now, with nobody else changing it meanwhile."""
    import fcntl

    doing = f"changing the file of keys {path}"
    with local_errors(doing, writing=True):
        descriptor = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with local_errors(doing, writing=True):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield read_keys(path) if path.exists() else KeyFile()
    finally:
        os.close(descriptor)


def _replace(path: Path, keys: KeyFile) -> None:
    """Whole or not at all, with the rights that the file had: a server may read it by its group."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    with local_errors(f"writing the file of keys {path}", writing=True):
        before = path.stat() if path.exists() else None
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(descriptor, "wb") as file:
                file.write(keys.to_bytes())
                if before is not None:
                    with contextlib.suppress(PermissionError):  # another's group: only its members may give it
                        os.chown(descriptor, -1, before.st_gid)
                    os.chmod(partial, stat.S_IMODE(before.st_mode))
                file.flush()
                os.fsync(descriptor)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def _problem(error: ValidationError) -> str:
    """Which field, and why; never its value: somebody may have put a key there."""
    return "; ".join(
        f"{'.'.join(map(str, one['loc'])) or 'file'}: {one['msg']}" for one in error.errors(include_url=False)[:5]
    )
