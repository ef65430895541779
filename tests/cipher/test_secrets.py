"""A model's secrets: made once, wrapped anew, opened by the right key alone, and every wrong one named."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from modelpress import keys
from modelpress.cipher import LocalKey, secrets
from modelpress.errors import ConflictError, CorruptionError, EncryptionKeyError, UnsupportedFormatError
from modelpress.manifest import canonical_json
from modelpress.store import Store, open_store
from modelpress.store.base import ObjectInfo

A, B = LocalKey(b"A" * 32), LocalKey(b"B" * 32)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def change(store: Store, number: int, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edit an entry as who can write to the store could."""
    key = keys.secret("demo", number)
    document = json.loads(store.get(key))
    edit(document)
    store.put(key, canonical_json(document))


def test_the_first_publication_makes_the_secret_and_the_next_ones_find_it(store: Store) -> None:
    first = secrets.current(store, "demo", [A])
    assert secrets.current(store, "demo", [A]) == first
    assert secrets.find(store, "demo", first[0], [B, A]) == first[1]
    (entry,) = secrets.history(store, "demo")
    assert (entry.number, entry.key, entry.secrets) == (1, A.id, (first[0],))
    text = store.get(keys.secret("demo", 1)).decode()
    for form in (first[1].hex(), base64.b64encode(first[1]).decode(), base64.b64encode(b"A" * 32).decode()):
        assert form not in text


