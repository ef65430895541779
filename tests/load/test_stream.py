"""Loading while bytes come gives what loading afterwards gives, and nothing where they are wrong."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typing_extensions import Buffer

from modelpress import keys, load
from modelpress.checkpoint import Checkpoint
from modelpress.container import read_tensors
from modelpress.container.read import Begun
from modelpress.errors import CorruptionError, SetupError, StoreUnavailableError
from modelpress.load.blobs import Blobs
from modelpress.load.stream import IN_FLIGHT, stream_tensors
from modelpress.manifest import Manifest
from modelpress.store.local import LocalStore
from tests.packs import Pack, make_pack

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.int64, torch.bool]


class SlowStore(LocalStore):
    """Gives its bytes in small runs, and calls `between` before each, with the key and how many came before."""

    run = 1000

    def __init__(self, folder: Path, between: Callable[[str, int], None] = lambda *_: None) -> None:
        super().__init__(folder)
        self.between = between

    def read_into(
        self, key: str, buffer: Buffer, start: int = 0, arrived: Callable[[memoryview], None] = lambda _: None
    ) -> None:
        view = memoryview(buffer)
        data = self.get(key, start, len(view))
        for at in range(0, len(view), self.run):
            self.between(key, at)
            arrived(view[:0])
            view[at : at + self.run] = data[at : at + self.run]
            arrived(view[at : at + self.run])


def random_checkpoint(seed: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(seed)

    def number(most: int) -> int:
        return int(torch.randint(most, (1,), generator=generator))

    tensors = {}
    for index in range(1 + number(9)):
        shape = [(), (0,), (number(40_000),), (1 + number(200), 1 + number(200)), (3, 1, 5 + number(900))][number(5)]
        values = torch.randn(shape, generator=generator)
        if number(3) == 0:
            values = values * (torch.rand(shape, generator=generator) > 0.8)
        tensors[f"t{index}"] = (values * 20).to(DTYPES[number(len(DTYPES))])
    return Checkpoint("torch", tensors)


def threads_left() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith(("shard", "tensor-sha256"))]


@pytest.fixture
def pack(tmp_path: Path) -> Pack:
    pack = make_pack(tmp_path / "shards")
    pack.publish(LocalStore(tmp_path / "store"))
    assert len(pack.shards) > IN_FLIGHT + 1
    return pack


@pytest.mark.parametrize("seed", range(30))
def test_it_gives_what_the_reader_of_whole_shards_gives(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelpress.load.stream.RUN_BYTES", [500, 5000, 2**23][seed % 3])
    pack = make_pack(tmp_path / "shards", random_checkpoint(seed), max_shard=[20_000, 70_000, 2**26][seed // 3 % 3])
    store = SlowStore(tmp_path / "store")
    store.run = [333, 4096, 2**20][seed // 9 % 3]
    pack.publish(store)
    blobs = Blobs(store, pack.manifest)
    whole = list(read_tensors(pack.manifest, blobs.fetch, threads=1))
    for threads in (1, 3):
        streamed = list(stream_tensors(pack.manifest, blobs, threads=threads))
        assert [name for name, _ in streamed] == [name for name, _ in whole]
        for (_, found), (name, expected) in zip(streamed, whole, strict=True):
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            same = torch.equal(found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))
            assert same, name
    assert threads_left() == []


def test_a_tensor_is_decoded_before_its_shard_has_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"t{index}": torch.randn(50, 64, generator=generator) for index in range(4)}
    pack = make_pack(tmp_path / "shards", Checkpoint("torch", tensors), max_shard=2**20)
    pack.publish(LocalStore(tmp_path / "store"))
    (size,) = (shard.size_bytes for shard in pack.manifest.shards)
    decoded, add = threading.Event(), Begun.add

    def seen(*arguments: object) -> None:
        add(*arguments)  # type: ignore[arg-type]
        decoded.set()

    monkeypatch.setattr(Begun, "add", seen)

    def hold(_: str, at: int) -> None:
        if at > size - 2000:
            assert decoded.wait(30), "the end of the shard waits for its first tensor to be decoded"

    store = SlowStore(tmp_path / "store", hold)
    assert dict(stream_tensors(pack.manifest, Blobs(store, pack.manifest))).keys() == tensors.keys()


@pytest.mark.faults
def test_any_flipped_byte_of_a_shard_gives_nothing_of_it(tmp_path: Path, pack: Pack) -> None:
    store, wrong = LocalStore(tmp_path / "store"), pack.manifest.shards[1]
    key = keys.blob(wrong.sha256)
    sound = store.get(key)
    allowed = {tensor.name for tensor in pack.manifest.tensors if tensor.shards[-1] < 1}
    for position in [*range(40), *range(40, len(sound), 1201), len(sound) - 1]:
        damaged = bytearray(sound)
        damaged[position] ^= 1 << position % 8
        store.put(key, bytes(damaged))
        given: list[str] = []
        with pytest.raises(CorruptionError, match=wrong.sha256) as caught:
            given += (name for name, _ in stream_tensors(pack.manifest, Blobs(store, pack.manifest)))
        assert "sha256" in str(caught.value.found)
        assert set(given) <= allowed
    assert threads_left() == []


@pytest.mark.faults
@pytest.mark.parametrize("change", ["truncated", "replaced", "swapped while it is read"])
def test_a_shard_that_changes_while_it_comes_is_refused(tmp_path: Path, pack: Pack, change: str) -> None:
    folder, shards = tmp_path / "store", pack.manifest.shards
    path = folder / keys.blob(shards[1].sha256)
    if change == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif change == "replaced":
        path.write_bytes((folder / keys.blob(shards[2].sha256)).read_bytes().ljust(shards[1].size_bytes, b"\0"))

    class Swapped(SlowStore):
        def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
            data = super().get(key, start, length)
            if change.startswith("swapped") and key.endswith(shards[1].sha256):
                return data[: len(data) // 2] + bytes(len(data) - len(data) // 2)
            return data

    with pytest.raises(CorruptionError, match="shard 1"):
        load.load_checkpoint(Swapped(folder), "demo", pack.digest)
    assert threads_left() == []


@pytest.mark.faults
def test_an_error_ends_what_is_still_on_its_way(tmp_path: Path, pack: Pack) -> None:
    """Shard 0 is damaged, and shard 1 would come for ever: heartbeats alone."""
    store = LocalStore(tmp_path / "store")
    first, second = (keys.blob(shard.sha256) for shard in pack.manifest.shards[:2])
    store.put(first, bytes(pack.manifest.shards[0].size_bytes))
    begun = threading.Event()

    class Endless(LocalStore):
        def read_into(
            self, key: str, buffer: Buffer, start: int = 0, arrived: Callable[[memoryview], None] = lambda _: None
        ) -> None:
            if key == second:
                begun.set()
                while True:
                    arrived(memoryview(b""))
            assert begun.wait(30)
            super().read_into(key, buffer, start, arrived)

    with pytest.raises(CorruptionError, match="shard 0"):
        list(stream_tensors(pack.manifest, Blobs(Endless(store.folder), pack.manifest)))
    assert threads_left() == []


@pytest.mark.faults
def test_a_store_that_fails_in_the_middle_is_named(tmp_path: Path, pack: Pack) -> None:
    def fail(key: str, at: int) -> None:
        if at and key.endswith(pack.manifest.shards[2].sha256):
            raise StoreUnavailableError("reading it", found="nobody")

    with pytest.raises(StoreUnavailableError, match="nobody"):
        load.load_checkpoint(SlowStore(tmp_path / "store", fail), "demo", pack.digest)
    assert threads_left() == []


def test_who_stops_early_leaves_no_thread(tmp_path: Path, pack: Pack) -> None:
    stream = stream_tensors(pack.manifest, Blobs(SlowStore(tmp_path / "store"), pack.manifest))
    next(stream)
    stream.close()
    assert threads_left() == []


def test_a_shard_beyond_all_memory_is_a_named_error(pack: Pack, tmp_path: Path) -> None:
    shards = [shard.model_dump() for shard in pack.manifest.shards]
    shards[0]["size_bytes"] = 2**62
    manifest = Manifest.model_validate(pack.manifest.model_dump() | {"shards": shards})
    with pytest.raises(SetupError, match="max_shard_size"):
        list(stream_tensors(manifest, Blobs(LocalStore(tmp_path / "store"), manifest)))


MEASURE = """
import sys, threading
from pathlib import Path
from modelpress import load
from modelpress.store import open_store

