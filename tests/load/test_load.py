from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch

from modelpress import graph, keys, load, pointer
from modelpress.errors import ConfigError, CorruptionError, FormatError, NotFoundError, UnsupportedFormatError
from modelpress.store import Store
from modelpress.store.local import LocalStore
from tests.packs import Pack, assert_same, make_pack, onnx_checkpoint, torch_checkpoint


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return LocalStore(tmp_path / "store")


@pytest.fixture
def pack(tmp_path: Path, store: Store) -> Pack:
    pack = make_pack(tmp_path / "shards")
    pack.publish(store)
    pointer.append(store, "demo", "champion", pack.digest, "promote")
    return pack


def test_what_is_loaded_is_what_was_published(store: Store, pack: Pack) -> None:
    steps: list[int] = []

    def progress(done: int, total: int, note: str = "") -> None:
        assert total == sum(pack.manifest.blobs().values())
        steps.append(done)

    manifest, checkpoint = load.load_checkpoint(store, "demo", pack.digest, progress)
    assert manifest == pack.manifest
    assert_same(checkpoint, pack.checkpoint)
    assert steps == sorted(steps)


def test_resolve(store: Store, pack: Pack) -> None:
    for ref in ("champion", pack.digest, f"sha256:{pack.digest}", pack.digest[:12], f"sha256:{pack.digest[:20]}"):
        assert load.resolve(store, "demo", ref) == pack.digest


