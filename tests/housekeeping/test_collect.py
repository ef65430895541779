"""What a collection takes, and what it leaves."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest

from modelpress import keys
from modelpress import publish as publishing
from modelpress.config import UploadConfig
from modelpress.errors import (
    ConfigError,
    ConflictError,
    CorruptionError,
    NotFoundError,
    StoreFullError,
    StoreUnavailableError,
    UnsupportedFormatError,
)
from modelpress.housekeeping import collect as collecting
from modelpress.housekeeping import intents, turns
from modelpress.housekeeping.collect import collect
from modelpress.manifest import canonical_json
from modelpress.store import Store, Unfinished
from modelpress.store.local import LocalStore
from tests.conftest import OpenS3
from tests.housekeeping.small import MemoryStore, SmallPack, broken, digest_of

ONE, TWO = SmallPack([b"shared", b"one"]), SmallPack([b"shared", b"two"])
DAYS = 24 * 3600.0


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    """Two versions that were published long ago, and garbage: what a third had alone."""
    opened = MemoryStore()

    opened.rules(monkeypatch, "modelpress.housekeeping.collect")
    for pack in (ONE, TWO, gone := SmallPack([b"shared", b"three"])):
        pack.publish(opened)
    opened.delete(keys.manifest("demo", gone.digest))
    opened.later(days=3)
    return opened


def went(store: MemoryStore, **how: float) -> set[str]:
    before = {key for key in store.objects if not key.startswith(keys.COLLECTIONS)}
    report = collect(store, delete=True, **how)
    lost = before - set(store.objects)
    assert report.removed.objects == len(lost)
    assert not broken(store)
    return lost


def test_garbage_goes_and_nothing_else(store: MemoryStore) -> None:
    dry = collect(store)
    assert dry.dry_run
    assert [(item.key, item.reason) for item in dry.garbage] == [(keys.blob(digest_of(b"three")), "unreferenced blob")]
    assert (dry.needed.objects, dry.packs) == (3, 2)
    assert dry.by_reason()["unreferenced blob"].size_bytes == 5
    assert went(store) == {keys.blob(digest_of(b"three"))}
    assert went(store) == set()
    assert [key for key in store.objects if key.startswith(keys.UPLOADS)] == []


def test_a_dry_run_writes_nothing(store: MemoryStore) -> None:
    before = dict(store.objects)
    collect(store)
    assert store.objects == before


def test_what_is_young_stays(store: MemoryStore) -> None:
    store.put(keys.blob(digest_of(b"new")), b"new")
    store.later(hours=20)
    assert went(store) == {keys.blob(digest_of(b"three"))}
    store.later(hours=5)
    assert went(store) == {keys.blob(digest_of(b"new"))}


def test_what_an_unfinished_upload_needs_stays_until_it_counts_as_abandoned(store: MemoryStore) -> None:
    pack = SmallPack([b"three", b"four"])

    class Full(MemoryStore):
        def put(self, key: str, data: bytes | Path, *, if_absent: bool = False, sha256: str | None = None) -> bool:
            if data == b"four":
                raise StoreFullError("storing")
            return super().put(key, data, if_absent=if_absent, sha256=sha256)

    full = Full()
    full.objects, full.time = store.objects, store.time
    with pytest.raises(StoreFullError):
        pack.publish(full)
    store.later(days=6)
    assert went(store) == set()
    assert collect(store).uploads == 1
    store.later(days=2)
    report = collect(store)
    assert {item.reason for item in report.garbage} == {"unreferenced blob", "abandoned upload"}
    assert keys.blob(digest_of(b"three")) in went(store)
    assert not any(key.startswith(keys.UPLOADS) for key in store.objects)


def test_a_publisher_keeps_its_intent_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    store, beats = MemoryStore(), threading.Event()
    monkeypatch.setenv("MODELPRESS_UPLOAD_ABANDONED_DAYS", str(1 / DAYS))
    with intents.announced(store, "demo", ONE.digest, blobs=ONE.blobs):
        (first,) = intents.read_intents(store)
        end = time.monotonic() + 30
        while time.monotonic() < end and not beats.is_set():
            store.later(seconds=1)
            time.sleep(0.05)
            if intents.read_intents(store)[0].modified > first.modified:
                beats.set()
    assert beats.is_set()
    assert intents.read_intents(store) == []


@pytest.mark.parametrize(
    ("error", "resumable", "left"),
    [
        (NotFoundError("x"), False, 0),
        (NotFoundError("x"), True, 1),
        (StoreUnavailableError("x"), False, 1),
        (KeyboardInterrupt(), False, 1),
    ],
)
def test_what_an_error_leaves_of_an_intent(error: BaseException, resumable: bool, left: int) -> None:
    store = MemoryStore()
    with pytest.raises(type(error)), intents.announced(store, "demo", ONE.digest, resumable=resumable):
        raise error
    assert len(intents.read_intents(store)) == left


def test_parts_that_nobody_comes_back_for_are_freed(store: MemoryStore) -> None:
    lost, mine = keys.blob(digest_of(b"lost")), keys.blob(digest_of(b"mine"))
    old = store.time - timedelta(days=20)
    store.parts = [
        Unfinished(lost, "a", old, 10),
        Unfinished(mine, "b", old, 20),
        Unfinished(lost, "c", store.time, 30),
        Unfinished("blobs/sha256/foreign", "d", old, 40),
    ]
    with intents.announced(store, "demo", "0" * 64, blobs=[digest_of(b"mine")]):
        report = collect(store, delete=True)
    assert report.by_reason()["unfinished parts"].size_bytes == 10
    assert [one.upload for one in store.parts] == ["b", "c", "d"]


def test_signatures_and_runs_go_with_their_pack_and_foreign_keys_are_never_touched(store: MemoryStore) -> None:
    decided = keys.decision("demo", "b" * 64, "e" * 64)  # history outlives its pack
    foreign = [
        decided,
        "packs/demo/secrets/x",
        f"packs/demo/{'a' * 64}.txt",
        "other/thing",
        "blobs/sha256/readme",
        "blobs/x",
    ]
    signed = [keys.signature("demo", digest, "d" * 64) for digest in (ONE.digest, "b" * 64)]
    places = (keys.run, keys.page, partial(keys.page, sealed=True))
    told = [where("demo", digest, "f" * 64) for digest in (ONE.digest, "b" * 64) for where in places]
    for key in foreign + signed + told:
        store.put(key, b"x")
    with intents.announced(store, "demo", "c" * 64):
        store.put(keys.run("demo", "c" * 64, "d" * 64), b"told before the commit")
        store.put(keys.signature("demo", "c" * 64, "d" * 64), b"signed before the commit")
        store.later(days=3)
        assert went(store) == {keys.blob(digest_of(b"three")), signed[1], *told[3:]}
    assert {*foreign, signed[0], *told[:3]} <= set(store.objects)


def test_probes_of_dead_processes_go(store: MemoryStore) -> None:
    store.put("doctor/1", b"x")
    store.later(days=2)
    assert "doctor/1" in went(store)


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (b"{}", CorruptionError),
        (b"", CorruptionError),
        (canonical_json({"format_version": 99}), UnsupportedFormatError),
    ],
)
@pytest.mark.parametrize("delete", [False, True])
def test_what_is_not_understood_stops_everything(
    store: MemoryStore, damage: bytes, error: type[Exception], delete: bool
) -> None:
    digest = digest_of(damage)
    for key in (keys.manifest("demo", digest), keys.intent("demo", "0" * 32), keys.turn(1)):
        before = dict(store.objects)
        store.put(key, damage)
        if key != keys.turn(1) or delete:
            with pytest.raises(error):
                collect(store, delete=delete)
        lost = [name for name in before if name not in store.objects]
        assert lost == []
        store.objects = before
    store.put(keys.manifest("demo", ONE.digest), b"damaged")
    with pytest.raises(CorruptionError, match=ONE.digest):
        collect(store, delete=delete, grace_seconds=0)
    assert keys.blob(digest_of(b"one")) in store.objects


def test_a_store_of_stages_is_refused(store: MemoryStore) -> None:
    store.put("stages/export/x.json", b"{}")
    for delete in (False, True):
        with pytest.raises(ConfigError, match="MODELPRESS_WORK"):
            collect(store, delete=delete)


# --- turns


def test_one_collection_at_a_time(store: MemoryStore) -> None:
    with turns.Lease(store, "collecting in"):
        with pytest.raises(ConflictError, match="one collection at a time"):
            collect(store, delete=True)
        assert collect(store).garbage  # looking is free
    assert went(store)
    assert len([key for key in store.objects if key.startswith(keys.COLLECTIONS)]) <= 3


def test_a_dead_collection_is_taken_over_when_its_lease_is_over_and_then_stops(store: MemoryStore) -> None:
    dead = turns.Lease(store, "collecting in")
    dead.__enter__()
    store.later(hours=1)
    with turns.Lease(store, "collecting in"):
        pass
    with pytest.raises(ConflictError):
        dead.next_round()


def test_a_lease_whose_deletes_are_not_answered_is_not_given_back(store: MemoryStore) -> None:
    def fail() -> None:
        raise StoreUnavailableError("deleting")

    with pytest.raises(StoreUnavailableError), turns.Lease(store, "collecting in") as lease:
        collecting.delete_all(lease, [fail])
    with pytest.raises(ConflictError, match="its lease ends by itself"):
        collect(store, delete=True)
    store.later(hours=1)
    assert went(store)


def test_a_slow_delete_counts_as_not_answered(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting, "CERTAIN_SECONDS", -1.0)
    with pytest.raises(StoreUnavailableError, match="run it again later"):
        collect(store, delete=True)
    assert not any(key.endswith(".ended") for key in store.objects)


def test_nothing_is_deleted_late_in_a_round(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "ROUND_SECONDS", 0.0)
    with pytest.raises(StoreUnavailableError, match="no time left"):
        collect(store, delete=True)
    assert keys.blob(digest_of(b"three")) in store.objects


def test_a_publisher_waits_for_a_round_and_then_looks(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    with turns.Lease(store, "collecting in") as lease:
        monkeypatch.setattr(turns.time, "sleep", lambda _: lease.next_round())
        publishing.publish(
            store,
            TWO.manifest,
            [],
            TWO.blobs,
            config=UploadConfig(concurrency=1),
            source_bytes=1,
            progress=lambda _done, _total, note="": notes.append(note),
        )
    assert "waiting for a round of the collection" in notes[0]


def test_a_publisher_waits_no_longer_than_a_lease(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with turns.Lease(store, "collecting in"):
        monkeypatch.setattr(turns.time, "sleep", lambda _: store.later(minutes=1))
        TWO.publish(store)
    turn = turns.Lease(store, "collecting in")
    with turn:
        clock = [0.0]
        monkeypatch.setattr(turns, "awake", lambda: clock[0])
        monkeypatch.setattr(turns.time, "sleep", lambda _: clock.__setitem__(0, clock[0] + 60))
        TWO.publish(store)  # also where the store's clock stands still
    assert 0 < clock[0] < 3600


def test_a_publisher_that_slept_for_days_looks_again(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    pack, clock = SmallPack([b"three", b"shared"], note="again"), [0.0]
    monkeypatch.setattr(intents, "awake", lambda: clock[0])
    sent, send_all = [0], publishing._send_all

    def slow(*arguments: object) -> None:
        send_all(*arguments)  # type: ignore[arg-type]
        if not sent[0]:
            clock[0] += 8 * DAYS
            store.later(days=8)
            assert keys.blob(digest_of(b"three")) in went(store)
        sent[0] += 1

    monkeypatch.setattr(publishing, "_send_all", slow)
    pack.publish(store)
    assert sent[0] == 2
    assert not broken(store)


def test_a_difference_to_a_pack_that_was_removed_is_not_committed(store: MemoryStore) -> None:
    pack = SmallPack([b"four"], base="d" * 64)
    with pytest.raises(NotFoundError, match="difference"):
        pack.publish(store)
    assert keys.manifest("demo", pack.digest) not in store.objects


# --- real stores


def test_on_a_disk(tmp_path: Path) -> None:
    _collect_for_real(LocalStore(tmp_path))


@pytest.mark.s3
def test_on_s3(open_s3: OpenS3, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_s3("writer")
    upload = store._client.create_multipart_upload(
        Bucket=store.bucket, Key=f"{store._prefix}{keys.blob(digest_of(b'lost'))}"
    )["UploadId"]
    (found,) = store.unfinished(keys.BLOBS)
    assert (found.key, found.upload, found.size_bytes) == (keys.blob(digest_of(b"lost")), upload, 0)
    time.sleep(1.1)  # its time is in whole seconds
    assert collect(store, abandoned_days=0).by_reason()["unfinished parts"].objects == 1
    collect(store, delete=True, abandoned_days=0)
    assert list(store.unfinished()) == []
    store.abort(found)
    _collect_for_real(store)


def _collect_for_real(store: Store) -> None:
    for pack in (ONE, TWO, gone := SmallPack([b"shared", b"three"])):
        pack.publish(store)
    store.delete(keys.manifest("demo", gone.digest))
    time.sleep(1.1)
    report = collect(store, delete=True, grace_seconds=0)
    assert [item.key for item in report.garbage] == [keys.blob(digest_of(b"three"))]
    left = {info.key for info in store.list()}
    assert left - {key for key in left if key.startswith(keys.COLLECTIONS)} == {
        *map(keys.blob, ONE.blobs),
        *map(keys.blob, TWO.blobs),
        keys.manifest("demo", ONE.digest),
        keys.manifest("demo", TWO.digest),
    }


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0, 1e15])
def test_a_grace_that_is_no_time_is_refused(tmp_path: Path, seconds: float) -> None:
    with pytest.raises(ConfigError, match="grace"):
        collect(LocalStore(tmp_path / "store"), grace_seconds=seconds)
