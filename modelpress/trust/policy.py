"""The trust file: which keys count, for which packs, and what a pack needs.

::

    format_version: 1
    required: [publisher, approver]      # a pack needs a signature of each of these roles
    pointers: [publisher]                # an entry of a pointer's log, of one of these
    keys:
      - id: 5f0c…                        # sha256 of the public key; `modelpress trust new-key` prints the entry
        owner: build farm
        role: publisher
        public_key: MCowBQYDK2VwAyEA…
        packs: ["digits", "team-a-*"]
        valid_until: 2027-12-31T00:00:00Z
        revoked: 2027-03-01T12:00:00Z    # from when the file says so, whatever the date

When something was signed is only the signer's word, as there is no timestamp authority. So whether a key counts is
judged at the moment of reading: the signatures of a revoked or expired key do not count any more, however old they are,
and what they vouched for is signed again by another key.
"""

from __future__ import annotations

import os
import stat
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from modelpress.errors import ConfigError, TrustFileError
from modelpress.trust.signer import Signer, decode_public, key_id

MAX_FILE_BYTES = 2**20
MAX_KEYS = 1000

KeyId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Role = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]{0,31}$")]
Pattern = Annotated[str, StringConstraints(pattern=r"^[a-z0-9._*?-]{1,64}$")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class TrustedKey(_Part):
    """A public key, and what its signatures count for."""

    id: KeyId
    """sha256 (hex) of the public key, DER."""
    owner: str = Field(min_length=1, max_length=200)
    """Who holds the private key."""
    role: Role
    """What its signatures count as."""
    public_key: str
    """Base64 of the public key, DER."""
    packs: tuple[Pattern, ...] = Field(min_length=1)
    """Names of the packs that it may sign; `*` stands for any characters."""
    valid_from: AwareDatetime | None = None
    """Before this moment its signatures do not count."""
    valid_until: AwareDatetime | None = None
    """After this moment they do not count any more."""
    revoked: AwareDatetime | None = None
    """When it was revoked, for those who read the file: whatever the date, its signatures do not count."""

    @model_validator(mode="before")
    @classmethod
    def _check_times(cls, data: Any) -> Any:
        """A line that was begun and not ended (`revoked:`) must not count as one that is not there."""
        for name in ("valid_from", "valid_until", "revoked"):
            if isinstance(data, dict) and name in data and data[name] is None:
                raise ValueError(f"{name}: nothing behind it; a moment is needed, or no such line")
        return data

    @model_validator(mode="after")
    def _check(self) -> Self:
        found = key_id(self.verifier())
        if found != self.id:
            raise ValueError(f"the public key has the id {found}")
        if self.valid_from and self.valid_until and self.valid_from >= self.valid_until:
            raise ValueError("valid_until is not after valid_from")
        return self

    def verifier(self) -> Ed25519PublicKey:
        """The key itself."""
        return decode_public(self.public_key)

    def refusal(self, name: str, now: datetime) -> str | None:
        """Why its signature does not count for a pack of this name; None where it does."""
        if (state := self.state(now)) is not None:
            return state
        if not any(fnmatchcase(name, pattern) for pattern in self.packs):
            return f"not allowed for {name}, only for {', '.join(self.packs)}"
        return None

    def state(self, now: datetime) -> str | None:
        """Why it does not count for any pack; None where it does."""
        if self.revoked is not None:
            return f"revoked ({self.revoked.isoformat()})"
        if self.valid_from is not None and now < self.valid_from:
            return f"not valid before {self.valid_from.isoformat()}"
        if self.valid_until is not None and now > self.valid_until:
            return f"expired at {self.valid_until.isoformat()}"
        return None


class Policy(_Part):
    """What a trust file says."""

    format_version: Literal[1]
    """Version of this layout."""
    required: tuple[Role, ...] = Field(min_length=1)
    """Roles that must each have signed a pack."""
    pointers: tuple[Role, ...] = Field(min_length=1)
    """Roles of which one must have signed an entry of a pointer's log."""
    keys: tuple[TrustedKey, ...] = Field(min_length=1, max_length=MAX_KEYS)
    """The keys. Those that were revoked stay in the list: it says who signed what."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        ids = [key.id for key in self.keys]
        twice = next((one for one in ids if ids.count(one) > 1), None)
        if twice is not None:
            raise ValueError(f"key {twice} stands {ids.count(twice)} times")
        held = {key.role for key in self.keys}
        for role in (*self.required, *self.pointers):
            if role not in held:
                raise ValueError(f"role {role!r} is asked for, and no key has it; keys have {', '.join(sorted(held))}")
        return self

    def find(self, key_id: str) -> TrustedKey | None:
        """The key of this id."""
        return next((key for key in self.keys if key.id == key_id), None)

    def pardoning(self, key_id: str) -> Policy:
        """The same, as if this key were neither revoked nor expired: to sign again what it signed."""
        free = {"revoked": None, "valid_from": None, "valid_until": None}
        keys = [key.model_copy(update=free) if key.id == key_id else key for key in self.keys]
        return self.model_copy(update={"keys": tuple(keys)})


def read_policy(path: Path) -> Policy:
    """A trust file, YAML or JSON.

    Raises:
        TrustFileError: see `read_bytes` and `parse_policy`.
    """
    return parse_policy(read_bytes(path), path)


def read_bytes(path: Path) -> bytes:
    """The bytes of a trust file.

    Raises:
        TrustFileError: it can't be read, everyone may change it, or it is larger than `MAX_FILE_BYTES`.
    """
    doing = f"reading the trust file {path}"
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        fix = "MODELPRESS_TRUST names it; see docs/operations.md"
        raise TrustFileError(doing, found=error.strerror, expected="a file that can be read", fix=fix) from error
    if os.name == "posix" and mode & stat.S_IWOTH:
        raise TrustFileError(doing, found="a file that everyone may change", fix=f"chmod o-w {path}, and look at it")
    if len(data) > MAX_FILE_BYTES:
        raise TrustFileError(doing, found=f"more than {MAX_FILE_BYTES} bytes", expected="a list of keys")
    return data


def parse_policy(data: bytes, path: Path) -> Policy:
    """What the bytes of a trust file say.

    Raises:
        TrustFileError: something that is not legal; each wrong field is named.
    """
    doing = f"reading the trust file {path}"
    try:
        return Policy.model_validate(yaml.load(data, Loader=_UniqueLoader))
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, one['loc'])) or 'file'}: {one['msg']}" for one in error.errors()]
        raise TrustFileError(doing, found="; ".join(problems)[:2000], expected="see docs/operations.md") from error
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        raise TrustFileError(doing, found=str(error)[:500], expected="YAML or JSON, with a list of keys") from error


def entry_of(signer: Signer, owner: str, role: str, packs: list[str]) -> TrustedKey:
    """The entry of a key for a trust file.

    Raises:
        ConfigError: `owner`, `role` or `packs` is not legal.
    """
    entry = {"id": signer.key_id, "owner": owner, "role": role, "public_key": signer.public_key, "packs": packs}
    try:
        return TrustedKey.model_validate(entry)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError("describing a new key", found=f"{where}: {first['msg']}") from error


def now() -> datetime:
    """This moment, UTC."""
    return datetime.now(UTC)


class _UniqueLoader(yaml.SafeLoader):
    """Refuses a key that stands twice: the second would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{name!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)