def anonymous():
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

store = open_store(sys.argv[1])
load.load_checkpoint(store, "small", sys.argv[2])  # whatever is loaded and compiled once
before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous())

thread = threading.Thread(target=watch)
thread.start()
load.load_checkpoint(store, "large", sys.argv[3])
done.set()
thread.join()
print(max(peak, anonymous()) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_it_takes_the_model_and_the_shards_in_flight(tmp_path: Path) -> None:
    mib, shard = 2**20, 2 * 2**20
    generator = torch.Generator().manual_seed(0)
    tensors = {f"t{index}": torch.randn(2**20, generator=generator).to(torch.bfloat16) for index in range(12)}
    store = LocalStore(tmp_path / "store")
    small = make_pack(tmp_path / "a", Checkpoint("torch", {"t": tensors["t0"]}), name="small")
    large = make_pack(tmp_path / "b", Checkpoint("torch", tensors), name="large", max_shard=shard)
    small.publish(store)
    large.publish(store)
    model = sum(tensor.nbytes for tensor in tensors.values())
    assert model == 24 * mib
    assert len(large.shards) > 2 * IN_FLIGHT
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, store.uri, small.digest, large.digest],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    # A manifest, the decoder's tables and what the allocator holds back: 6 MiB; all shards together would be 16.
    assert model * 0.9 < int(done.stdout) < model + IN_FLIGHT * shard + 6 * mib