def test_resolve_says_what_there_is(store: Store, pack: Pack, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there are: champion"):
        load.resolve(store, "demo", "challenger")
    with pytest.raises(NotFoundError, match="there are: none"):
        load.resolve(store, "other", "champion")
    with pytest.raises(NotFoundError, match="0 packs"):
        load.resolve(store, "demo", "0" * 12)
    for ref in (pack.digest[:11].replace(pack.digest[0], "0", 1), "UPPER", "../x", ""):
        with pytest.raises(ConfigError, match="12 of its first digits"):
            load.resolve(store, "demo", ref)
    twin = keys.manifest("demo", pack.digest[:12] + "0" * 52)
    store.put(twin, b"{}")
    with pytest.raises(ConfigError, match="2 packs"):
        load.resolve(store, "demo", pack.digest[:12])


def test_a_pack_that_is_not_there(store: Store, pack: Pack) -> None:
    for name, digest in (("demo", "0" * 64), ("other", pack.digest)):
        with pytest.raises(NotFoundError, match=f"{name}@"):
            load.load_manifest(store, name, digest)


def test_a_manifest_under_another_name(store: Store, pack: Pack) -> None:
    store.put(keys.manifest("other", pack.digest), pack.manifest.to_bytes())
    with pytest.raises(CorruptionError, match="a pack named demo"):
        load.load_manifest(store, "other", pack.digest)


def test_a_newer_manifest_is_refused(store: Store) -> None:
    import hashlib

    data = json.dumps({"format_version": 99, "something": "new"}).encode()
    digest = hashlib.sha256(data).hexdigest()
    store.put(keys.manifest("demo", digest), data)
    with pytest.raises(UnsupportedFormatError, match="update modelpress"):
        load.load_checkpoint(store, "demo", digest)


def test_verify_reads_everything(store: Store, pack: Pack) -> None:
    report = load.verify(store, "demo", "champion")
    assert report.pack == pack.digest
    assert (report.shards, report.tensors, report.files) == (len(pack.shards), 7, 3)
    assert report.read_bytes == pack.manifest.published_bytes
    assert report.metrics()["tensors"] == 7


DAMAGES = ["flipped", "truncated", "longer", "swapped", "missing", "empty", "other length of zeros"]


def damage(store: Store, kind: str, digest: str, other: str) -> None:
    key = keys.blob(digest)
    data = bytearray(store.get(key))
    if kind == "missing":
        store.delete(key)
    elif kind == "flipped":
        data[len(data) // 2] ^= 0x10
        store.put(key, bytes(data))
    else:
        changed = {
            "truncated": bytes(data[:-1]),
            "longer": bytes(data[:-1]) + b"xx",
            "swapped": store.get(keys.blob(other)),
            "empty": b"",
            "other length of zeros": bytes(len(data) + 1000),
        }
        store.put(key, changed[kind])


@pytest.mark.faults
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_shard_is_refused_and_named(store: Store, pack: Pack, kind: str, tmp_path: Path) -> None:
    first, second = pack.shards[0].sha256, pack.shards[1].sha256
    damage(store, kind, second, first)
    error = NotFoundError if kind == "missing" else CorruptionError
    for refuses in (
        lambda: load.load_checkpoint(store, "demo", pack.digest),
        lambda: load.verify(store, "demo", "champion"),
        lambda: load.pull(store, "demo", "champion", tmp_path / "pulled"),
    ):
        with pytest.raises(error) as caught:
            refuses()
        assert "shard 1" in str(caught.value)
        assert second in str(caught.value)
        assert caught.value.found
        assert caught.value.expected
        assert caught.value.fix
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards", "store"]


@pytest.mark.faults
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_refused_and_named(store: Store, pack: Pack, kind: str) -> None:
    entry = pack.manifest.file("sub/vocab.txt")
    damage(store, kind, entry.stored_sha256, pack.shards[0].sha256)
    with pytest.raises(NotFoundError if kind == "missing" else CorruptionError, match=r"sub/vocab\.txt"):
        load.load_checkpoint(store, "demo", pack.digest)


@pytest.mark.faults
def test_damaged_reports_are_found_by_verify(store: Store, pack: Pack) -> None:
    assert pack.manifest.reports is not None
    damage(store, "flipped", pack.manifest.reports.stored_sha256, "")
    with pytest.raises(CorruptionError, match=r"reports\.json"):
        load.verify(store, "demo", "champion")


@pytest.mark.faults
def test_every_single_flipped_bit_of_a_manifest_is_refused(store: Store, pack: Pack) -> None:
    key, data = keys.manifest("demo", pack.digest), pack.manifest.to_bytes()
    for position in range(0, len(data), 97):
        changed = bytearray(data)
        changed[position] ^= 1
        store.put(key, bytes(changed))
        with pytest.raises(FormatError, match=pack.digest):
            load.load_manifest(store, "demo", pack.digest)


def test_pull_a_checkpoint(store: Store, pack: Pack, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "pulled"
    assert load.pull(store, "demo", "champion", folder) == pack.digest
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    files = {name: (folder / name).read_bytes() for name in pack.checkpoint.files}
    assert_same(dataclasses.replace(pack.checkpoint, tensors=tensors, files=files), pack.checkpoint)
    assert (folder / "modelpress.json").read_bytes() == pack.manifest.to_bytes()
    assert [path.name for path in folder.parent.iterdir()] == ["pulled"]


def test_pull_a_large_checkpoint_with_an_index(
    store: Store, pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelpress.load.layouts.folders.PULLED_SHARD_BYTES", 40_000)
    folder = tmp_path / "pulled"
    folder.mkdir()
    load.pull(store, "demo", "champion", folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    assert len(files) > 1
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        found = safetensors.torch.load_file(folder / file)
        assert all(index["weight_map"][name] == file for name in found)
        tensors |= found
    assert_same(dataclasses.replace(pack.checkpoint, tensors=tensors), pack.checkpoint)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


def test_pull_onnx(store: Store, tmp_path: Path) -> None:
    pack = make_pack(tmp_path / "shards", onnx_checkpoint(), name="graph")
    pack.publish(store)
    folder = tmp_path / "pulled"
    load.pull(store, "graph", pack.digest, folder, layout="onnx")
    assert sorted(path.name for path in folder.iterdir()) == [
        "labels.txt",
        "model.onnx",
        "model.onnx.data",
        "modelpress.json",
    ]
    onnx.checker.check_model(str(folder / "model.onnx"))
    inputs = {"x": np.random.default_rng(0).standard_normal((3, 96)).astype(np.float32)}
    pulled = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    _, checkpoint = load.load_checkpoint(store, "graph", pack.digest)
    assert np.array_equal(pulled.run(None, inputs)[0], graph.session(checkpoint, threads=1).run(None, inputs)[0])


def test_pull_refuses_what_it_would_overwrite_and_what_does_not_fit(store: Store, pack: Pack, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="layout checkpoint"):
        load.pull(store, "demo", "champion", tmp_path / "pulled", layout="onnx")
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("keep")
    with pytest.raises(ConfigError, match="empty"):
        load.pull(store, "demo", "champion", full)
    with pytest.raises(ConfigError, match="empty"):
        load.pull(store, "demo", "champion", full / "mine")
    assert [path.name for path in full.iterdir()] == ["mine"]


def test_a_file_cannot_take_the_place_of_the_layout(store: Store, tmp_path: Path) -> None:
    checkpoint = dataclasses.replace(torch_checkpoint(), files={"model.safetensors": b"x"})
    pack = make_pack(tmp_path / "shards", checkpoint)
    pack.publish(store)
    with pytest.raises(ConfigError, match="takes for itself"):
        load.pull(store, "demo", pack.digest, tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()
