"""Weights as indices into a table: bit for bit the same answers, from fewer bytes, at the same cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from modelpress import graph, load
from modelpress.compress import compress
from modelpress.config import CompressConfig
from modelpress.errors import StageError
from modelpress.quantize.indices import halve_, index_
from modelpress.store.local import LocalStore
from tests.packs import make_pack

VALUES = np.array([-1.5, -0.25, -0.0, 0.0, 1e-30, 0.75, 3.0], np.float32)


def few_valued(*shape: int, values: np.ndarray = VALUES, zeros: float = 0.0) -> np.ndarray:
    random = np.random.default_rng(0)
    picked = random.choice(values, shape).astype(np.float32)
    return np.where(random.random(shape) < zeros, np.float32(0), picked).astype(np.float32)


def model_of(
    nodes: Sequence[NodeProto], weights: dict[str, np.ndarray], x: list[object], y: list[object]
) -> ModelProto:
    kind = TensorProto.INT64 if nodes[0].op_type == "Gather" else TensorProto.FLOAT
    signature = [helper.make_tensor_value_info("x", kind, x), helper.make_tensor_value_info("y", TensorProto.FLOAT, y)]
    constants = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    body = helper.make_graph(nodes, "g", signature[:1], signature[1:], constants)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def copied(model: ModelProto) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


def answers(model: ModelProto, x: torch.Tensor) -> bytes:
    return graph.run(graph.session(graph.split(model)), {"x": x}).tobytes()


CASES = {
    "MatMul": (
        model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": few_valued(64, 48)}, ["n", 64], ["n", 48]),
        torch.randn(5, 64),
    ),
    "Gemm": (
        model_of(
            [helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)],
            {"w": few_valued(48, 64), "b": np.ones(48, np.float32)},
            ["n", 64],
            ["n", 48],
        ),
        torch.randn(5, 64),
    ),
    "Conv": (
        model_of(
            [helper.make_node("Conv", ["x", "w"], ["y"])], {"w": few_valued(8, 4, 3, 3)}, ["n", 4, 9, 9], ["n", 8, 7, 7]
        ),
        torch.randn(2, 4, 9, 9),
    ),
    "Gather": (
        model_of([helper.make_node("Gather", ["w", "x"], ["y"])], {"w": few_valued(100, 16)}, ["n", 3], ["n", 3, 16]),
        torch.arange(99).reshape(33, 3),
    ),
    "shared": (
        model_of(
            [
                helper.make_node("MatMul", ["x", "w"], ["h"]),
                helper.make_node("Relu", ["h"], ["r"]),
                helper.make_node("Gemm", ["r", "w"], ["y"], transB=1),
            ],
            {"w": few_valued(64, 64)},
            ["n", 64],
            ["n", 64],
        ),
        torch.randn(5, 64),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_answers_are_the_same_to_the_bit(case: str) -> None:
    model, x = CASES[case]
    rewritten = copied(model)
    assert index_(rewritten, ["w"]) == {"w": VALUES.size}
    onnx.checker.check_model(rewritten, full_check=True)
    assert answers(rewritten, x) == answers(model, x)
    kinds = {one.name: one.data_type for one in rewritten.graph.initializer}
    assert kinds.pop("w_indices") == TensorProto.UINT8
    assert "w" not in kinds


@pytest.mark.parametrize("case", CASES)
def test_nothing_of_it_is_left_when_the_graph_runs(case: str, tmp_path: Path) -> None:
    model, _ = CASES[case]
    rewritten = copied(model)
    index_(rewritten, ["w"])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "folded.onnx")
    onnxruntime.InferenceSession(rewritten.SerializeToString(), options, providers=["CPUExecutionProvider"])
    left = [node.op_type for node in onnx.load(tmp_path / "folded.onnx").graph.node]
    assert left == [node.op_type for node in model.graph.node]


def test_zero_is_index_0_and_the_others_rise_with_the_value() -> None:
    model = copied(CASES["MatMul"][0])
    weights = numpy_helper.to_array(model.graph.initializer[0])
    index_(model, ["w"])
    arrays = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    indices, table = arrays["w_indices"], arrays["w_values"]
    assert np.array_equal(indices == 0, (weights == 0) & ~np.signbit(weights))
    assert table[0] == 0
    assert not np.signbit(table[0])
    assert (np.diff(table[1:]) >= 0).all()
    assert table[indices].tobytes() == weights.tobytes()


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (np.zeros((64, 48), np.float32), 1),
        (np.full((64, 48), 0.5, np.float32), 1),
        (few_valued(64, 48, values=np.arange(1, 256, dtype=np.float32)), 255),
        (few_valued(64, 48, values=np.arange(0, 256, dtype=np.float32)), 256),
    ],
    ids=["zeros", "constant", "255 values", "0 and 255 values"],
)
def test_few_values_are_indexed(weights: np.ndarray, expected: int) -> None:
    model = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": weights}, ["n", 64], ["n", 48])
    rewritten = copied(model)
    assert index_(rewritten, ["w"]) == {"w": expected}
    x = torch.randn(3, 64)
    assert answers(rewritten, x) == answers(model, x)


@pytest.mark.parametrize(
    "weights",
    [few_valued(64, 48, values=np.arange(1, 257, dtype=np.float32)), few_valued(2, 2)],
    ids=["256 values and no zero", "too small to pay"],
)
def test_what_does_not_fit_or_pay_stays(weights: np.ndarray) -> None:
    rows, columns = weights.shape
    model = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": weights}, ["n", rows], ["n", columns])
    rewritten = copied(model)
    assert index_(rewritten, ["w"]) == {}
    assert rewritten == model


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    weights = few_valued(64, 48)
    weights[3, 4] = bad
    model = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": weights}, ["n", 64], ["n", 48])
    with pytest.raises(StageError, match="'w'"):
        index_(model, ["w"])
    with pytest.raises(StageError, match="'other'"):
        index_(model, ["other"])


def test_a_sparse_one_is_coded_by_its_gaps_and_comes_back_from_a_pack(tmp_path: Path) -> None:
    weights = few_valued(512, 256, values=np.linspace(-1, 1, 31, dtype=np.float32), zeros=0.95)
    model = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": weights}, ["n", 512], ["n", 256])
    rewritten = copied(model)
    index_(rewritten, ["w"])
    checkpoint = graph.split(rewritten)
    _, report = compress(checkpoint, CompressConfig())
    (row,) = report.tensors
    assert (row.name, row.dtype, row.codec) == ("w_indices", "U8", "rle-huffman")
    shares = np.unique(weights, return_counts=True)[1] / weights.size
    entropy_bytes = -weights.size * (shares * np.log2(shares)).sum() / 8
    assert entropy_bytes < row.stored_bytes < 1.05 * entropy_bytes
    store = LocalStore(tmp_path / "store")
    pack = make_pack(tmp_path / "shards", checkpoint)
    pack.publish(store)
    _, loaded = load.load_checkpoint(store, "demo", pack.digest)
    x = torch.randn(4, 512)
    assert graph.run(graph.session(loaded), {"x": x}).tobytes() == answers(model, x)


def test_vectors_become_half_precision_where_it_holds_them() -> None:
    random = np.random.default_rng(0)
    vectors = {
        "bias": random.standard_normal(100).astype(np.float32),
        "short": random.standard_normal(10).astype(np.float32),
        "huge": np.full(100, 1e6, np.float32),
        "tiny": np.full(100, 3e-8, np.float32),
        "buffer": random.standard_normal(100).astype(np.float32),
    }
    names = ["x", "bias", "huge", "tiny", "buffer"]
    nodes = [
        helper.make_node("Add", [value, name], [f"x{i}"])
        for i, (value, name) in enumerate(zip(["x", "x0", "x1", "x2"], names[1:], strict=True))
    ]
    nodes.append(helper.make_node("Slice", ["x3", "from", "to", "axes"], ["cut"]))
    nodes.append(helper.make_node("Add", ["cut", "short"], ["y"]))
    ends = {name: np.array([value]) for name, value in (("from", 0), ("to", 10), ("axes", 1))}
    model = model_of(nodes, vectors | ends, ["n", 100], ["n", 10])
    assert halve_(model, ["bias", "short", "huge", "tiny"]) == ["bias"]
    onnx.checker.check_model(model, full_check=True)
    arrays = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    assert arrays["bias_half"].dtype == np.float16
    assert np.abs(arrays["bias_half"] - vectors["bias"]).max() <= np.abs(vectors["bias"]).max() / 2048
    answers(model, torch.randn(3, 100))
