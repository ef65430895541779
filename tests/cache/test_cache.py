"""The cache: verified both ways, bounded, shared by processes that may die, and never a reason for a load to fail."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from typing_extensions import Buffer

from modelpress import cache as cache_module
from modelpress import keys, load
from modelpress.cache import BlobCache, open_cache
from modelpress.checkpoint import Checkpoint
from modelpress.errors import CorruptionError, NotFoundError, SetupError
from modelpress.load.blobs import Blobs
from modelpress.manifest import Manifest
from modelpress.settings import Settings
from modelpress.store.local import LocalStore
from tests.packs import Pack, assert_same, make_pack, onnx_checkpoint

MIB = 2**20


def blob(size: int, seed: int = 0) -> tuple[str, memoryview]:
    data = random.Random(seed).randbytes(size)
    return hashlib.sha256(data).hexdigest(), memoryview(data)


def read(cache: BlobCache, digest: str, size: int) -> bytes | None:
    buffer = bytearray(size)
    return bytes(buffer) if cache.read_into(digest, memoryview(buffer)) else None


class CountingStore(LocalStore):
    """Counts what is read of blobs."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.read: list[str] = []

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        self.read += [key] if key.startswith(keys.BLOBS) else []
        return super().get(key, start, length)

    def read_into(
        self, key: str, buffer: Buffer, start: int = 0, arrived: Callable[[memoryview], None] = lambda _: None
    ) -> None:
        self.read += [key] if key.startswith(keys.BLOBS) else []
        super().read_into(key, buffer, start, arrived)


@pytest.fixture
def cache(tmp_path: Path) -> BlobCache:
    return BlobCache(tmp_path / "cache", 100 * MIB)


@pytest.fixture
def store(tmp_path: Path) -> CountingStore:
    return CountingStore(tmp_path / "store")


@pytest.fixture
def pack(tmp_path: Path, store: CountingStore) -> Pack:
    pack = make_pack(tmp_path / "shards")
    pack.publish(store)
    store.read.clear()
    return pack


def test_a_second_load_reads_no_blob_from_the_store(cache: BlobCache, store: CountingStore, pack: Pack) -> None:
    for _ in range(2):
        _, checkpoint = load.load_checkpoint(store, "demo", pack.digest, cache=cache)
        assert_same(checkpoint, pack.checkpoint)
        needed = {keys.blob(shard.sha256) for shard in pack.manifest.shards}
        needed |= {keys.blob(file.stored_sha256) for file in pack.manifest.files}
        assert set(store.read) == needed
        assert len(store.read) == len(needed)
    kept = {item.digest: item.size_bytes for item in cache.blobs()}
    assert kept == {key.rpartition("/")[2]: pack.manifest.blobs()[key.rpartition("/")[2]] for key in needed}


