"""What ONNX Runtime computes from packed codes is what the codes mean."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from modelpress import graph
from modelpress.errors import StageError
from modelpress.quantize.groups import Grid, GroupedWeight, round_to_nearest
from modelpress.quantize.hqq import hqq
from modelpress.quantize.nbits import EXACT, pack_codes, pack_zero_points, replace_products_

SHAPES = [(8, 64, 32), (7, 96, 32), (5, 97, 16), (33, 384, 128), (3, 50, 64), (1, 20, 16), (9, 160, 32)]
"""Outputs, inputs, group size: full and broken last groups, odd and even numbers of groups, odd outputs."""


def product_graph(weight: torch.Tensor, transposed: bool, bias: bool = False) -> onnx.ModelProto:
    """x @ Wᵀ as a MatMul, or as a Gemm that transposes."""
    outputs, inputs = weight.shape
    stored = weight if transposed else weight.T.contiguous()
    constants = [numpy_helper.from_array(stored.numpy(), "w")]
    names = ["x", "w"]
    if bias:
        constants.append(numpy_helper.from_array(np.arange(outputs, dtype=np.float32), "b"))
        names.append("b")
    node = helper.make_node("Gemm" if transposed else "MatMul", names, ["y"], "product")
    if transposed:
        node.attribute.append(helper.make_attribute("transB", 1))
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", inputs])]
    taken = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", outputs])]
    body = helper.make_graph([node], "g", given, taken, constants)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def run(model: onnx.ModelProto, samples: torch.Tensor) -> np.ndarray:
    return graph.run(graph.session(graph.split(model)), {"x": samples})


KINDS = [(bits, kind) for bits in (4, 8) for kind in ("symmetric", "asymmetric")] + [(4, "real")]


@pytest.mark.parametrize(("num_bits", "kind"), KINDS)
def test_onnx_runtime_multiplies_by_what_the_codes_mean(num_bits: int, kind: str) -> None:
    torch.manual_seed(0)
    for outputs, inputs, size in SHAPES:
        grid = Grid(num_bits, size, symmetric=kind == "symmetric")
        original = torch.randn(outputs, inputs) + 0.5
        weight = (hqq if kind == "real" else round_to_nearest)(original, grid)
        for transposed, bias in ((False, False), (True, False), (True, True)):
            model = product_graph(original, transposed, bias)
            replace_products_(model, {"product": weight}, EXACT)
            samples = torch.randn(6, inputs)
            expected = samples.double() @ weight.dequantize().double().T + (torch.arange(outputs) if bias else 0)
            found = run(model, samples)
            assert np.abs(found - expected.numpy()).max() < 1e-4, (outputs, inputs, size)
            assert np.abs(found - expected.numpy()).max() > 0 or outputs * inputs < 100
        assert {node.op_type for node in model.graph.node} == {"MatMulNBits", "Add"}


@pytest.mark.parametrize("num_bits", [4, 8])
def test_the_fast_kernel_rounds_activations_and_no_more(num_bits: int) -> None:
    torch.manual_seed(0)
    for outputs, inputs, size in SHAPES:
        weight = round_to_nearest(torch.randn(outputs, inputs), Grid(num_bits, size))
        model = product_graph(weight.dequantize(), transposed=False)
        replace_products_(model, {"product": weight})
        samples = torch.randn(6, inputs)
        expected = (samples @ weight.dequantize().T).numpy()
        error = np.sqrt(np.mean((run(model, samples) - expected) ** 2) / np.mean(expected**2))
        assert error < 0.02, (outputs, inputs, size)


def test_codes_are_packed_low_half_first_and_padded_with_the_zero_point() -> None:
    grid = Grid(4, 16, symmetric=False)
    codes = torch.arange(18, dtype=torch.uint8).reshape(1, 18) % 16
    weight = GroupedWeight(codes, torch.ones(1, 2), torch.tensor([[3, 5]], dtype=torch.uint8), grid)
    packed = pack_codes(weight)
    assert packed.shape == (1, 2, 8)
    assert packed[0, 0].tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    assert packed[0, 1].tolist() == [0x10, *[0x55] * 7]
    points = pack_zero_points(weight)
    assert points is not None
    assert points.tolist() == [[0x53]]


def test_nodes_that_share_a_weight_share_its_codes_and_must_agree() -> None:
    weight = torch.randn(8, 32)
    model = product_graph(weight, transposed=False)
    model.graph.node.append(helper.make_node("MatMul", ["x", "w"], ["z"], "again"))
    coarse, fine = round_to_nearest(weight, Grid(4, 32)), round_to_nearest(weight, Grid(8, 32))
    shared = onnx.ModelProto.FromString(model.SerializeToString())
    replace_products_(shared, {"product": coarse, "again": coarse})
    assert sum(one.name == "w_quantized" for one in shared.graph.initializer) == 1
    with pytest.raises(StageError, match="in two forms"):
        replace_products_(model, {"product": coarse, "again": fine})
