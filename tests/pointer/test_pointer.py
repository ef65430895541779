from __future__ import annotations

import hashlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelpress import keys, pointer
from modelpress.errors import ConfigError, ConflictError, CorruptionError, NotFoundError, UnsupportedFormatError
from modelpress.store import Store
from modelpress.store.local import LocalStore
from tests.conftest import OpenS3

A, B, C = (hashlib.sha256(text).hexdigest() for text in (b"a", b"b", b"c"))


def with_manifests(store: Store) -> Store:
    for digest in (A, B, C):
        store.put(keys.manifest("demo", digest), b"{}")
    return store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return with_manifests(LocalStore(tmp_path))


def packs(store: Store) -> list[str]:
    return [entry.pack for entry in pointer.history(store, "demo", "champion")]


def test_an_alias_that_was_never_set(store: Store) -> None:
    assert pointer.current(store, "demo", "champion") is None
    assert pointer.history(store, "demo", "champion") == []
    with pytest.raises(NotFoundError, match="never set"):
        pointer.rollback(store, "demo", "champion")


def test_the_highest_entry_is_current_and_each_holds_the_digest_of_the_one_before(store: Store) -> None:
    first = pointer.append(store, "demo", "champion", A, "promote", {"promote": True, "drop": 0.001})
    second = pointer.append(store, "demo", "champion", B, "promote")
    assert (first.number, second.number) == (1, 2)
    assert first.previous is None
    assert second.previous == hashlib.sha256(store.get(keys.pointer("demo", "champion", 1))).hexdigest()
    assert pointer.current(store, "demo", "champion") == second
    assert pointer.history(store, "demo", "champion") == [first, second]
    assert first.decision == {"promote": True, "drop": 0.001}
    assert pointer.current(store, "demo", "challenger") is None


def test_numbers_sort_like_numbers(store: Store) -> None:
    for number in range(12):
        pointer.append(store, "demo", "champion", (A, B)[number % 2], "promote")
    last = pointer.current(store, "demo", "champion")
    assert last is not None
    assert last.number == 12


@pytest.mark.parametrize("pack", ["0" * 64])
def test_a_pack_that_is_not_published_is_refused(store: Store, pack: str) -> None:
    with pytest.raises(NotFoundError, match=pack):
        pointer.append(store, "demo", "champion", pack, "promote")
    with pytest.raises(NotFoundError):
        pointer.append(store, "other", "champion", A, "promote")
    assert pointer.history(store, "demo", "champion") == []


@pytest.mark.parametrize(
    ("name", "alias", "pack"), [("../x", "champion", A), ("demo", "../x", A), ("demo", "champion", "abc"), ("", "a", A)]
)
def test_illegal_names_are_refused(store: Store, name: str, alias: str, pack: str) -> None:
    with pytest.raises(ConfigError):
        pointer.append(store, name, alias, pack, "promote")


def test_rollbacks_go_further_back(store: Store) -> None:
    for pack in (A, B, B, C):
        pointer.append(store, "demo", "champion", pack, "promote")
    assert pointer.rollback(store, "demo", "champion").pack == B
    assert pointer.rollback(store, "demo", "champion").pack == A
    with pytest.raises(NotFoundError, match=f"only pack {A}"):
        pointer.rollback(store, "demo", "champion")
    pointer.append(store, "demo", "champion", C, "promote")
    assert pointer.rollback(store, "demo", "champion").pack == A
    assert packs(store) == [A, B, B, C, B, A, C, A]
    assert {entry.reason for entry in pointer.history(store, "demo", "champion")} == {"promote", "rollback"}


def test_rollback_to_a_named_pack(store: Store) -> None:
    for pack in (A, B, C):
        pointer.append(store, "demo", "champion", pack, "promote")
    assert pointer.rollback(store, "demo", "champion", to=A).pack == A
    with pytest.raises(NotFoundError):
        pointer.rollback(store, "demo", "champion", to="0" * 64)


def test_a_retried_rollback_meets_its_own_entry(store: Store) -> None:
    for pack in (A, B, C):
        pointer.append(store, "demo", "champion", pack, "promote")
    first = pointer.rollback(store, "demo", "champion", token="run-1")
    assert pointer.rollback(store, "demo", "champion", token="run-1") == first
    assert first.pack == B
    assert pointer.rollback(store, "demo", "champion", token="run-2").pack == A
    assert pointer.rollback(store, "demo", "champion", token="run-1") == first


@given(st.lists(st.sampled_from([A, B, C, "back"]), max_size=12))
@settings(max_examples=60, deadline=None)
def test_rollback_undoes_as_a_stack_does(tmp_path_factory: pytest.TempPathFactory, actions: list[str]) -> None:
    store = with_manifests(LocalStore(tmp_path_factory.mktemp("stack")))
    stack: list[str] = []
    for action in actions:
        if action != "back":
            pointer.append(store, "demo", "champion", action, "promote")
            stack += [action] if stack[-1:] != [action] else []
        elif len(stack) > 1:
            pointer.rollback(store, "demo", "champion")
            stack.pop()
        current = pointer.current(store, "demo", "champion")
        assert (current.pack if current else None) == (stack[-1] if stack else None)


def test_a_decision_that_was_overtaken_is_refused(store: Store) -> None:
    pointer.append(store, "demo", "champion", A, "promote", after=0)
    pointer.append(store, "demo", "champion", B, "promote", after=1)
    with pytest.raises(ConflictError, match="entry 2"):
        pointer.append(store, "demo", "champion", C, "promote", after=1)
    with pytest.raises(ConflictError):
        pointer.append(store, "demo", "champion", C, "promote", after=0)
    assert packs(store) == [A, B]


