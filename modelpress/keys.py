"""Where things lie in a store: the one place that spells object keys.

::

    blobs/sha256/<digest>                       a shard or a file, named by its content
    packs/<name>/<digest>.json                  a manifest, named by its content
    packs/<name>/<digest>.sigs/<keyid>.json     the signature of a manifest by one key
    packs/<name>/refs/<alias>/<number>.json     one entry of a pointer's log
    packs/<name>/decisions/<digest>/<id>.json   what a gate decided of a pack, named by its content
    packs/<name>/runs/<digest>/<id>.json        what a run did that made a pack, by content; its page is the same with
                                                .html, or .sealed where the pack is encrypted
    packs/<name>/secrets/<number>.json          one entry of the log of the model's wrapped secrets
    uploads/<name>/<id>.json                    an intent: what an upload under way needs
    collections/<number>.json                   a collector's turn; <number>.ended: it is over
    canaries/<name>/<id>/<server>.json          what one server saw of a canary
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from modelpress.errors import ConfigError

BLOBS = "blobs/sha256/"
PACKS = "packs/"
UPLOADS = "uploads/"
COLLECTIONS = "collections/"
CANARIES = "canaries/"
NUMBER_DIGITS = 8

_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?")
_ALIAS = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_TOKEN = re.compile(r"[0-9a-f]{32}")
_HEX = "32 hex digits"
_PLACE = re.compile(
    rf"{PACKS}(?P<name>{_NAME.pattern})/(?:(?P<digest>{_DIGEST.pattern})\.json"
    rf"|decisions/(?P<judged>{_DIGEST.pattern})/(?P<decision>{_DIGEST.pattern})\.json"
    rf"|runs/(?P<made>{_DIGEST.pattern})/(?P<run>{_DIGEST.pattern})\.(?P<form>json|html|sealed)"
    rf"|secrets/(?P<secret>[0-9]{{{NUMBER_DIGITS}}})\.json"
    rf"|(?P<signed>{_DIGEST.pattern})\.sigs/(?P<key>{_DIGEST.pattern})\.json"
    rf"|refs/(?P<alias>{_ALIAS.pattern})/(?P<number>[0-9]{{{NUMBER_DIGITS}}})\.json)"
)


def blob(digest: str) -> str:
    """Key of the blob with this sha256 (hex)."""
    return BLOBS + _checked(_DIGEST, digest, "a sha256 digest", "64 hex digits")


def manifest(name: str, digest: str) -> str:
    """Key of a pack's manifest."""
    return f"{manifests(name)}{_checked(_DIGEST, digest, 'a pack digest', '64 hex digits')}.json"


def manifests(name: str) -> str:
    """Prefix of all manifests of a pack name (and of its pointers, below ``refs/``)."""
    return f"{PACKS}{_checked(_NAME, name, 'a pack name', 'lower-case letters, digits, dot, dash, underscore')}/"


def signatures(name: str, digest: str) -> str:
    """Prefix of all signatures of a manifest."""
    return f"{manifest(name, digest).removesuffix('.json')}.sigs/"


def signature(name: str, digest: str, key_id: str) -> str:
    """Key of a manifest's signature by the key of this id."""
    return f"{signatures(name, digest)}{_checked(_DIGEST, key_id, 'the id of a key', '64 hex digits')}.json"


def pointers(name: str, alias: str) -> str:
    """Prefix of the log of one alias."""
    legal = "a lower-case letter, then letters, digits, dash, underscore"
    return f"{manifests(name)}refs/{_checked(_ALIAS, alias, 'an alias', legal)}/"


def pointer(name: str, alias: str, number: int) -> str:
    """Key of one entry; numbers count from 1 and are padded so that keys sort like numbers."""
    return f"{pointers(name, alias)}{number:0{NUMBER_DIGITS}d}.json"


def secrets(name: str) -> str:
    """Prefix of the log of a model's wrapped secrets."""
    return f"{manifests(name)}secrets/"


def secret(name: str, number: int) -> str:
    """Key of one entry of that log, numbered like a pointer's."""
    return f"{secrets(name)}{number:0{NUMBER_DIGITS}d}.json"


def decisions(name: str, digest: str = "") -> str:
    """Prefix of what gates decided of a pack; of all packs of the name without its digest."""
    legal = _checked(_DIGEST, digest, "a pack digest", "64 hex digits") + "/" if digest else ""
    return f"{manifests(name)}decisions/{legal}"


def decision(name: str, digest: str, record: str) -> str:
    """Key of one such decision; `record` is the sha256 of its bytes."""
    _checked(_DIGEST, digest, "a pack digest", "64 hex digits")
    return f"{decisions(name, digest)}{_checked(_DIGEST, record, 'the id of a decision', '64 hex digits')}.json"


def runs(name: str, digest: str) -> str:
    """Prefix of the runs that made a pack, and of their pages."""
    return f"{manifests(name)}runs/{_checked(_DIGEST, digest, 'a pack digest', '64 hex digits')}/"


def run(name: str, digest: str, record: str) -> str:
    """Key of one such run; `record` is the sha256 of its bytes."""
    return f"{runs(name, digest)}{_checked(_DIGEST, record, 'the id of a run', '64 hex digits')}.json"


