"""Packs that no engine runs, and engines that fail: no other model suffers from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnxruntime.capi import onnxruntime_pybind11_state as native

from modelpress import graph
from modelpress.checkpoint import Checkpoint
from modelpress.errors import ServingError
from serving.protocol import NotReadyError, RequestError
from tests.serving.conftest import WIDTH, lookup_model, scale_model
from tests.serving.test_repository import answer, row

Call = Callable[..., Any]


def test_what_can_not_run_is_not_swapped_in(press: Call, repository: Call) -> None:
    press(scale_model(2.0))
    models = repository("scale")
    strings = helper.make_tensor_value_info("x", TensorProto.STRING, ["batch"])
    body = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "strings",
        [strings],
        [helper.make_tensor_value_info("y", TensorProto.STRING, ["batch"])],
    )
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    weight = onnx.numpy_helper.from_array(np.zeros(1024, np.float32), "unused")
    model.graph.initializer.append(weight)
    press(graph.split(model))
    with pytest.raises(ServingError, match="string"):
        models.load("scale")
    assert answer(models) == 2.0


def always_failing() -> Checkpoint:
    """A gather outside its table whatever the input: it loads, and answers nothing."""
    checkpoint = lookup_model()
    model = graph.join(checkpoint)
    outside = onnx.numpy_helper.from_array(np.array(1000, np.int64), "offset")
    model.graph.initializer.append(outside)
    model.graph.node.insert(0, helper.make_node("Add", ["input_ids", "offset"], ["moved"]))
    model.graph.node[1].input[1] = "moved"
    return graph.split(model)


def test_the_warm_up_must_succeed(press: Call, repository: Call) -> None:
    press(lookup_model(), "lookup")
    models = repository("lookup")
    kept = press(always_failing(), "lookup")
    with pytest.raises(ServingError, match="warming up"):
        models.load("lookup")
    assert row(models, "lookup")["version"] != kept


def model_of(node: onnx.NodeProto, x: onnx.ValueInfoProto, *initializers: onnx.TensorProto) -> onnx.ModelProto:
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    body = helper.make_graph([node], "g", [x], [y], list(initializers))
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def giant() -> Checkpoint:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2**40])
    return graph.split(model_of(helper.make_node("Identity", ["x"], ["y"]), x))


def many_axes() -> Checkpoint:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1] * 70)
    return graph.split(model_of(helper.make_node("Identity", ["x"], ["y"]), x))


def twice() -> Checkpoint:
    checkpoint = scale_model(2.0)
    model = graph.parse(checkpoint)
    model.graph.initializer.append(model.graph.initializer[0])
    return Checkpoint("onnx", checkpoint.tensors, {graph.GRAPH_FILE: model.SerializeToString()})


def no_text() -> Checkpoint:
    checkpoint = scale_model(2.0)
    model = graph.join(checkpoint)
    model.graph.input[0].name = model.graph.node[0].input[0] = "abcd"
    split = graph.split(model)
    data = split.files[graph.GRAPH_FILE].replace(b"abcd", b"a\xff\xfed")
    return Checkpoint("onnx", split.tensors, {graph.GRAPH_FILE: data})


def not_finite() -> Checkpoint:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTH])
    zeros = onnx.numpy_helper.from_array(np.zeros(WIDTH, np.float32), "zeros")
    return graph.split(model_of(helper.make_node("Div", ["x", "zeros"], ["y"]), x, zeros))


@pytest.mark.parametrize("hostile", [giant, many_axes, twice, no_text, not_finite])
def test_a_hostile_pack_starves_no_other(press: Call, repository: Call, hostile: Call) -> None:
    press(scale_model(2.0), "first")
    press(scale_model(2.0))
    models = repository()
    press(hostile(), "first")
    press(scale_model(3.0))
    models.poll()
    assert "pointer 2 can't be loaded" in row(models, "first")["reason"]
    assert answer(models, "first") == 2.0
    assert answer(models) == 3.0


def test_a_pack_too_large_for_the_memory_is_a_failure(
    press: Call, repository: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    press(scale_model(2.0))
    models = repository("scale")
    press(scale_model(3.0))

    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("serving.repository.load_engine", full)
    models.poll()
    assert answer(models) == 2.0
    assert "pointer 2 can't be loaded" in row(models)["reason"]
    with pytest.raises(ServingError, match="not enough memory"):
        models.load("scale")


def shaped_by_values() -> Checkpoint:
    """Zeros of the shape that the input names: any shape loads, some can't be made."""
    x = helper.make_tensor_value_info("x", TensorProto.INT64, ["rank"])
    return graph.split(model_of(helper.make_node("ConstantOfShape", ["x"], ["y"]), x))


def test_a_request_for_more_memory_than_there_is_takes_no_model_down(press: Call, repository: Call) -> None:
    press(shaped_by_values(), "shaped")
    models = repository("shaped")
    engine = models.model("shaped").answering().engine
    with pytest.raises(NotReadyError, match="too little memory"):
        engine.infer({"x": np.array([10**13])}, ["y"])
    with pytest.raises(RequestError) as caught:
        engine.infer({"x": np.array([-1])}, ["y"])
    assert caught.value.status == 400
    assert models.ready
    assert engine.infer({"x": np.array([3])}, ["y"])["y"].shape == (3,)


@pytest.mark.parametrize("kind", ["EPFail", "RuntimeException", "Fail"])
def test_a_lost_device_takes_the_model_down_until_it_is_loaded_again(
    press: Call, repository: Call, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    press(scale_model(2.0))
    models = repository("scale")
    engine = models.model("scale").answering().engine

    class Lost:
        """No machine of the tests loses its device: this stands for a session on one."""

        def run(self, *_: object) -> None:
            raise getattr(native, kind)("CUDA failure 46: all CUDA-capable devices are busy or unavailable")

    monkeypatch.setattr(engine, "_session", Lost())
    with pytest.raises(NotReadyError):
        engine.infer({"x": np.ones((1, WIDTH), np.float32)}, ["y"])
    assert not models.ready
    assert row(models)["state"] == "UNAVAILABLE"
    with pytest.raises(NotReadyError, match="execution provider"):
        models.model("scale").answering()
    models.poll()
    assert models.ready
    assert answer(models) == 2.0
