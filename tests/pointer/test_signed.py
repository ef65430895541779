"""Signed pointers: no entry counts that was forged, replayed, or put behind a log that was cut."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable

import pytest

from modelpress import keys, pointer
from modelpress.errors import (
    CorruptionError,
    KeyRefusedError,
    LogCutError,
    SignatureError,
    TrustError,
    UnsignedError,
)
from modelpress.pointer import Pointer
from modelpress.publish import publish
from modelpress.store import Store
from modelpress.trust.seen import Seen
from tests.trust.conftest import team
from tests.trust.teams import NAME, Team, manifest

__all__ = ["team"]
ALIAS = "champion"
LOG = keys.pointers(NAME, ALIAS)


def put(store: Store, note: str, name: str = NAME) -> str:
    return publish(store, manifest(note, name), [], {}, source_bytes=1).pack


@pytest.fixture
def packs(team: Team) -> list[str]:
    """Three signed packs; the alias went from the first to the second."""
    store = team.store("farm")
    packs = [put(store, note) for note in "abc"]
    for pack in packs[:2]:
        pointer.append(store, NAME, ALIAS, pack, "promote")
    return packs


def current(store: Store) -> str:
    entry = pointer.current(store, NAME, ALIAS)
    assert entry is not None
    return entry.pack


def write(team: Team, entry: Pointer, at: int | None = None) -> None:
    team.store().put(keys.pointer(NAME, ALIAS, at or entry.number), entry.to_bytes())


def test_a_signed_log_is_followed(team: Team, packs: list[str]) -> None:
    entries = pointer.history(team.store(), NAME, ALIAS)
    assert [entry.pack for entry in entries] == packs[:2]
    assert all(entry.format_version == 2 and entry.signature for entry in entries)
    assert entries == pointer.history(team.store(trusting=False), NAME, ALIAS)
    assert pointer.rollback(team.store("farm"), NAME, ALIAS).pack == packs[0]
    assert current(team.store()) == packs[0]


def test_without_a_key_entries_are_what_they_were(team: Team) -> None:
    store = team.store(trusting=False)
    entry = pointer.append(store, NAME, ALIAS, put(store, "a"), "promote")
    assert "signature" not in json.loads(store.get(keys.pointer(NAME, ALIAS, 1)))
    assert entry.format_version == 1
    with pytest.raises(UnsignedError):
        pointer.current(team.store(), NAME, ALIAS)


def test_whoever_may_not_sign_moves_nothing(team: Team, packs: list[str]) -> None:
    for owner, kind in ((None, UnsignedError), ("anna", KeyRefusedError)):
        with pytest.raises(kind):
            pointer.append(team.store(owner), NAME, ALIAS, packs[2], "promote")
    unsigned = put(team.store(), "d")
    with pytest.raises(UnsignedError):
        pointer.append(team.store("farm"), NAME, ALIAS, unsigned, "promote")
    assert current(team.store()) == packs[1]


def third(team: Team, packs: list[str], **changes: object) -> Pointer:
    """What an attacker starts from: an entry 3 that fits the log."""
    last = pointer.history(team.store(trusting=False), NAME, ALIAS)[-1]
    return last.model_copy(
        update={"number": 3, "previous": last.digest, "format_version": 1, "signature": None, "pack": packs[0]}
        | changes
    )


def unsigned(team: Team, packs: list[str]) -> None:
    write(team, third(team, packs))


def signature_of_another_entry(team: Team, packs: list[str]) -> None:
    old = pointer.history(team.store(), NAME, ALIAS)[0]
    write(team, third(team, packs, format_version=2, signature=old.signature))


def by_a_key_outside(team: Team, packs: list[str]) -> None:
    (team.folder / "out").mkdir()
    write(team, third(team, packs).signed(Team(team.folder / "out", eve="publisher").signers["eve"]))


def by_another_role(team: Team, packs: list[str]) -> None:
    write(team, third(team, packs).signed(team.signers["anna"]))


def renamed_old_entry(team: Team, packs: list[str]) -> None:
    """The first entry, validly signed, again as number 3."""
    first = pointer.history(team.store(), NAME, ALIAS)[0]
    write(team, first, at=3)


def renumbered_old_entry(team: Team, packs: list[str]) -> None:
    first = pointer.history(team.store(), NAME, ALIAS)[0]
    write(team, first.model_copy(update={"number": 3, "previous": None}))


def of_another_alias(team: Team, packs: list[str]) -> None:
    store = team.store("farm")
    for pack in (packs[2], packs[2], packs[0]):
        entry = pointer.append(store, NAME, "canary", pack, "promote")
    write(team, entry)


def of_another_alias_relabelled(team: Team, packs: list[str]) -> None:
    store = team.store("farm")
    for pack in (packs[2], packs[2], packs[0]):
        entry = pointer.append(store, NAME, "canary", pack, "promote")
    write(team, entry.model_copy(update={"alias": ALIAS}))


def another_spelling_of_the_signature(team: Team, packs: list[str]) -> None:
    entry = third(team, packs).signed(team.signers["farm"])
    assert entry.signature is not None
    sig = entry.signature.sig
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    twin = sig[:85] + alphabet[alphabet.index(sig[85]) + 1] + "=="
    assert base64.b64decode(twin) == base64.b64decode(sig)
    write(team, entry.model_copy(update={"signature": entry.signature.model_copy(update={"sig": twin})}))


@pytest.mark.parametrize(
    ("attack", "kind"),
    [
        (unsigned, UnsignedError),
        (signature_of_another_entry, SignatureError),
        (by_a_key_outside, KeyRefusedError),
        (by_another_role, KeyRefusedError),
        (renamed_old_entry, CorruptionError),
        (renumbered_old_entry, SignatureError),
        (of_another_alias, CorruptionError),
        (of_another_alias_relabelled, SignatureError),
        (another_spelling_of_the_signature, SignatureError),
    ],
)
def test_an_entry_that_nobody_wrote_here(
    team: Team, packs: list[str], attack: Callable[[Team, list[str]], None], kind: type[Exception]
) -> None:
    attack(team, packs)
    with pytest.raises(kind):
        pointer.current(team.store(), NAME, ALIAS)
    for read in (pointer.history, pointer.rollback):
        with pytest.raises((kind, CorruptionError)):  # the chain may tell first
            read(team.store("farm"), NAME, ALIAS)
    team.store().delete(keys.pointer(NAME, ALIAS, 3))
    assert current(team.store()) == packs[1]


def test_a_cut_log_is_refused_by_the_next_process_too(team: Team, packs: list[str]) -> None:
    assert current(team.store()) == packs[1]
    second = team.store().get(keys.pointer(NAME, ALIAS, 2))
    for number in (2, 1):
        team.store().delete(keys.pointer(NAME, ALIAS, number))
        for read in (pointer.current, pointer.history):
            with pytest.raises(LogCutError, match="entry 2"):
                read(team.store(), NAME, ALIAS)  # a new object each time, as after a restart
    with pytest.raises(LogCutError):
        pointer.append(team.store("farm"), NAME, ALIAS, packs[0], "promote")
    assert team.trust().seen.forget(team.store().uri, NAME, ALIAS)
    assert not team.trust().seen.forget(team.store().uri, NAME, ALIAS)
    assert pointer.current(team.store(), NAME, ALIAS) is None
    team.store().put(keys.pointer(NAME, ALIAS, 2), second)
    assert current(team.store()) == packs[1]


def test_a_log_that_forked_is_refused(team: Team, packs: list[str]) -> None:
    """Two entries of one number, both signed: those of a copy of the store, put back over this one."""
    copy = {info.key: team.store().get(info.key) for info in team.store().list(LOG)}
    for pack in (packs[2], packs[0]):
        pointer.append(team.store("farm"), NAME, ALIAS, pack, "promote")
    assert current(team.store()) == packs[0]
    kept = team.store().get(keys.pointer(NAME, ALIAS, 4))
    for number in (3, 4):
        team.store().delete(keys.pointer(NAME, ALIAS, number))
    elsewhere = team.store("farm")
    elsewhere.trust = team.trust()
    elsewhere.trust.seen = Seen(team.folder / "elsewhere")
    for pack in (packs[0], packs[1], packs[2]):
        pointer.append(elsewhere, NAME, ALIAS, pack, "promote")
    assert set(copy) < {info.key for info in team.store().list(LOG)}
    with pytest.raises(LogCutError, match="entry 4"):
        pointer.current(team.store(), NAME, ALIAS)
    team.store().put(keys.pointer(NAME, ALIAS, 4), kept)  # the entry that was seen, and one that does not follow it
    with pytest.raises(LogCutError):
        pointer.current(team.store(), NAME, ALIAS)


def test_a_log_that_went_on_is_followed_over_many_entries(team: Team, packs: list[str]) -> None:
    reader = team.store()
    reader.trust = team.trust()
    reader.trust.seen = Seen(team.folder / "reader")
    assert current(reader) == packs[1]
    for pack in (packs[2], packs[0], packs[2]):
        pointer.append(team.store("farm"), NAME, ALIAS, pack, "promote")
    assert current(reader) == packs[2]
    mark = reader.trust.seen.read(reader.uri, NAME, ALIAS)
    assert mark is not None
    assert mark.number == 5


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"store":1}'])
def test_a_damaged_mark_is_told(team: Team, packs: list[str], content: bytes) -> None:
    (mark,) = (team.folder / "seen").rglob("*.json")
    mark.write_bytes(content)
    with pytest.raises(CorruptionError, match="how far demo@champion was seen"):
        pointer.current(team.store(), NAME, ALIAS)


def test_a_revoked_key_moves_nothing_and_another_signs_again(team: Team, packs: list[str]) -> None:
    new = team.add("new-farm")
    team.change("farm", revoked="2026-01-01T00:00:00Z")
    for read in (pointer.current, pointer.history):
        with pytest.raises(KeyRefusedError, match="revoked"):
            read(team.store(), NAME, ALIAS)
    store = team.store("new-farm")
    with pytest.raises(TrustError):  # the pack's own signature comes first
        pointer.renew(store, store.held_to(team.trust().pardoning(team.signers["farm"].key_id)), NAME, ALIAS)
    from modelpress.trust import sign_pack

    sign_pack(store, new, NAME, packs[1])
    with pytest.raises(KeyRefusedError):
        pointer.renew(store, store, NAME, ALIAS)
    entry = pointer.renew(store, store.held_to(team.trust().pardoning(team.signers["farm"].key_id)), NAME, ALIAS)
    assert entry is not None
    assert (entry.pack, entry.reason) == (packs[1], pointer.RENEWAL)
    assert current(team.store()) == packs[1]
    assert len(pointer.history(team.store(), NAME, ALIAS)) == 3
    with pytest.raises(KeyRefusedError):  # its pack is signed by the revoked key alone
        pointer.rollback(store, NAME, ALIAS)
