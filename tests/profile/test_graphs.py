"""Graphs by operators, in ONNX Runtime itself, with operations and bytes counted by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper

from modelpress import graph
from modelpress.config import ExportConfig
from modelpress.errors import CorruptionError, SetupError, WorkloadError
from modelpress.export import export
from modelpress.profile import graphs
from modelpress.profile.counts import Value
from modelpress.profile.ran import Operator, Ran, typical
from tests.toys import ImageToy, TextToy

CPU = "CPUExecutionProvider"


def two_products(width: int = 256, rows: str | int = "n") -> ModelProto:
    """x·w0, then Softmax, then ·w1; both weights are (width, width)."""
    generator = np.random.default_rng(0)
    weights = [numpy_helper.from_array(generator.random((width, width), np.float32), f"w{n}") for n in range(2)]
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["a"], name="first"),
        helper.make_node("Softmax", ["a"], ["b"], name="middle"),
        helper.make_node("MatMul", ["b", "w1"], ["y"], name="last"),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, width]) for name in ("x", "y")]
    body = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.fixture(scope="module")
def ran() -> Ran:
    inputs = {"x": torch.rand(4, 256)}
    return graphs.run_watched(graph.split(two_products()), inputs, CPU, 1, 0.01)


def test_operators_have_the_operations_and_bytes_of_their_run(ran: Ran) -> None:
    found = {one.name: one for one in ran.operators}
    assert [one.name for one in ran.operators] == ["first", "middle", "last"]
    activation, weight = 4 * 256 * 4, 256 * 256 * 4
    for name, tensor in (("first", "w0"), ("last", "w1")):
        assert found[name].flops == 2 * 4 * 256 * 256
        assert found[name].read_bytes == activation + weight
        assert found[name].written_bytes == activation
        assert (found[name].weights, found[name].weight_bytes) == ([tensor], weight)
        assert found[name].dtype == "float32"
    assert (found["middle"].flops, found["middle"].weights) == (5 * 4 * 256, [])
    assert ran.activations_bytes == 2 * activation


def test_each_operator_has_a_time_and_the_runs_have_more(ran: Ran) -> None:
    times = [one.seconds for one in ran.operators]
    assert all(seconds is not None and seconds >= graphs.LEAST_SECONDS for seconds in times)
    assert ran.run_seconds > 0
    assert ran.watched_seconds > 0


def test_an_exported_cnn_counts_what_its_layers_do() -> None:
    toy = ImageToy()
    exported, _ = export(toy.source(), toy, ExportConfig())
    found = graphs.run_watched(exported, toy.example(2), CPU, 1, 0.01)
    flops = {kind: sum(one.flops or 0 for one in found.operators if kind in one.op_type) for kind in ("Conv", "Gemm")}
    # Weights of each layer by the places that they are applied to, and a bias for each output.
    assert flops["Gemm"] == 2 * (2 * 3072 + 16 + 2 * 160 + 10)
    # ONNX Runtime's kernels compute whole blocks of channels, as many as the processor's vectors hold.
    padded = [[-(-channels // block) * block for channels in (8, 12)] for block in (1, 4, 8, 16)]
    assert flops["Conv"] in [2 * 64 * (first * (2 * 9 + 1) + second * (2 * 72 + 1)) for first, second in padded]
    assert all(one.flops is not None for one in found.operators)
    assert sum(one.weight_bytes for one in found.operators) >= 4 * (72 + 864 + 3072 + 160)
    named = {name for one in found.operators for name in one.weights}
    assert {"body.7.weight", "body.9.weight"} <= named <= {one.name for one in graph.parse(exported).graph.initializer}


def test_an_exported_encoder_reads_only_shapes_that_ran() -> None:
    toy = TextToy()
    exported, _ = export(toy.source(), toy, ExportConfig())
    inputs = toy.example(3)
    found = graphs.run_watched(exported, inputs, CPU, 1, 0.01)
    tokens = inputs["ids"].numel()
    products = [one for one in found.operators if one.op_type in ("MatMul", "FusedMatMul", "Gemm")]
    assert sum(one.flops or 0 for one in products) >= 2 * tokens * (2048 + 2048)
    (table,) = [one for one in found.operators if "table.weight" in one.weights]
    assert table.read_bytes == 8 * tokens + 4 * 32 * tokens  # the picked rows, not the table
    assert table.weight_bytes == 4 * 100 * 32


def test_integers_are_told_from_floats() -> None:
    weight = numpy_helper.from_array(np.ones((64, 64), np.int8), "w")
    nodes = [helper.make_node("MatMulInteger", ["x", "w"], ["y"], name="whole")]
    ends = [helper.make_tensor_value_info("x", TensorProto.UINT8, ["n", 64])]
    ends += [helper.make_tensor_value_info("y", TensorProto.INT32, ["n", 64])]
    body = helper.make_graph(nodes, "g", ends[:1], ends[1:], [weight])
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    found = graphs.run_watched(graph.split(model), {"x": torch.ones(3, 64, dtype=torch.uint8)}, CPU, 1, 0.01)
    (one,) = found.operators
    assert (one.dtype, one.flops, one.weight_bytes) == ("int8", 2 * 3 * 64 * 64, 64 * 64)
    assert (one.read_bytes, one.written_bytes) == (64 * 64 + 3 * 64, 3 * 64 * 4)


def test_inputs_and_providers_are_asked_for_as_everywhere() -> None:
    checkpoint = graph.split(two_products(32))
    with pytest.raises(WorkloadError):
        graphs.run_watched(checkpoint, {"z": torch.rand(4, 32)}, CPU, 1, 0.01)
    with pytest.raises(SetupError):
        graphs.run_watched(checkpoint, {"x": torch.rand(4, 32)}, "VitisAIExecutionProvider", 1, 0.01)


def test_values_are_alive_from_their_writer_to_their_last_reader() -> None:
    """x (4 bytes) → a (400) → b (4), and x is read again at the end: x stays, a goes."""
    nodes = [
        helper.make_node("A", ["x"], ["a"]),
        helper.make_node("B", ["a"], ["b"]),
        helper.make_node("C", ["b", "x"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    model = helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:]))
    small, large = Value("float32", (1,)), Value("float32", (100,))
    values = {"x": small, "a": large, "b": small, "y": small}
    assert graphs.alive_bytes(model, nodes, values) == 408
    assert graphs.alive_bytes(model, nodes, values | {"b": large}) == 804
    del values["b"]
    assert graphs.alive_bytes(model, nodes, values) is None


def event(name: str, at: int, **facts: object) -> dict[str, object]:
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": at, "dur": 3, "args": {"op_name": "Add", **facts}}


def test_events_fall_into_their_runs() -> None:
    runs = [{"cat": "Session", "name": "model_run", "ts": at, "dur": 40} for at in (10, 100)]
    shapes = [{"float": [2, 3]}, {"int64": []}]
    nodes = [event("a", 10, output_type_shape=shapes), event("b", 20), event("a", 101)]
    found = graphs.read_events(json.dumps([*reversed(nodes), *runs, {"name": "no time"}]).encode())
    assert [[one.node for one in run] for run in found] == [["a", "b"], ["a"]]
    assert found[0][0].outputs == (Value("float32", (2, 3)), Value("int64", ()))
    assert found[0][0].seconds == pytest.approx(3.5e-6)  # what was cut off a microsecond is half of one, on the mean


RUN = b'[{"ts": 1, "cat": "Session", "name": "model_run"}, '


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[1]",
        b'{"ts": 1}',
        b'[{"ts": "soon", "name": "model_run"}]',
        RUN + b'{"ts": 2, "cat": "Node", "name": "a_kernel_time"}]',
        RUN + b'{"ts": 2, "cat": "Node", "name": "a_kernel_time", "dur": 1, "args": {"op_name": "Add", '
        b'"output_type_shape": [{"float": ["many"]}]}}]',
    ],
)
def test_what_is_no_profile_is_refused(data: bytes) -> None:
    with pytest.raises(CorruptionError, match="profile"):
        graphs.read_events(data)


def test_runs_that_are_missing_are_noticed(tmp_path: Path) -> None:
    with pytest.raises(CorruptionError, match="2 runs"):
        graphs._by_node([[], []], onnx.ModelProto(), 3)


def test_a_typical_time_is_that_of_the_middle_half() -> None:
    assert typical([1.0] * 6 + [1000.0, 0.0]) == 1.0
    assert typical([1.0, 2.0]) == 1.5
    assert typical([7.0]) == 7.0
    assert typical([9.0, 2.0, 3.0, 0.0]) == 2.5


def test_operators_are_what_the_roofline_takes(ran: Ran) -> None:
    assert all(isinstance(one, Operator) and not one.untimed for one in ran.operators)


def test_what_watching_adds_is_measured_once_and_taken_off() -> None:
    added = graphs.watching_seconds()
    assert 0 <= added < 1e-3
    assert graphs.watching_seconds() == added


def test_operators_of_a_microsecond_are_watched_in_few_runs() -> None:
    """256 operators on one number: a watched run takes many times as long."""
    found = graphs.run_watched(graphs.chain(), {"x0": torch.zeros(1)}, CPU, 1, 0.3)
    assert len(found.operators) == graphs.CHAIN
    assert all(one.flops == 1 for one in found.operators)
    assert found.watched_seconds > found.run_seconds
    assert found.watched_share < 0.3
