"""A part of a pack: only the shards that hold it are read, whatever the pack is cut by; what is wrong is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from modelpress import keys, load
from modelpress.checkpoint import from_module
from modelpress.compress import compress
from modelpress.config import ShardConfig
from modelpress.container.base import PackTensors
from modelpress.delta import compress_against
from modelpress.errors import ConfigError, CorruptionError, NotFoundError, WorkloadError
from modelpress.parallel.rank_load import load_into_, load_tensors, tied_names
from modelpress.parallel.slices import Share, sliced
from modelpress.shard import draft_manifest, write_shards
from tests.packs import COMPRESS, Pack, assert_same, make_pack, onnx_checkpoint, torch_checkpoint
from tests.parallel.work import CountingStore

LARGE = "layer.2.weight"
"""Split over shards of 32 kB."""


@pytest.fixture
def store(tmp_path: Path) -> CountingStore:
    return CountingStore(tmp_path / "store")


@pytest.fixture
def pack(tmp_path: Path, store: CountingStore) -> Pack:
    pack = make_pack(tmp_path / "shards")
    pack.publish(store)
    store.read.clear()
    return pack


def shards_of(pack: Pack, *names: str) -> list[str]:
    found = {position for entry in pack.manifest.tensors if entry.name in names for position in entry.shards}
    return [keys.blob(pack.manifest.shards[position].sha256) for position in sorted(found)]


@pytest.mark.parametrize("names", [[LARGE], ["layer.0.bias", "scale"], ["none"]])
def test_only_shards_that_hold_something_are_read(store: CountingStore, pack: Pack, names: list[str]) -> None:
    found, report = load_tensors(store, "demo", pack.digest, dict.fromkeys(names))
    assert found.keys() == set(names)
    for name in names:
        assert torch.equal(found[name], pack.checkpoint.tensors[name])
    assert sorted(store.read) == sorted(shards_of(pack, *names))
    assert (report.shards, report.pack_shards) == (len(store.read), len(pack.manifest.shards))
    assert report.read_bytes == report.needed_bytes < pack.manifest.published_bytes


def test_a_share_of_a_whole_tensor_is_cut_here(store: CountingStore, pack: Pack) -> None:
    found, report = load_tensors(store, "demo", pack.digest, {LARGE: Share(axis=1, rank=3, ranks=4)})
    assert torch.equal(found[LARGE], pack.checkpoint.tensors[LARGE].chunk(4, 1)[3])
    assert found[LARGE].untyped_storage().nbytes() == report.tensor_bytes  # the rest is not kept
    with pytest.raises(ConfigError, match="64 elements there"):
        load_tensors(store, "demo", pack.digest, {LARGE: Share(axis=1, rank=0, ranks=3)})


def test_a_pack_of_differences_is_read_with_its_base(tmp_path: Path, store: CountingStore, pack: Pack) -> None:
    changed = torch_checkpoint()
    changed.tensors["layer.3.codes"][0, 0] ^= 1
    config = COMPRESS.model_copy(update={"base": pack.digest})
    blobs = {shard.sha256: shard.path.read_bytes() for shard in pack.shards}
    coded, _ = compress_against(changed, config, PackTensors(pack.manifest, blobs.__getitem__))
    assert coded.base == pack.digest
    shards, _ = write_shards(coded, ShardConfig(), tmp_path / "delta")
    manifest, files = draft_manifest("demo", coded, shards)
    delta = Pack(manifest, shards, files, changed)
    delta.publish(store)
    found, _ = load_tensors(store, "demo", delta.digest, dict.fromkeys([LARGE, "layer.3.codes"]))
    assert torch.equal(found[LARGE], changed.tensors[LARGE])
    assert torch.equal(found["layer.3.codes"], changed.tensors["layer.3.codes"])


@pytest.mark.faults
def test_a_shard_that_is_gone_or_damaged_is_named(store: CountingStore, pack: Pack) -> None:
    key = shards_of(pack, LARGE)[0]
    data = store.get(key)
    store.put(key, data[:100] + bytes([data[100] ^ 1]) + data[101:])
    with pytest.raises(CorruptionError, match=rf"reading shard \d+ \({key.rpartition('/')[2]}"):
        load_tensors(store, "demo", pack.digest, {LARGE: None})
    store.delete(key)
    with pytest.raises(NotFoundError, match=key.rpartition("/")[2]):
        load_tensors(store, "demo", pack.digest, {LARGE: None})
    load_tensors(store, "demo", pack.digest, {"scale": None})  # whose shard is sound


def test_what_the_pack_does_not_have_is_refused(tmp_path: Path, store: CountingStore, pack: Pack) -> None:
    with pytest.raises(WorkloadError, match=r"no tensor 'layer\.9\.weight'"):
        load_tensors(store, "demo", pack.digest, {"layer.9.weight": None})
    graph = make_pack(tmp_path / "graph", onnx_checkpoint(), name="graph")
    graph.publish(store)
    with pytest.raises(WorkloadError, match="a pack of kind onnx"):
        load_tensors(store, "graph", graph.digest, {"w": None})


def test_a_pack_of_shares_gives_whole_tensors(tmp_path: Path, store: CountingStore) -> None:
    whole = torch_checkpoint()
    cut = sliced(whole, lambda name: {LARGE: 0, "layer.0.weight": 1}.get(name), 3)
    pack = make_pack(tmp_path / "cut", cut, name="cut")
    pack.publish(store)
    _, found = load.load_checkpoint(store, "cut", pack.digest)
    assert_same(found, whole)
    by_name = load.state_dict(store, "cut", pack.digest)
    assert all(torch.equal(by_name[name], tensor) for name, tensor in whole.tensors.items())
    store.read.clear()
    wanted = {LARGE: Share(0, 1, 3), "layer.0.weight": Share(1, 1, 2), "scale": None}
    parts, _ = load_tensors(store, "cut", pack.digest, wanted)
    assert torch.equal(parts[LARGE], whole.tensors[LARGE].chunk(3)[1])
    assert torch.equal(parts["layer.0.weight"], whole.tensors["layer.0.weight"].chunk(2, 1)[1])
    held = ["rank1of3." + LARGE, "rank1of3.layer.0.weight", "rank2of3.layer.0.weight", "scale"]
    assert sorted(store.read) == sorted(shards_of(pack, *held))


def test_of_a_pack_by_rank_each_reads_whole_shards_that_are_its_own(tmp_path: Path, store: CountingStore) -> None:
    whole = torch_checkpoint()
    axes = {LARGE: 0, "layer.0.weight": 1, "layer.1.weight": 0}
    coded, _ = compress(sliced(whole, axes.get, 2), COMPRESS)
    shards, _ = write_shards(coded, ShardConfig(by="rank"), tmp_path / "by rank")
    manifest, files = draft_manifest("ranks", coded, shards)
    pack = Pack(manifest, shards, files, whole)
    pack.publish(store)
    store.read.clear()
    for rank in range(2):
        found, report = load_tensors(
            store, "ranks", pack.digest, {name: Share(axis, rank, 2) for name, axis in axes.items()}
        )
        assert all(torch.equal(found[name], whole.tensors[name].chunk(2, axis)[rank]) for name, axis in axes.items())
        assert (report.shards, report.pack_shards) == (1, 4), "one of each rank, and what all take before and behind"
        assert report.read_bytes == manifest.shards[1 + rank].size_bytes
    assert sorted(store.read) == sorted(keys.blob(shard.sha256) for shard in manifest.shards[1:3])


class Layer(nn.Module):
    """Takes the pack's `layer.0`."""

    def __init__(self, inputs: int = 96, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layer = nn.ModuleList([nn.Linear(inputs, 64, dtype=dtype)])


class Tied(nn.Module):
    """An output layer that shares the embedding's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.out.weight = self.table.weight


@pytest.mark.parametrize("stated", [True, False])
def test_tied_weights_are_found_by_either_name(tmp_path: Path, store: CountingStore, stated: bool) -> None:
    """Whether the pack says so or, as one that was made of a folder, does not; the stage has the output layer alone."""
    source = Tied()
    checkpoint = from_module(source)
    if not stated:
        checkpoint.metadata.pop("tied")
    pack = make_pack(tmp_path / "tied", checkpoint, name="tied")
    pack.publish(store)
    last = nn.ModuleDict({"out": nn.Linear(4, 7, bias=False)})
    load_into_(last, store, "tied", pack.digest, tied=None if stated else tied_names(source))
    assert torch.equal(last["out"].weight, source.table.weight)
    whole = Tied().to("meta")
    whole.out.weight = whole.table.weight
    load_into_(whole, store, "tied", pack.digest, tied=tied_names(whole))
    assert whole.out.weight is whole.table.weight
    assert torch.equal(whole.out.weight, source.table.weight)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_module_is_filled(store: CountingStore, pack: Pack, device: str) -> None:
    module = Layer().to(device)
    report = load_into_(module, store, "demo", pack.digest)
    assert torch.equal(module.layer[0].weight, pack.checkpoint.tensors["layer.0.weight"])
    assert isinstance(module.layer[0].weight, nn.Parameter)
    assert module.layer[0].weight.requires_grad
    assert report.tensors == 2


@pytest.mark.parametrize("module", [Layer(inputs=95), Layer(dtype=torch.float64)])
def test_a_module_of_other_shapes_is_refused(store: CountingStore, pack: Pack, module: nn.Module) -> None:
    with pytest.raises(WorkloadError, match=r"layer\.0\.weight(.|\n)*torch\.float32 \[64, 96\] in the pack"):
        load_into_(module, store, "demo", pack.digest)