def test_a_session_starts_from_the_cache_alone(
    cache: BlobCache, store: CountingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = make_pack(tmp_path / "graph", onnx_checkpoint(), name="graph")
    pack.publish(store)
    monkeypatch.setenv("MODELPRESS_CACHE", str(cache.folder))
    inputs = {"x": np.ones((2, 96), np.float32)}
    first = load.open_session(store, "graph", pack.digest, threads=1).run(None, inputs)[0]
    for digest in pack.manifest.blobs():
        store.delete(keys.blob(digest))
    again = load.open_session(store, "graph", pack.digest, threads=1).run(None, inputs)[0]
    assert np.array_equal(first, again)


def test_verify_asks_the_store_whatever_is_cached(
    cache: BlobCache, store: CountingStore, pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELPRESS_CACHE", str(cache.folder))
    load.load_checkpoint(store, "demo", pack.digest, cache=cache)
    store.delete(keys.blob(pack.manifest.shards[0].sha256))
    with pytest.raises(NotFoundError, match="shard 0"):
        load.verify(store, "demo", pack.digest)


@pytest.mark.faults
@pytest.mark.parametrize("damage", ["flipped", "shorter", "longer", "empty"])
def test_a_damaged_blob_is_dropped_and_fetched_again(
    cache: BlobCache, store: CountingStore, pack: Pack, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    load.load_checkpoint(store, "demo", pack.digest, cache=cache)
    digest = pack.manifest.shards[1].sha256
    path = cache.folder / "sha256" / digest
    data = path.read_bytes()
    flipped = data[:100] + bytes([data[100] ^ 1]) + data[101:]
    path.write_bytes({"flipped": flipped, "shorter": data[:-1], "longer": data + b"x", "empty": b""}[damage])
    store.read.clear()
    with caplog.at_level(logging.WARNING):
        _, checkpoint = load.load_checkpoint(store, "demo", pack.digest, cache=cache)
    assert_same(checkpoint, pack.checkpoint)
    assert store.read == [keys.blob(digest)]
    assert f"dropping {path}" in caplog.text
    assert path.read_bytes() == data


@pytest.mark.faults
def test_a_damaged_blob_of_the_store_is_not_kept(cache: BlobCache, store: CountingStore, pack: Pack) -> None:
    digest = pack.manifest.shards[0].sha256
    store.put(keys.blob(digest), bytes(pack.manifest.shards[0].size_bytes))
    with pytest.raises(CorruptionError, match="shard 0"):
        load.load_checkpoint(store, "demo", pack.digest, cache=cache)
    assert digest not in {item.digest for item in cache.blobs()}


def test_what_was_read_longest_ago_goes_first(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path, 3 * MIB)
    blobs = [blob(MIB, seed) for seed in range(4)]
    for age, (digest, data) in enumerate(blobs[:3]):
        cache.keep(digest, data)
        os.utime(tmp_path / "sha256" / digest, (0, 1000 + age))
    assert read(cache, blobs[0][0], MIB) == bytes(blobs[0][1])  # now it is the one read last
    cache.keep(*blobs[3])
    assert {item.digest for item in cache.blobs()} == {blobs[0][0], blobs[2][0], blobs[3][0]}
    cache.keep(*blob(3 * MIB + 1, 9))  # more than all it may hold: as if it were not there
    assert len(cache.blobs()) == 3
    assert cache.prune(MIB) == 2 * MIB
    assert len(cache.blobs()) == 1
    assert cache.prune() == MIB
    assert cache.blobs() == []


def test_the_bound_holds_while_many_write(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache, done, most = BlobCache(tmp_path, 4 * MIB), threading.Event(), [0]
    caplog.set_level(logging.WARNING)

    def watch() -> None:
        while not done.is_set():
            total = 0
            for path in [*tmp_path.glob("incoming/*"), *tmp_path.glob("sha256/*")]:
                try:
                    total += path.stat().st_size
                except FileNotFoundError:
                    total = 0  # it moved from one to the other: this look counts nothing
                    break
            most[0] = max(most[0], total)

    def write(start: int) -> None:
        for seed in range(start, start + 10):
            cache.keep(*blob(MIB, seed))

    watcher = threading.Thread(target=watch)
    watcher.start()
    writers = [threading.Thread(target=write, args=(start,)) for start in (0, 100, 200)]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    watcher.join()
    assert 0 < sum(item.size_bytes for item in cache.blobs()) <= 4 * MIB
    assert most[0] <= 5 * MIB  # a file that moves between the two globs is seen twice
    assert list(tmp_path.glob("incoming/*")) == []
    assert caplog.text == ""  # nobody took another's file for a dead one's


def test_the_bound_holds_where_others_write_more_than_fits(tmp_path: Path) -> None:
    """What is on its way cannot be dropped: the next one is not kept, and nothing goes in vain."""
    cache = BlobCache(tmp_path, 10 * MIB)
    small, large = blob(MIB, 1), blob(8 * MIB, 2)
    cache.keep(*small)
    (tmp_path / "incoming").mkdir(exist_ok=True)
    on_its_way = cache._begin(tmp_path / "incoming" / "another", 8 * MIB)
    assert on_its_way is not None
    with on_its_way:
        cache.keep(*large)
        assert sum(path.stat().st_size for path in tmp_path.glob("*/*") if path.is_file()) <= 10 * MIB
        assert {item.digest for item in cache.blobs()} == {small[0]}
    cache.keep(*large)  # the other one died
    assert {item.digest for item in cache.blobs()} == {small[0], large[0]}


def test_a_blob_that_goes_takes_its_lock_with_it(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path, MIB)
    for seed in range(3):
        digest, data = blob(MIB, seed)
        with cache.fetching(digest):
            cache.keep(digest, data)
    assert [path.name for path in (tmp_path / "locks").iterdir()] == [digest]


def test_a_blob_that_takes_its_name_while_others_count_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = BlobCache(tmp_path, 3 * MIB)
    digest, data = blob(2 * MIB, 1)
    (tmp_path / "sha256").mkdir()
    (tmp_path / "incoming").mkdir()
    incoming, listed = tmp_path / "incoming" / "another", []
    incoming.write_bytes(data)
    files = cache_module._files

    def moves(folder: Path) -> list[Path]:
        found = files(folder)
        listed.append(folder)
        if incoming.exists():
            incoming.replace(tmp_path / "sha256" / digest)
        return found

    monkeypatch.setattr(cache_module, "_files", moves)
    assert cache._taken() >= 2 * MIB
    assert len(listed) == 2


def test_files_that_are_no_blobs_are_left_alone_and_harm_no_load(
    tmp_path: Path, store: CountingStore, pack: Pack
) -> None:
    """Such as `.nfs0000…`, which a network file system makes of a file that is removed while it is read."""
    largest = max(pack.manifest.blobs().values())
    cache, stray = BlobCache(tmp_path / "cache", largest + 10), tmp_path / "cache" / "sha256" / ".nfs0001"
    stray.parent.mkdir(parents=True)
    stray.write_bytes(b"removed")
    os.utime(stray, (0, 0))  # the longest unused
    _, checkpoint = load.load_checkpoint(store, "demo", pack.digest, cache=cache)
    assert_same(checkpoint, pack.checkpoint)
    assert stray.exists()
    assert all(item.digest in pack.manifest.blobs() for item in cache.blobs())


@pytest.mark.faults
def test_a_full_disk_ends_the_caching_and_not_the_load(
    cache: BlobCache, store: CountingStore, pack: Pack, caplog: pytest.LogCaptureFixture
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with caplog.at_level(logging.WARNING):
            _, checkpoint = load.load_checkpoint(store, "demo", pack.digest, cache=cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_same(checkpoint, pack.checkpoint)
    assert caplog.text.count("going on without") == 1
    assert list(cache.folder.glob("incoming/*")) == []
    assert all(read(cache, item.digest, item.size_bytes) for item in cache.blobs())


@pytest.mark.faults
def test_a_folder_that_takes_nothing_is_still_read(
    cache: BlobCache, store: CountingStore, pack: Pack, caplog: pytest.LogCaptureFixture
) -> None:
    load.load_checkpoint(store, "demo", pack.digest, cache=cache)
    gone = pack.manifest.shards[0].sha256
    (cache.folder / "sha256" / gone).unlink()
    for name in ("locks", "incoming"):  # files in the place of folders: root may write to anything else
        for path in (cache.folder / name).iterdir():
            path.unlink()
        (cache.folder / name).rmdir()
        (cache.folder / name).write_text("")
    store.read.clear()
    with caplog.at_level(logging.WARNING):
        _, checkpoint = load.load_checkpoint(store, "demo", pack.digest, cache=BlobCache(cache.folder, 100 * MIB))
    assert_same(checkpoint, pack.checkpoint)
    assert store.read == [keys.blob(gone)]
    assert caplog.text.count("read and not written") == 1


FETCHER = """
import sys
from pathlib import Path
from modelpress.cache import BlobCache

cache = BlobCache(Path(sys.argv[1]), 2**30)
with cache.fetching(sys.argv[2]):
    print("fetching", flush=True)
    data = memoryview(bytes(2**26))
    while True:
        cache.keep(sys.argv[2], data)
        cache.prune()
"""


@pytest.mark.faults
def test_whoever_waits_for_a_fetcher_that_is_killed_fetches_itself(
    cache: BlobCache, store: CountingStore, pack: Pack
) -> None:
    digest = pack.manifest.shards[0].sha256
    for _ in range(3):
        command = [sys.executable, "-c", FETCHER, str(cache.folder), digest]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "fetching\n"
            pool = ThreadPoolExecutor(1)
            found = pool.submit(load.load_checkpoint, store, "demo", pack.digest, cache=cache)
            time.sleep(random.Random(0).random() / 5)
            waiting = keys.blob(digest) not in store.read
            process.kill()
        assert_same(found.result(60)[1], pack.checkpoint)
        pool.shutdown()
        assert waiting
        for item in cache.blobs():
            assert read(cache, item.digest, item.size_bytes) is not None
        (cache.folder / "sha256" / digest).unlink()
        cache.prune()
        assert list(cache.folder.glob("incoming/*")) == []
        store.read.clear()


def test_one_fetches_for_all(cache: BlobCache, store: CountingStore, pack: Pack) -> None:
    def loaded(_: int) -> Checkpoint:
        return load.load_checkpoint(store, "demo", pack.digest, cache=BlobCache(cache.folder, 100 * MIB))[1]

    with ThreadPoolExecutor(4) as pool:
        for checkpoint in pool.map(loaded, range(4)):
            assert_same(checkpoint, pack.checkpoint)
    assert len(store.read) == len(set(store.read))


def test_what_another_kept_after_the_first_look_is_not_fetched(
    cache: BlobCache, store: CountingStore, pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had let go of the lock again before this reader came to it: nobody was waited for."""
    entry = pack.manifest.shards[0]
    data = memoryview(store.get(keys.blob(entry.sha256)))
    store.read.clear()
    look = cache.read_into

    def looked(digest: str, view: memoryview) -> bool:
        found = look(digest, view)
        if not found and digest == entry.sha256:
            cache.keep(digest, data)
        return found

    monkeypatch.setattr(cache, "read_into", looked)
    assert_same(load.load_checkpoint(store, "demo", pack.digest, cache=cache)[1], pack.checkpoint)
    assert keys.blob(entry.sha256) not in store.read


def test_the_settings_name_it_or_there_is_none(tmp_path: Path) -> None:
    assert open_cache(Settings()) is None
    cache = open_cache(Settings(cache=str(tmp_path), cache_bytes=7))
    assert cache is not None
    assert (cache.folder, cache.max_bytes) == (tmp_path, 7)
    assert BlobCache(tmp_path / "none", 7).prune() == 0


def test_a_file_beyond_all_memory_is_a_named_error(cache: BlobCache, store: CountingStore, pack: Pack) -> None:
    files = [file.model_dump() for file in pack.manifest.files if file.codec == "raw"]
    files[0] |= {"size_bytes": 2**62, "stored_bytes": 2**62}
    manifest = Manifest.model_validate(pack.manifest.model_dump() | {"files": files})
    with pytest.raises(SetupError, match="4611686018427387904 bytes"):
        Blobs(store, manifest, cache=cache).fetch(files[0]["stored_sha256"])