def page(name: str, digest: str, page: str, *, sealed: bool = False) -> str:
    """Key of the page of a run, by the sha256 of its bytes; `sealed` where they are encrypted."""
    legal = _checked(_DIGEST, page, "the id of a page", "64 hex digits")
    return f"{runs(name, digest)}{legal}.{'sealed' if sealed else 'html'}"


def pointer_number(key: str) -> int | None:
    """The number in the key of an entry, of a pointer or of secrets; None for a key that is none."""
    found = place(key)
    return found.number if found is not None and found.kind in ("pointer", "secret") else None


@dataclass(frozen=True)
class Place:
    """What a key below `packs/` is the key of."""

    kind: Literal["manifest", "signature", "pointer", "secret", "decision", "run", "page"]
    name: str
    digest: str = ""
    """Of the manifest, or of the manifest that is signed, judged, or was made."""
    key_id: str = ""
    alias: str = ""
    number: int = 0
    record: str = ""
    """Of a decision, a run or a page: its own digest."""


def place(key: str) -> Place | None:
    """What lies under a key; None for a key that publishing, encrypting, signing and promoting do not make."""
    if match := _PLACE.fullmatch(key):
        name, digest, signed, key_id, alias, number = match.group("name", "digest", "signed", "key", "alias", "number")
        if digest:
            return Place("manifest", name, digest)
        if signed:
            return Place("signature", name, signed, key_id)
        if match["secret"]:
            return Place("secret", name, number=int(match["secret"]))
        if match["judged"]:
            return Place("decision", name, match["judged"], record=match["decision"])
        if match["made"]:
            kind: Literal["run", "page"] = "run" if match["form"] == "json" else "page"
            return Place(kind, name, match["made"], record=match["run"])
        return Place("pointer", name, alias=alias, number=int(number))
    return None


def blob_digest(key: str) -> str | None:
    """The digest in a blob's key; None for a key that is none."""
    digest = key.removeprefix(BLOBS)
    return digest if key.startswith(BLOBS) and is_digest(digest) else None


def pointer_owner(key: str) -> tuple[str, str] | None:
    """Pack name and alias of an entry's key; None for a key that is none."""
    found = place(key)
    return (found.name, found.alias) if found is not None and found.kind == "pointer" else None


def manifest_owner(key: str) -> tuple[str, str] | None:
    """Pack name and digest in a manifest's key; None for a key that is none."""
    found = place(key)
    return (found.name, found.digest) if found is not None and found.kind == "manifest" else None


def beside(key: str) -> Place | None:
    """The signature, run or page under this key, of no use without its pack; None for a key of another kind."""
    found = place(key)
    return found if found is not None and found.kind in ("signature", "run", "page") else None


def intent(name: str, token: str) -> str:
    """Key of what an upload under way says that it needs."""
    return f"{UPLOADS}{manifests(name).removeprefix(PACKS)}{token}.json"


def is_intent(key: str) -> bool:
    """Whether an intent lies under this key."""
    return re.fullmatch(rf"{UPLOADS}{_NAME.pattern}/[0-9a-f]{{32}}\.json", key) is not None


def turn(number: int, *, ended: bool = False) -> str:
    """Key of a collector's turn, and of the mark that it is over; numbers count from 1."""
    return f"{COLLECTIONS}{number:0{NUMBER_DIGITS}d}.{'ended' if ended else 'json'}"


def turn_number(key: str) -> tuple[int, bool] | None:
    """Number of a turn's key, and whether it is the mark of its end; None for a key that is none."""
    match = re.fullmatch(rf"{COLLECTIONS}([0-9]{{{NUMBER_DIGITS}}})\.(json|ended)", key)
    return (int(match[1]), match[2] == "ended") if match else None


def tallies(name: str, canary: str | None = None) -> str:
    """Prefix of what servers saw of one canary of a pack name, or of all of them."""
    prefix = f"{CANARIES}{manifests(name).removeprefix(PACKS)}"
    return prefix if canary is None else f"{prefix}{_checked(_TOKEN, canary, 'the id of a canary', _HEX)}/"


def tally(name: str, canary: str, server: str) -> str:
    """Key of what one server saw of a canary."""
    return f"{tallies(name, canary)}{_checked(_TOKEN, server, 'the id of a server', _HEX)}.json"


def tally_server(key: str) -> str | None:
    """Id of the server whose tally lies under this key; None for a key that is none."""
    match = re.fullmatch(rf"{CANARIES}{_NAME.pattern}/[0-9a-f]{{32}}/([0-9a-f]{{32}})\.json", key)
    return match[match.lastindex or 0] if match else None


def is_digest(text: str) -> bool:
    """Whether `text` is a whole sha256 in lower-case hex."""
    return _DIGEST.fullmatch(text) is not None


def is_name(text: str) -> bool:
    """Whether `text` can be the name of a pack."""
    return _NAME.fullmatch(text) is not None


def is_alias(text: str) -> bool:
    """Whether `text` can be an alias."""
    return _ALIAS.fullmatch(text) is not None


def _checked(pattern: re.Pattern[str], text: str, what: str, legal: str) -> str:
    if not pattern.fullmatch(text):
        raise ConfigError(f"using {what}", found=repr(text), expected=legal)
    return text
