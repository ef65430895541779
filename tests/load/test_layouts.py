"""Graphs as ONNX files and as a Triton model repository, read by ONNX Runtime and by Triton's own format."""

from __future__ import annotations

import dataclasses
import os
import resource
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from modelpress import graph, keys, load
from modelpress.checkpoint import Checkpoint
from modelpress.errors import ConfigError, CorruptionError, StoreFullError
from modelpress.load.layouts import LAYOUTS, triton
from modelpress.load.layouts.writing import write_file
from modelpress.manifest import Manifest
from modelpress.store import Store
from modelpress.store.local import LocalStore
from tests.conftest import ROOT
from tests.load.test_triton import parse
from tests.packs import make_pack, onnx_checkpoint, torch_checkpoint


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return LocalStore(tmp_path / "store")


def two_weights() -> Checkpoint:
    """A graph whose two large weights are of different widths, beside one that stays inside."""
    random = np.random.default_rng(0)
    weights = {"a": random.standard_normal((96, 64)).astype(np.float32), "b": random.standard_normal((64, 40))}
    inline = np.arange(40, dtype=np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["m"]),
        helper.make_node("Cast", ["b"], ["narrow"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["m", "narrow"], ["n"]),
        helper.make_node("Add", ["n", "c"], ["y"]),
    ]
    signature = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", d]) for n, d in (("x", 96), ("y", 40))]
    values = [numpy_helper.from_array(value, name) for name, value in {**weights, "c": inline}.items()]
    body = helper.make_graph(nodes, "g", signature[:1], signature[1:], values)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    split = graph.split(model)
    return Checkpoint("onnx", split.tensors, split.files | {"tokenizer/vocab.txt": b"a\nb\n"})


def answers(path: Path) -> np.ndarray:
    inputs = {"x": np.random.default_rng(1).standard_normal((3, 96)).astype(np.float32)}
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, inputs)[0]
    return found


def publish(store: Store, folder: Path, checkpoint: Checkpoint) -> str:
    pack = make_pack(folder, checkpoint, name="graph")
    pack.publish(store)
    return pack.digest


