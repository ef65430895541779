"""Allocations that really fail, in each library that the stages use."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from modelpress import memory
from modelpress.errors import OutOfMemoryError, StageError

PETABYTE = 10**15


def in_onnxruntime() -> None:
    """A graph that fills a tensor of the shape that it is given."""
    shape = onnx.helper.make_tensor_value_info("shape", onnx.TensorProto.INT64, [1])
    output = onnx.helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, [None])
    node = onnx.helper.make_node("ConstantOfShape", ["shape"], ["output"])
    graph = onnx.helper.make_graph([node], "fill", [shape], [output])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    session.run(None, {"shape": np.array([PETABYTE // 4])})


@pytest.mark.parametrize(
    ("allocate", "asked"),
    [
        (lambda: torch.empty(PETABYTE, dtype=torch.uint8), PETABYTE),
        (lambda: np.empty(PETABYTE, dtype=np.uint8), PETABYTE),
        (in_onnxruntime, PETABYTE),
        (lambda: bytearray(PETABYTE), None),
    ],
    ids=["torch", "numpy", "onnxruntime", "python"],
)
def test_each_library_s_own_words_are_known(allocate: Callable[[], object], asked: int | None) -> None:
    with pytest.raises(OutOfMemoryError) as caught, memory.named("stage quantize", "take less"):
        allocate()
    error = caught.value
    assert error.doing == "stage quantize"
    assert error.fix == "take less"
    assert error.found is not None
    assert " free here" in error.found
    assert error.__cause__ is not None
    found = memory.asked_bytes(error.__cause__)
    assert (found == pytest.approx(asked, rel=0.01)) if asked else found is None


def test_an_error_that_names_its_place_keeps_its_words_under_the_stage_s() -> None:
    inner = OutOfMemoryError("training (epoch 1, update 3)", found="2.0 GiB asked for", fix="lower train.batch_size")
    with pytest.raises(OutOfMemoryError) as caught, memory.named("stage distill", "take less"):
        raise inner
    assert caught.value.doing == "stage distill: training (epoch 1, update 3)"
    assert (caught.value.found, caught.value.fix) == (inner.found, inner.fix)


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), StageError("distilling"), ValueError("memory")])
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, memory.named("stage distill", "take less"):
        raise error
    assert caught.value is error


def test_what_a_gpu_says_is_read() -> None:
    """The words of torch 2.13; the error's class is a RuntimeError's."""
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.20 GiB is "
        "free. Including non-PyTorch memory, this process has 77.90 GiB memory in use."
    )
    assert memory.ran_out(error)
    assert memory.asked_bytes(error) == int(2.5 * 2**30)
