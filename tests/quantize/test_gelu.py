from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from modelpress import graph
from modelpress.config import ExportConfig
from modelpress.export import export
from modelpress.quantize.gelu import respell_gelu_
from tests.toys import TextToy


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    workload = TextToy()
    return graph.join(export(workload.module, workload, ExportConfig())[0])


def fused(model: onnx.ModelProto, folder: Path) -> Counter[str]:
    """Operators of the graph as ONNX Runtime runs it."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def test_onnx_runtime_fuses_the_respelt_gelu_and_answers_the_same(model, tmp_path) -> None:
    made = onnx.ModelProto.FromString(model.SerializeToString())
    assert respell_gelu_(made) == 1
    assert fused(model, tmp_path)["Erf"] == 1
    operators = fused(made, tmp_path)
    assert operators["Erf"] == 0
    assert operators["Gelu"] + operators["BiasGelu"] == 1
    assert respell_gelu_(made) == 0, "already so"
    inputs = {"ids": torch.randint(0, 100, (4, 9)), "mask": torch.ones(4, 9, dtype=torch.int64)}
    expected, found = (graph.run(graph.session(graph.split(one)), inputs) for one in (model, made))
    assert np.abs(found - expected).max() < 1e-6


def test_a_gelu_whose_inner_value_is_read_elsewhere_stays(model) -> None:
    made = onnx.ModelProto.FromString(model.SerializeToString())
    erf = next(node for node in made.graph.node if node.op_type == "Erf")
    made.graph.output.append(onnx.helper.make_empty_tensor_value_info(erf.output[0]))
    before = made.SerializeToString()
    assert respell_gelu_(made) == 0
    assert made.SerializeToString() == before
