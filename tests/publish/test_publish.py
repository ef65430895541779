from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from modelpress import keys, load
from modelpress.config import UploadConfig
from modelpress.errors import AccessDeniedError, ConflictError, CorruptionError, StageError
from modelpress.publish import publish
from modelpress.store import Store
from modelpress.store.local import LocalStore
from tests.conftest import OpenS3
from tests.packs import Pack, make_pack, torch_checkpoint


@pytest.fixture
def pack(tmp_path: Path) -> Pack:
    return make_pack(tmp_path / "shards")


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "s3":
        open_s3: OpenS3 = request.getfixturevalue("open_s3")
        return open_s3("writer")
    return LocalStore(tmp_path / "store")


def test_publish_sends_each_blob_once_and_counts(store: Store, pack: Pack) -> None:
    steps: list[tuple[int, int]] = []

    def progress(done: int, total: int, note: str = "") -> None:
        steps.append((done, total))

    report = publish(
        store,
        pack.manifest,
        pack.shards,
        pack.blobs,
        config=UploadConfig(concurrency=3),
        source_bytes=1_000_000,
        progress=progress,
    )
    blobs = pack.manifest.blobs()
    stored = {info.key: info.size_bytes for info in store.list()}
    manifest_key = keys.manifest("demo", pack.digest)
    assert stored == {keys.blob(digest): size for digest, size in blobs.items()} | {
        manifest_key: len(pack.manifest.to_bytes())
    }
    assert len(pack.shards) > 2
    assert report.pack == pack.digest
    assert report.uri == f"{store.uri}/{manifest_key}"
    assert (report.objects, report.sent_objects) == (len(blobs), len(blobs))
    assert report.sent_bytes == sum(blobs.values())
    assert report.published_bytes == sum(stored.values()) == pack.manifest.published_bytes
    assert report.compression_ratio == 1_000_000 / report.published_bytes
    assert steps == sorted(steps)
    assert len(steps) == len(blobs)
    assert steps[-1] == (sum(blobs.values()),) * 2


def test_publishing_again_sends_nothing(store: Store, pack: Pack) -> None:
    first = pack.publish(store)
    again = pack.publish(store)
    assert (again.sent_objects, again.sent_bytes) == (0, 0)
    assert again.pack == first.pack


def test_versions_share_their_blobs(store: Store, pack: Pack, tmp_path: Path) -> None:
    pack.publish(store)
    checkpoint = torch_checkpoint()
    changed = dataclasses.replace(
        checkpoint, tensors=checkpoint.tensors | {"layer.0.bias": checkpoint.tensors["layer.0.bias"] + 1}
    )
    other = make_pack(tmp_path / "other", changed)
    report = other.publish(store)
    assert other.digest != pack.digest
    assert 0 < report.sent_objects < report.objects
    load.verify(store, "demo", pack.digest)
    load.verify(store, "demo", other.digest)


def test_a_blob_of_another_length_is_mended(store: Store, pack: Pack) -> None:
    pack.publish(store)
    key = keys.blob(pack.shards[0].sha256)
    store.put(key, b"half")
    assert pack.publish(store).sent_objects == 1
    load.verify(store, "demo", pack.digest)


def test_a_shard_that_changed_on_the_way_is_refused(store: Store, pack: Pack) -> None:
    path = pack.shards[1].path
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptionError, match=pack.shards[1].sha256):
        pack.publish(store)
    assert list(store.list("packs/")) == []
    assert store.info(keys.blob(pack.shards[1].sha256)) is None


def test_a_blob_that_is_not_given_is_named(store: Store, pack: Pack) -> None:
    with pytest.raises(StageError, match=pack.shards[0].sha256):
        publish(store, pack.manifest, pack.shards[1:], pack.blobs, source_bytes=1)
    with pytest.raises(StageError):
        publish(store, pack.manifest, pack.shards, {}, source_bytes=1)
    assert list(store.list()) == []


def test_another_manifest_under_the_digest_is_a_conflict(store: Store, pack: Pack) -> None:
    store.put(keys.manifest("demo", pack.digest), b"{}")
    with pytest.raises(ConflictError, match="tampered"):
        pack.publish(store)
    assert store.get(keys.manifest("demo", pack.digest)) == b"{}"


@pytest.mark.s3
def test_a_reader_publishes_nothing(open_s3: OpenS3, pack: Pack) -> None:
    with pytest.raises(AccessDeniedError):
        pack.publish(open_s3("reader"))
    assert list(open_s3("writer").list()) == []


def test_a_huge_object_in_the_place_of_the_manifest_is_not_read(tmp_path: Path, pack: Pack) -> None:
    class Watched(LocalStore):
        def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
            assert not key.startswith(keys.PACKS), "2^40 bytes are asked for"
            return super().get(key, start, length)

    store = Watched(tmp_path / "store")
    path = store.folder / keys.manifest("demo", pack.digest)
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ConflictError, match="other bytes"):
        pack.publish(store)