def test_of_many_first_publications_all_take_the_same_secret(store: Store) -> None:
    found: list[tuple[str, bytes]] = []
    together = threading.Barrier(8)

    def publish() -> None:
        together.wait()
        found.append(secrets.current(store, "demo", [A]))

    threads = [threading.Thread(target=publish) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert len(secrets.history(store, "demo")) == 1


def test_rotation_wraps_the_same_secrets_and_the_old_key_opens_until_it_is_forgotten(store: Store) -> None:
    old_id, old = secrets.current(store, "demo", [A])
    new_id = secrets.renew(store, "demo", [A]).secrets[-1]
    assert secrets.current(store, "demo", [A])[0] == new_id != old_id
    entry = secrets.rewrap(store, "demo", [B, A])
    assert (entry.number, entry.key, entry.secrets) == (3, B.id, (old_id, new_id))
    assert secrets.rewrap(store, "demo", [B, A]) == entry, "a second time there is nothing to do"
    assert len(secrets.history(store, "demo")) == 3
    assert secrets.find(store, "demo", old_id, [A]) == secrets.find(store, "demo", old_id, [B]) == old
    with pytest.raises(EncryptionKeyError):
        secrets.forget(store, "demo", [A, B])
    assert [entry.number for entry in secrets.forget(store, "demo", [B])] == [1, 2]
    assert secrets.find(store, "demo", old_id, [B]) == old
    with pytest.raises(EncryptionKeyError, match=B.id):
        secrets.find(store, "demo", old_id, [A])


def test_a_reader_meets_a_rotation_that_forgets_the_old_entries(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are deleted after they were listed and before they are read."""
    made = secrets.current(store, "demo", [A])
    secrets.rewrap(store, "demo", [B, A])
    listed, there = store.list, True

    def then_forget(prefix: str = "") -> Iterator[ObjectInfo]:
        nonlocal there
        found = list(listed(prefix))
        if there:
            there = False
            secrets.forget(store, "demo", [B])
        return iter(found)

    monkeypatch.setattr(store, "list", then_forget)
    assert secrets.find(store, "demo", made[0], [B]) == made[1]
    assert not there
    assert [entry.number for entry in secrets.history(store, "demo")] == [2]


def test_missing_and_wrong_keys_are_named_and_nothing_of_them_is_shown(store: Store) -> None:
    secret, _ = secrets.current(store, "demo", [A])
    with pytest.raises(EncryptionKeyError) as none:
        secrets.find(store, "demo", secret, [])
    assert "keys in the settings: none" in str(none.value)
    assert A.id in str(none.value)
    assert "MODELPRESS_KEY_FILE" in str(none.value)
    with pytest.raises(EncryptionKeyError) as wrong:
        secrets.current(store, "demo", [B])
    assert B.id in str(wrong.value)
    assert A.id in str(wrong.value)
    with pytest.raises(EncryptionKeyError, match="no key in the settings"):
        secrets.current(store, "new-model", [])
    assert secrets.history(store, "new-model") == []
    with pytest.raises(EncryptionKeyError, match="restore the entry"):
        secrets.find(store, "demo", "f" * 32, [A])
    for error in (none.value, wrong.value):
        for key in (b"A" * 32, b"B" * 32):
            assert key.hex() not in str(error)
            assert base64.b64encode(key).decode() not in str(error)


def test_every_flipped_byte_of_what_is_wrapped_is_refused(store: Store) -> None:
    secret, _ = secrets.current(store, "demo", [A])
    original = store.get(keys.secret("demo", 1))
    wrapped = base64.b64decode(json.loads(original)["wrapped"])
    for position in range(len(wrapped)):
        changed = bytearray(wrapped)
        changed[position] ^= 1
        change(store, 1, lambda entry, data=bytes(changed): entry.update(wrapped=base64.b64encode(data).decode()))
        with pytest.raises(CorruptionError, match="restore the entry"):
            secrets.find(store, "demo", secret, [A])
    for text in ("", "AAAA", "!!!!"):
        change(store, 1, lambda entry, text=text: entry.update(wrapped=text))
        with pytest.raises(CorruptionError):
            secrets.find(store, "demo", secret, [A])
    store.put(keys.secret("demo", 1), original)
    assert secrets.find(store, "demo", secret, [A])


def test_what_was_wrapped_for_another_place_is_refused(store: Store) -> None:
    """Who can write to the store cannot move a secret: not to another model, nor another number, nor reorder."""
    secret, _ = secrets.current(store, "demo", [A])
    secrets.current(store, "other", [A])
    other = json.loads(store.get(keys.secret("other", 1)))
    change(store, 1, lambda entry: entry.update(wrapped=other["wrapped"]))
    with pytest.raises(CorruptionError, match="modelpress:name demo"):
        secrets.find(store, "demo", secret, [A])
    store.put(keys.secret("demo", 1), store.get(keys.secret("other", 1)))
    with pytest.raises(CorruptionError, match="entry 1 of other"):
        secrets.find(store, "demo", secret, [A])


def test_an_old_entry_brought_back_as_the_newest_and_other_orders_are_refused(store: Store) -> None:
    leaked, _ = secrets.current(store, "demo", [A])
    secrets.renew(store, "demo", [A])
    old = json.loads(store.get(keys.secret("demo", 1)))
    store.put(keys.secret("demo", 3), canonical_json(old | {"number": 3}))
    with pytest.raises(CorruptionError, match="for another place"):
        secrets.current(store, "demo", [A])
    store.delete(keys.secret("demo", 3))
    change(store, 2, lambda entry: entry.update(secrets=entry["secrets"][::-1]))
    with pytest.raises(CorruptionError, match="for another place"):
        secrets.current(store, "demo", [A])
    assert leaked in secrets.history(store, "demo")[1].secrets


class Careless(LocalKey):
    """A key that checks no context, as a KMS grant without one: the ids still tell one secret from another."""

    def unwrap(self, key_id: str, wrapped: bytes, context: Any) -> bytes | None:
        return bytes(32)


def test_a_secret_that_opens_and_is_another_is_refused(store: Store) -> None:
    secret, _ = secrets.current(store, "demo", [A])
    with pytest.raises(CorruptionError, match="of another model"):
        secrets.find(store, "demo", secret, [Careless(b"A" * 32)])


@pytest.mark.parametrize(
    ("edit", "error", "says"),
    [
        (lambda entry: entry.update(format_version=2), UnsupportedFormatError, "format version 2"),
        (lambda entry: entry.update(more=1), CorruptionError, "more"),
        (lambda entry: entry.update(secrets=[]), CorruptionError, "secrets"),
        (lambda entry: entry.update(number=2), CorruptionError, "entry 2"),
        (lambda entry: entry.update(algorithm="rot13"), CorruptionError, "algorithm"),
        (lambda entry: entry.pop("key"), CorruptionError, "key"),
    ],
)
def test_entries_that_are_none_are_refused(
    store: Store, edit: Callable[[dict[str, Any]], None], error: type[Exception], says: str
) -> None:
    secret, _ = secrets.current(store, "demo", [A])
    change(store, 1, edit)
    with pytest.raises(error, match=says):
        secrets.find(store, "demo", secret, [A])
    store.put(keys.secret("demo", 1), b"x" * (secrets.MAX_ENTRY_BYTES + 1))
    with pytest.raises(CorruptionError, match="at most"):
        secrets.find(store, "demo", secret, [A])


def test_an_answer_that_was_lost_meets_its_own_entry(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put = store.put
    monkeypatch.setattr(store, "put", lambda *given, **named: put(*given, **named) and False)
    secret, _ = secrets.current(store, "demo", [A])
    assert [entry.secrets for entry in secrets.history(store, "demo")] == [(secret,)]


def test_a_race_that_is_always_lost_ends(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets.current(store, "demo", [A])
    monkeypatch.setattr(secrets, "_append", lambda *_: None)
    monkeypatch.setattr(secrets.time, "sleep", lambda _: None)
    with pytest.raises(ConflictError, match="lost races"):
        secrets.renew(store, "demo", [A])
    with pytest.raises(ConflictError, match="lost races"):
        secrets.rewrap(store, "demo", [B, A])
