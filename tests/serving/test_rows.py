"""Which models' requests may be joined: what a row is answered with must not depend on its company."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from modelpress import graph
from serving.engine import Engine
from tests.serving.conftest import lookup_model, scale_model

FLOAT = TensorProto.FLOAT
Shape = Sequence[int | str]


def engine(
    nodes: Sequence[onnx.NodeProto],
    x: Shape,
    y: Shape,
    initializers: Sequence[onnx.TensorProto] = (),
    kind: int = FLOAT,
) -> Engine:
    """A graph from `x` to `y`, loaded, warm and examined."""
    inputs = [helper.make_tensor_value_info("x", kind, list(x))]
    outputs = [helper.make_tensor_value_info("y", FLOAT, list(y))]
    body = helper.make_graph(list(nodes), "made", inputs, outputs, list(initializers))
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    made = Engine("0" * 64, graph.session(graph.split(model), threads=1))
    made.warm_up()
    made.learn_rows()
    return made


def loaded(checkpoint: Any) -> Engine:
    made = Engine("0" * 64, graph.session(checkpoint, threads=1))
    made.warm_up()
    made.learn_rows()
    return made


def values(name: str, array: Any) -> onnx.TensorProto:
    return onnx.numpy_helper.from_array(np.asarray(array), name)


WEIGHT = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)


def dynamic_int8() -> Engine:
    """As `modelpress quantize` writes a product: the range of the activations is taken at each call."""
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"]),
        helper.make_node("MatMulInteger", ["q", "w", "zero"], ["product"]),
        helper.make_node("Cast", ["product"], ["wide"], to=FLOAT),
        helper.make_node("Mul", ["wide", "scale"], ["y"]),
    ]
    return engine(nodes, ["n", 8], ["n", 4], [values("w", (WEIGHT * 20).astype(np.int8))])


def hidden_range() -> Engine:
    """The same dependence, in operators that say nothing of it: only the trial can tell."""
    nodes = [
        helper.make_node("Abs", ["x"], ["a"]),
        helper.make_node("ReduceMax", ["a"], ["range"], keepdims=0),
        helper.make_node("Div", ["x", "range"], ["scaled"]),
        helper.make_node("Round", ["scaled"], ["y"]),
    ]
    return engine(nodes, ["n", 8], ["n", 8])


def test_rows_of_a_product_are_joined() -> None:
    for made in (loaded(scale_model(2.0)), loaded(lookup_model())):
        assert made.rows.joined, made.rows.reason
        assert made.row_seconds > 0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (dynamic_int8, "DynamicQuantizeLinear"),
        (hidden_range, "differs by"),
        (
            lambda: engine([helper.make_node("CumSum", ["x", "zero"], ["y"])], ["n", 8], ["n", 8], [values("zero", 0)]),
            "diff",
        ),
        (lambda: engine([helper.make_node("Relu", ["x"], ["y"])], [2, 8], [2, 8]), "one size"),
        (lambda: engine([helper.make_node("Relu", ["x"], ["y"])], ["n", "n"], ["n", "n"]), "size of the batch"),
        (
            lambda: engine([helper.make_node("Concat", ["x", "x"], ["y"], axis=0)], ["n", 8], ["m", 8]),
            "number of rows",
        ),
        (lambda: engine([helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0)], ["n", 8], []), "one size"),
        (lambda: engine([helper.make_node("RandomUniformLike", ["x"], ["y"])], ["n", 8], ["n", 8]), "draws lots"),
    ],
    ids=["dynamic int8", "hidden range", "running sum", "fixed batch", "square", "doubled", "one number", "random"],
)
def test_what_looks_at_all_rows_is_not_joined(make: Callable[[], Engine], said: str) -> None:
    made = make()
    assert not made.rows.joined
    assert said in made.rows.reason
    assert made.rows.to_json() == {"joined": False, "reason": made.rows.reason}


def test_joining_what_may_not_be_joined_would_change_answers() -> None:
    """What the rule is for: a row's answer by dynamic int8 is another one in company."""
    made = dynamic_int8()
    alone = np.linspace(-1, 1, 8, dtype=np.float32)[None]
    company = np.concatenate([alone, alone * 50])
    assert not np.allclose(
        made.infer({"x": company}, ["y"])["y"][0], made.infer({"x": alone}, ["y"])["y"][0], rtol=1e-3
    )


def test_a_graph_inside_of_another_is_looked_at_too() -> None:
    inner = helper.make_graph(
        [
            helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"]),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["inside"]),
        ],
        "inner",
        [],
        [helper.make_tensor_value_info("inside", FLOAT, None)],
    )
    nodes = [helper.make_node("If", ["always"], ["y"], then_branch=inner, else_branch=inner)]
    made = engine(nodes, ["n", 8], ["n", 8], [values("always", True)])
    assert "DynamicQuantizeLinear" in made.rows.reason


def test_binding_to_a_device_gives_the_same_answers() -> None:
    """The way to a GPU, on the CPU: the same calls of ONNX Runtime, for another device."""
    made = loaded(lookup_model())
    inputs = {"input_ids": np.array([[3, 5]], np.int64), "attention_mask": np.ones((1, 2, 1), np.float32)}
    plain = made.infer(inputs, ["y"])["y"]
    made._device = "cpu"
    assert np.array_equal(made.infer(inputs, ["y"])["y"], plain)