@pytest.mark.parametrize("limit", [2**31, 20_000])
def test_onnx_runtime_loads_weights_from_one_file_and_from_several(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    checkpoint = two_weights()
    digest = publish(store, tmp_path / "shards", checkpoint)
    monkeypatch.setattr("modelpress.load.layouts.graphs.DATA_FILE_BYTES", limit)
    folder = tmp_path / "pulled"
    load.pull(store, "graph", digest, folder, "onnx")
    onnx.checker.check_model(str(folder / "model.onnx"))
    expected = graph.session(checkpoint, threads=1).run(
        None, {"x": np.random.default_rng(1).standard_normal((3, 96)).astype(np.float32)}
    )[0]
    assert np.array_equal(answers(folder / "model.onnx"), expected)
    one = ["model.onnx.data"]
    several = ["model.onnx.data-00001-of-00002", "model.onnx.data-00002-of-00002"]
    assert sorted(path.name for path in folder.glob("*.data*")) == (one if limit > 20_000 else several)
    assert (folder / "tokenizer/vocab.txt").read_bytes() == b"a\nb\n"
    places = [entry for one in onnx.load(folder / "model.onnx", load_external_data=False).graph.initializer
              for entry in one.external_data if entry.key == "offset"]  # fmt: skip
    assert len(places) == 2
    assert all(int(entry.value) % 4096 == 0 for entry in places)


def test_triton_reads_the_repository(store: Store, tmp_path: Path) -> None:
    digest = publish(store, tmp_path / "shards", two_weights())
    folder = tmp_path / "pulled"
    load.pull(store, "graph", digest, folder, "triton")
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert found == [
        "graph/1/model.onnx", "graph/1/model.onnx.data", "graph/1/tokenizer/vocab.txt", "graph/config.pbtxt",
        "modelpress.json",
    ]  # fmt: skip
    assert answers(folder / "graph/1/model.onnx").shape == (3, 40)
    config = parse((folder / "graph/config.pbtxt").read_text())
    assert (config["name"], config["backend"], config["default_model_filename"]) == (
        "graph",
        "onnxruntime",
        "model.onnx",
    )
    assert config["max_batch_size"] == triton.MAX_BATCH_SIZE
    assert config["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [96]}]
    assert config["output"] == [{"name": "y", "data_type": "TYPE_FP32", "dims": [40]}]
    assert config["instance_group"] == [{"count": 1, "kind": "KIND_AUTO"}]
    assert config["dynamic_batching"]["max_queue_delay_microseconds"] > 0


def test_each_layout_says_what_it_is_in_the_help() -> None:
    from modelpress.cli.packs import pull as command

    assert command.__doc__ is not None
    assert list(LAYOUTS) == list(get_args(load.Layout))
    assert ", ".join(map(repr, LAYOUTS)) in command.__annotations__["layout"]
    for name, writer in LAYOUTS.items():
        (line,) = [one.split(maxsplit=1) for one in command.__doc__.splitlines() if one.split()[:1] == [name]]
        assert line[1] == writer.about


@pytest.mark.parametrize("layout", ["onnx", "triton", "vitis-ai", "huggingface", "compressed-tensors"])
def test_a_layout_refuses_what_it_does_not_fit_before_anything_is_fetched(
    store: Store, tmp_path: Path, layout: Any
) -> None:
    graphs = layout in ("onnx", "triton", "vitis-ai")
    pack = make_pack(tmp_path / "shards", torch_checkpoint() if graphs else onnx_checkpoint(), name="demo")
    pack.publish(store)
    for blob in pack.manifest.blobs():
        store.delete(keys.blob(blob))
    said = "layout checkpoint" if graphs else r"modelpress publish FOLDER[\s\S]*onnx or triton"
    with pytest.raises(ConfigError, match=said):
        load.pull(store, "demo", pack.digest, tmp_path / "pulled", layout)
    assert not (tmp_path / "pulled").exists()


@pytest.mark.parametrize(
    ("layout", "files"),
    [
        ("onnx", {"model.onnx.data": b"x"}),
        ("triton", {"model.onnx.data": b"x"}),
        ("onnx", {"modelpress.json": b"x"}),
        ("onnx", {"model.onnx.data/x": b"x"}),
        ("onnx", {"a": b"x", "a/b": b"x"}),
        ("checkpoint", {"model.safetensors": b"x"}),
        ("checkpoint", {"modelpress.json/x": b"x"}),
    ],
)
def test_files_in_each_others_way_are_refused_before_anything_is_fetched(
    store: Store, tmp_path: Path, layout: Any, files: dict[str, bytes]
) -> None:
    checkpoint = onnx_checkpoint()
    pack = make_pack(tmp_path / "shards", dataclasses.replace(checkpoint, files=checkpoint.files | files), name="graph")
    pack.publish(store)
    for blob in pack.manifest.blobs():
        store.delete(keys.blob(blob))
    with pytest.raises(ConfigError, match=r"takes for itself|a folder of this name"):
        load.pull(store, "graph", pack.digest, tmp_path / "pulled", layout)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards", "store"]


def test_a_folder_that_cannot_be_replaced_is_refused_before_anything_is_fetched(store: Store, tmp_path: Path) -> None:
    digest = publish(store, tmp_path / "shards", two_weights())
    for blob in list(store.list(keys.BLOBS)):
        store.delete(blob.key)
    (tmp_path / "empty").mkdir()
    for target in ("empty", "nowhere"):
        (tmp_path / "link").symlink_to(tmp_path / target)
        with pytest.raises(ConfigError, match="a symbolic link"):
            load.pull(store, "graph", digest, tmp_path / "link", "onnx")
        (tmp_path / "link").unlink()
    command = [sys.executable, "-m", "modelpress.cli", "pull", f"graph@{digest}", "--store", store.uri, "--to", "empty"]
    shell = f"mount -t tmpfs none empty && exec {shlex.join(command)}"
    found = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", shell],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if "mount" in found.stderr and "point" not in found.stderr:
        pytest.skip(f"nothing can be mounted here: {found.stderr}")
    assert "a mount point" in found.stderr, found.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "shards", "store"]


def test_files_whose_names_are_one_on_this_file_system_are_not_written_over_each_other(tmp_path: Path) -> None:
    """As `A.txt` and `a.txt` are on some."""
    write_file(tmp_path / "folder" / "a.txt", b"first")
    with pytest.raises(ConfigError, match="differ in case or spelling"):
        write_file(tmp_path / "folder" / "a.txt", b"second")
    assert (tmp_path / "folder" / "a.txt").read_bytes() == b"first"


def test_tensors_that_the_graph_does_not_name_are_refused(store: Store, tmp_path: Path) -> None:
    checkpoint = two_weights()
    spare = dataclasses.replace(checkpoint, tensors=checkpoint.tensors | {"spare": torch.ones(700)})
    digest = publish(store, tmp_path / "shards", spare)
    with pytest.raises(CorruptionError, match="first 'spare'"):
        load.pull(store, "graph", digest, tmp_path / "pulled", "onnx")
    other = dataclasses.replace(checkpoint, tensors=checkpoint.tensors | {"a": torch.ones(96, 65)})
    digest = publish(store, tmp_path / "others", other)
    with pytest.raises(CorruptionError, match=r"filling initializer 'a'"):
        load.pull(store, "graph", digest, tmp_path / "pulled", "onnx")
    assert not (tmp_path / "pulled").exists()


@pytest.mark.parametrize("layout", ["checkpoint", "onnx", "triton"])
def test_a_full_disk_leaves_nothing(store: Store, tmp_path: Path, layout: Any) -> None:
    digest = publish(store, tmp_path / "shards", two_weights())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # a weight has 24 kB
    try:
        with pytest.raises(StoreFullError, match="pulling graph@"):
            load.pull(store, "graph", digest, tmp_path / "pulled", layout)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards", "store"]


def headed(store: Store, tmp_path: Path, origin: Any) -> str:
    """A pack that claims to come from a folder laid out so."""
    pack = make_pack(tmp_path / "shards", Checkpoint("torch", {"w": torch.ones(3)}, {}, {"huggingface": origin}))
    pack.publish(store)
    assert isinstance(pack.manifest, Manifest)
    return pack.digest


GOOD = '{"w":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}'


@pytest.mark.parametrize(
    ("origin", "said"),
    [
        ({"headers": {"../m.safetensors": GOOD}, "model": []}, "relative paths"),
        ({"headers": {"/m.safetensors": GOOD}, "model": []}, "relative paths"),
        ({"headers": {}, "model": []}, "headers"),
        ({"headers": {"m": GOOD}}, "model"),
        ("folder", "headers by file"),
        ({"headers": {"m": "{"}, "model": ["m"]}, "strict JSON"),
        ({"headers": {"m": "{}"}, "model": ["m"]}, "no place for tensor 'w'"),
        ({"headers": {"m": GOOD}, "model": []}, "a tensor 'm:w'"),
        ({"headers": {"m": GOOD.replace("12", "11")}, "model": ["m"]}, "tensor 'w'"),
        ({"headers": {"m": GOOD.replace("[0,12]", "[4,16]")}, "model": ["m"]}, "byte 4"),
        ({"headers": {"m": GOOD.replace("[0,12]", "[-12,0]")}, "model": ["m"]}, "byte -12"),
        ({"headers": {"m": GOOD.replace("[0,12]", "[0,1e1]")}, "model": ["m"]}, "data_offsets"),
        ({"headers": {"m": GOOD.replace("F32", "I32")}, "model": ["m"]}, "I32"),
        ({"headers": {"m": GOOD, "n": GOOD}, "model": ["m", "n"]}, "twice"),
        (
            {"headers": {"m": GOOD.replace('{"dtype"', '[{"dtype"').replace("}}", "}]}")}, "model": ["m"]},
            "data_offsets",
        ),
    ],
)
def test_headers_that_lie_are_refused(store: Store, tmp_path: Path, origin: Any, said: str) -> None:
    with pytest.raises(CorruptionError, match=said):
        load.pull(store, "demo", headed(store, tmp_path, origin), tmp_path / "pulled", "huggingface")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards", "store"]


def test_a_file_of_tensors_cannot_take_the_manifests_name(store: Store, tmp_path: Path) -> None:
    digest = headed(store, tmp_path, {"headers": {"modelpress.json": GOOD}, "model": ["modelpress.json"]})
    with pytest.raises(ConfigError, match="takes for itself"):
        load.pull(store, "demo", digest, tmp_path / "pulled", "huggingface")
