"""From a name to a manifest: an alias, a digest or its first digits stand for one published pack."""

from __future__ import annotations

import re

from modelpress import keys, pointer
from modelpress.errors import ConfigError, CorruptionError, NotFoundError
from modelpress.manifest import Manifest
from modelpress.store.base import Store, get_capped
from modelpress.trust import Signed, check_pack

MIN_PREFIX = 12
MAX_MANIFEST_BYTES = 2**28


def resolve(store: Store, name: str, ref: str) -> str:
    """The digest that `ref` stands for: an alias, a digest (also ``sha256:...``), or at least 12 of its first digits.

    Raises:
        NotFoundError: there is no such pack or alias.
        ConfigError: `ref` is none of these, or fits several packs.
    """
    text = ref.removeprefix("sha256:")
    if keys.is_digest(text):
        return text
    if keys.is_alias(ref) and (entry := pointer.current(store, name, ref)) is not None:
        return entry.pack
    doing = f"resolving {name}@{ref}"
    if not re.fullmatch(rf"[0-9a-f]{{{MIN_PREFIX},63}}", text):
        if keys.is_alias(ref):
            known = ", ".join(_aliases(store, name)) or "none"
            raise NotFoundError(
                doing,
                found=f"no alias {ref!r} of {name} on {store.uri}; there are: {known}",
                fix="publish and promote a pack first, or name it by its digest",
            )
        raise ConfigError(doing, found=repr(ref), expected=f"an alias, a digest, or {MIN_PREFIX} of its first digits")
    places = (keys.place(info.key) for info in store.list(keys.manifests(name) + text))
    fits = [place.digest for place in places if place is not None and place.kind == "manifest"]
    if len(fits) != 1:
        error = ConfigError if fits else NotFoundError
        raise error(doing, found=f"{len(fits)} packs that begin so on {store.uri}", expected="one")
    return fits[0]


def load_manifest(store: Store, name: str, digest: str) -> Manifest:
    """Read and verify a manifest; with a trust file nothing of it is read before its signatures are checked.

    Raises:
        TrustError: the store has a trust file, and the signatures that it requires are not there.
        NotFoundError: no such pack.
        CorruptionError: its bytes do not have this digest, are more than `MAX_MANIFEST_BYTES`, or name another pack.
        UnsupportedFormatError: written by a newer modelpress.
    """
    key = keys.manifest(name, digest)
    check_trust(store, name, digest)
    data = get_capped(store, key, MAX_MANIFEST_BYTES, f"loading pack {name}@{digest[:MIN_PREFIX]}")
    manifest = Manifest.parse(data, digest)
    if manifest.name != name:
        raise CorruptionError(f"loading {store.uri}/{key}", found=f"a pack named {manifest.name}", expected=name)
    return manifest


def check_trust(store: Store, name: str, digest: str) -> tuple[Signed, ...]:
    """The signatures that vouch for a pack; none where the store has no trust file.

    Raises:
        TrustError: the store has a trust file, and the signatures that it requires are not there.
    """
    return check_pack(store, store.trust.policy(), name, digest) if store.trust is not None else ()


def _aliases(store: Store, name: str) -> list[str]:
    prefix = f"{keys.manifests(name)}refs/"
    return sorted({info.key.removeprefix(prefix).partition("/")[0] for info in store.list(prefix)})
