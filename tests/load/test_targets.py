"""A pack in the form that runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from modelpress import graph, keys, load, pointer
from modelpress.errors import ConfigError, CorruptionError, SetupError, WorkloadError
from modelpress.store.local import LocalStore
from tests.packs import Pack, make_pack, onnx_checkpoint, torch_checkpoint


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture
def pack(tmp_path: Path, store: LocalStore) -> Pack:
    checkpoint = dataclasses.replace(torch_checkpoint(), metadata={"tied": {"head.weight": "layer.1.weight"}})
    pack = make_pack(tmp_path / "shards", checkpoint)
    pack.publish(store)
    pointer.append(store, "demo", "champion", pack.digest, "promote")
    return pack


def test_a_session_answers_what_the_graph_answers(store: LocalStore, tmp_path: Path) -> None:
    checkpoint = onnx_checkpoint()
    pack = make_pack(tmp_path / "shards", checkpoint, name="graph")
    pack.publish(store)
    inputs = {"x": np.random.default_rng(0).standard_normal((3, 96)).astype(np.float32)}
    expected = graph.session(checkpoint, threads=1).run(None, inputs)[0]
    assert np.array_equal(load.open_session(store.uri, "graph", pack.digest, threads=1).run(None, inputs)[0], expected)


def test_a_state_dict_has_tied_tensors_once_in_memory(store: LocalStore, pack: Pack) -> None:
    found = load.state_dict(store, "demo")
    assert found.keys() == {*pack.checkpoint.tensors, "head.weight"}
    assert all(torch.equal(found[name], tensor) for name, tensor in pack.checkpoint.tensors.items())
    assert found["head.weight"] is found["layer.1.weight"]


def test_what_does_not_fit_is_refused(store: LocalStore, pack: Pack, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cpu or cuda"):
        load.state_dict(store, "demo", device="abacus")
    with pytest.raises(ConfigError, match="cpu or cuda"):
        load.state_dict(store, "demo", device="meta")
    with pytest.raises(SetupError, match="device='cpu'"):
        load.state_dict(store, "demo", device="cuda:99")
    other = make_pack(tmp_path / "other", onnx_checkpoint(), name="graph")
    other.publish(store)
    with pytest.raises(WorkloadError, match="open_session"):
        load.state_dict(store, "graph", other.digest)
    with pytest.raises(CorruptionError, match="torch"):
        load.open_session(store, "demo")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_state_dict_on_a_gpu(store: LocalStore, pack: Pack) -> None:
    found = load.state_dict(store, "demo", device="cuda")
    assert all(tensor.is_cuda for tensor in found.values())
    assert all(torch.equal(found[name].cpu(), tensor) for name, tensor in pack.checkpoint.tensors.items())


def test_a_pack_gives_single_tensors_and_fetches_no_others(store: LocalStore, pack: Pack) -> None:
    tensors = load.open_pack(store, "demo")
    assert list(tensors) == [entry.name for entry in pack.manifest.tensors]
    assert "demo" in repr(tensors)
    assert "none such" not in tensors
    (wanted,) = (entry for entry in pack.manifest.tensors if entry.name == "layer.2.weight")
    for number, shard in enumerate(pack.manifest.shards):
        if number not in wanted.shards:
            store.delete(keys.blob(shard.sha256))
    assert torch.equal(tensors["layer.2.weight"], pack.checkpoint.tensors["layer.2.weight"])