def test_a_retry_with_its_token_meets_its_own_entry(store: Store) -> None:
    first = pointer.append(store, "demo", "champion", A, "promote", token="run-1")
    pointer.append(store, "demo", "champion", B, "promote", token="run-2")
    assert pointer.append(store, "demo", "champion", A, "promote", token="run-1", after=0) == first
    assert packs(store) == [A, B]


class LostAnswer(LocalStore):
    """A client that writes, loses the answer, and sends the same conditional write again."""

    def put(self, key: str, data: bytes | Path, *, if_absent: bool = False, sha256: str | None = None) -> bool:
        super().put(key, data, if_absent=if_absent, sha256=sha256)
        return super().put(key, data, if_absent=if_absent, sha256=sha256)


def test_an_answer_that_was_lost_leaves_one_entry(store: Store, tmp_path: Path) -> None:
    entry = pointer.append(LostAnswer(tmp_path), "demo", "champion", A, "promote")
    assert pointer.history(store, "demo", "champion") == [entry]


@pytest.mark.parametrize("backend", ["local", pytest.param("s3", marks=pytest.mark.s3)])
def test_a_race_loses_no_entry(backend: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if backend == "s3":
        open_s3: OpenS3 = request.getfixturevalue("open_s3")
        store = with_manifests(open_s3("writer"))
    else:
        store = with_manifests(LocalStore(tmp_path))
    barrier = threading.Barrier(6)

    def race(number: int) -> pointer.Pointer:
        barrier.wait()
        return pointer.append(store, "demo", "champion", (A, B, C)[number % 3], f"racer-{number}")

    with ThreadPoolExecutor(6) as pool:
        made = list(pool.map(race, range(6)))
    log = pointer.history(store, "demo", "champion")
    assert sorted(entry.number for entry in made) == list(range(1, 7))
    assert sorted(made, key=lambda entry: entry.number) == log


@pytest.mark.parametrize("damage", ["pack", "number", "extra", "cut", "array", "spaces", "deep"])
def test_a_changed_entry_is_found_out(store: Store, damage: str) -> None:
    for pack in (A, B):
        pointer.append(store, "demo", "champion", pack, "promote")
    key = keys.pointer("demo", "champion", 1)
    document = json.loads(store.get(key))
    changed = {
        "pack": json.dumps(document | {"pack": C}, sort_keys=True, separators=(",", ":")),
        "number": json.dumps(document | {"number": 7}, sort_keys=True, separators=(",", ":")),
        "extra": json.dumps(document | {"extra": 1}, sort_keys=True, separators=(",", ":")),
        "cut": store.get(key)[:-1].decode(),
        "array": "[]",
        "spaces": json.dumps(document),
        "deep": "[" * 100_000,
    }[damage]
    store.put(key, changed.encode())
    with pytest.raises(CorruptionError):
        pointer.history(store, "demo", "champion")


def test_a_removed_entry_is_found_out(store: Store) -> None:
    for pack in (A, B, C):
        pointer.append(store, "demo", "champion", pack, "promote")
    store.delete(keys.pointer("demo", "champion", 2))
    with pytest.raises(CorruptionError, match="entry 3"):
        pointer.history(store, "demo", "champion")


def test_a_newer_entry_is_refused(store: Store) -> None:
    pointer.append(store, "demo", "champion", A, "promote")
    key = keys.pointer("demo", "champion", 1)
    store.put(key, json.dumps(json.loads(store.get(key)) | {"format_version": 3, "new": 1}).encode())
    with pytest.raises(UnsupportedFormatError, match="update modelpress"):
        pointer.current(store, "demo", "champion")


def nested(depth: int) -> bytes:
    return b'{"x":' * depth + b"1" + b"}" * depth


@pytest.mark.parametrize(
    ("decision", "said"),
    [
        (nested(300), "expected"),
        (nested(100_000), "expected"),
        (b'{"a":1,"a":2}', "stands 2 times"),
        (b'{"a":NaN}', "NaN"),
        (b'{"a":"' + b"x" * pointer.MAX_ENTRY_BYTES + b'"}', f"at most {pointer.MAX_ENTRY_BYTES} bytes"),
    ],
    ids=["deep", "deeper", "twice", "nan", "large"],
)
def test_a_hostile_entry_is_refused(store: Store, decision: bytes, said: str) -> None:
    pointer.append(store, "demo", "champion", A, "promote", {"a": 0})
    key = keys.pointer("demo", "champion", 1)
    store.put(key, store.get(key).replace(b'{"a":0}', decision))
    with pytest.raises(CorruptionError, match=said):
        pointer.current(store, "demo", "champion")


def test_an_entry_that_nobody_could_read_is_not_written(store: Store) -> None:
    with pytest.raises(ConfigError, match="shorter decision"):
        pointer.append(store, "demo", "champion", A, "promote", {"a": "x" * pointer.MAX_ENTRY_BYTES})
    assert pointer.current(store, "demo", "champion") is None


def test_an_object_of_somebody_else_below_a_log_is_no_entry(store: Store) -> None:
    pointer.append(store, "demo", "champion", A, "promote")
    store.put(f"{keys.pointers('demo', 'champion')}copy/00000007.json", b"{}")
    entry = pointer.current(store, "demo", "champion")
    assert entry is not None
    assert (entry.number, entry.pack) == (1, A)
    assert packs(store) == [A]
    assert pointer.append(store, "demo", "champion", B, "promote").number == 2
