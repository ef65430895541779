"""Sign what stands in a store: one pack, or all of them when trust begins, when a key is replaced, or was revoked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from modelpress import keys, load, pointer
from modelpress.errors import ConfigError, ModelpressError
from modelpress.store.base import Store
from modelpress.trust.packs import check_signer, read_signature, sign_pack
from modelpress.trust.signer import Signer


@dataclass(frozen=True)
class Done:
    """What was done about a pack or an alias."""

    what: str
    """`name@digest` or `name@alias`."""
    outcome: str
    """`signed`, `signed before`, `left` or `refused`."""
    reason: str = ""


def own_signer(store: Store, doing: str) -> Signer:
    """The key to sign with.

    Raises:
        ConfigError: there is none.
    """
    if store.signer is None:
        raise ConfigError(doing, found="no key to sign with", fix="set MODELPRESS_SIGNING_KEY_FILE")
    return store.signer


def sign_one(store: Store, name: str, digest: str) -> Done:
    """Read everything of a pack, whatever signatures it has, and sign it.

    Raises:
        ConfigError: there is no key.
        KeyRefusedError: the store has a trust file, and the key's signature would not count for this pack.
        FormatError, StoreError: the pack is not in order; see `load.verify`.
    """
    doing = f"signing {name}@{digest[:12]}"
    signer = own_signer(store, doing)
    if store.trust is not None:
        policy = store.trust.policy()
        check_signer(policy, signer, name, tuple({key.role for key in policy.keys}), doing)
    load.verify(store.held_to(None), name, digest)
    new = sign_pack(store, signer, name, digest)
    return Done(f"{name}@{digest[:12]}", "signed" if new else "signed before")


def sign_all(store: Store, signed_by: str | None = None) -> Iterator[Done]:
    """Sign every pack that would be loaded, and every alias that would be followed by a new entry, and tell of each.

    Every pack is read whole before it is signed; what is refused does not stop the rest. Without a trust file whatever
    stands in the store is vouched for: that is how trust begins. With one, it is what its keys vouch for: that is how a
    new key takes over.

    Args:
        store: the publication store, with a key to sign with.
        signed_by: only what this key vouches for, though it be revoked or expired: it must be in the trust file.

    Raises:
        ConfigError: there is no key, or `signed_by` names none.
        StoreError: the store does not answer.
    """
    own_signer(store, "signing everything")
    accepted = pardoned(store, signed_by) if signed_by is not None else store
    aliases: dict[tuple[str, str], None] = {}
    for info in store.list(keys.PACKS):
        place = keys.place(info.key)
        if place is not None and place.kind == "pointer":
            aliases[place.name, place.alias] = None
        elif place is not None and place.kind == "manifest":
            try:
                yield _vouched(accepted, place, signed_by) or sign_one(store, place.name, place.digest)
            except ModelpressError as error:
                yield Done(f"{place.name}@{place.digest[:12]}", "refused", str(error))
    for name, alias in aliases:
        try:
            yield _renew(store, accepted, name, alias, signed_by)
        except ModelpressError as error:
            yield Done(f"{name}@{alias}", "refused", str(error))


def pardoned(store: Store, signed_by: str) -> Store:
    """The store, with one key counted whatever the trust file says of it.

    Raises:
        ConfigError: there is no trust file, or the key is not in it.
    """
    doing = f"counting what key {signed_by[:12]} signed"
    if store.trust is None:
        raise ConfigError(doing, found="no trust file", fix="set MODELPRESS_TRUST: it has the key's public half")
    policy = store.trust.policy()
    if policy.find(signed_by) is None:
        known = ", ".join(key.id for key in policy.keys)
        raise ConfigError(doing, found="a key that is not in the trust file", expected=f"one of {known}")
    return store.held_to(store.trust.pardoning(signed_by))


def _vouched(accepted: Store, place: keys.Place, signed_by: str | None) -> Done | None:
    """None where the pack may be signed: it counts, or `signed_by` signed it.

    Raises:
        TrustError: it does not count.
    """
    if signed_by is None or accepted.trust is None:
        load.check_trust(accepted, place.name, place.digest)
        return None
    found = read_signature(accepted, accepted.trust.policy(), place.name, place.digest, signed_by)
    if found is not None and found.problem is None:
        return None
    reason = "no signature by this key" if found is None else found.line()
    return Done(f"{place.name}@{place.digest[:12]}", "left", reason)


def _renew(store: Store, accepted: Store, name: str, alias: str, signed_by: str | None) -> Done:
    what = f"{name}@{alias}"
    entry = pointer.current(accepted, name, alias)
    by = entry.signature.keyid if entry is not None and entry.signature is not None else None
    if entry is None or (store.signer is not None and by == store.signer.key_id):
        return Done(what, "signed before")
    if signed_by is not None and by != signed_by:
        return Done(what, "left", "its newest entry is not by this key")
    pointer.renew(store, accepted, name, alias)
    return Done(what, "signed")
