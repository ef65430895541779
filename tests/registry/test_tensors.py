"""Inputs of a graph: how they are described, and what is refused before the graph sees it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from modelpress import graph
from modelpress.errors import WorkloadError
from registry import tensors
from registry.tensors import Tensor
from tests.packs import onnx_checkpoint

AGE = Tensor("age", np.dtype(np.float32), ("n",))
CITY = Tensor("city", np.dtype(np.int64), ("n", 1))
FREE = Tensor("free", np.dtype(np.float32), ("", ""))


def good() -> dict[str, np.ndarray]:
    return {"age": np.ones(3, np.float32), "city": np.ones((3, 1), np.int64), "free": np.ones((2, 5), np.float32)}


def test_what_a_graph_takes_is_let_through_as_it_is() -> None:
    given = good()
    assert all(found is given[name] for name, found in tensors.check([AGE, CITY, FREE], given).items())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"city": None}, r"found: inputs age, free\n  expected: age \(float32, \[n\]\), city \(int64, \[n, 1\]\)"),
        ({"town": np.ones(3)}, r"found: inputs age, city, free, town"),
        ({"age": [1.0, 1.0, 1.0]}, r"found: list for age\n  expected: age \(float32, \[n\]\)$"),
        ({"age": np.ones(3)}, r"found: age \(float64, \[3\]\)"),
        ({"age": np.ones((3, 1), np.float32)}, r"found: age \(float32, \[3, 1\]\)"),
        ({"city": np.ones((3, 2), np.int64)}, r"found: city \(int64, \[3, 2\]\)\n  expected: city \(int64, \[n, 1\]\)"),
        ({"city": np.ones((2, 1), np.int64)}, r"found: axis 'n' of 3 in age, of 2 in city"),
    ],
)
def test_other_names_types_and_shapes_are_named(changes: dict[str, np.ndarray | None], said: str) -> None:
    given = {name: array for name, array in {**good(), **changes}.items() if array is not None}
    with pytest.raises(WorkloadError, match=said):
        tensors.check([AGE, CITY, FREE], given)


def test_a_graph_and_its_session_are_described_alike() -> None:
    checkpoint = onnx_checkpoint()
    inputs, outputs = tensors.of_graph(graph.parse(checkpoint))
    assert inputs == tensors.of_session(graph.session(checkpoint)) == [Tensor("x", np.dtype(np.float32), ("n", 96))]
    assert outputs == [Tensor("y", np.dtype(np.float32), ("n", 64))]
    assert inputs[0].example().shape == (1, 96)
    assert Tensor("ids", np.dtype(np.int64), ("batch", "length")).example().shape == (1, tensors.EXAMPLE_SIZE)


def test_a_type_that_mlflow_cannot_describe_is_named() -> None:
    text = helper.make_tensor_value_info("text", TensorProto.STRING, ["n"])
    body = helper.make_graph([helper.make_node("Identity", ["text"], ["same"])], "g", [text], [text])
    model: onnx.ModelProto = helper.make_model(body)
    with pytest.raises(WorkloadError, match=r"describing 'text' of a graph(.|\n)*of type string"):
        tensors.of_graph(model)
