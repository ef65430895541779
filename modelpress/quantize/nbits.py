"""Grouped weights in a graph: `com.microsoft::MatMulNBits`, the operator with which ONNX Runtime multiplies by them.

Its layout: codes (out, groups, group_size · bits ÷ 8) uint8, of two 4-bit codes in a byte the first in the low half;
scales (out, groups); zero points (out, groups · bits ÷ 8), rounded up to whole bytes per row, or float32 (out, groups).
Without zero points the middle code is zero. A last group that is not full is padded.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from onnx import ModelProto, NodeProto, helper
from torch import Tensor

from modelpress.quantize.groups import GroupedWeight
from modelpress.quantize.rewrite import add_initializer, replace_nodes

DOMAIN = "com.microsoft"

EXACT, FAST = 0, 4
"""How the kernel multiplies: in float32, or with activations rounded to int8 per group as it reads them. On the CPU the
second costs a sentence encoder 0.0002 of cosine at 4 bits and 0.0007 at 8, and at batch 1 is twice as fast at 4 bits
and eight times at 8, which is 1.8 times as fast as float. With real zero points the kernel does the first in any case,
in four times the time of float."""

_CODES, _SCALE, _ZERO_POINT = "_quantized", "_scale", "_zero_point"


def replace_products_(model: ModelProto, weights: Mapping[str, GroupedWeight], accuracy_level: int = FAST) -> None:
    """Rewrite MatMul and Gemm nodes in place to read grouped weights; a Gemm's bias is added after the product.

    Args:
        model: whose nodes they are.
        weights: by node name, (out, in).
        accuracy_level: `EXACT` or `FAST`.

    Raises:
        StageError: two nodes that need one weight in two forms.
    """
    if not weights:
        return
    rewritten: list[NodeProto] = []
    for node in model.graph.node:
        if node.name not in weights:
            rewritten.append(node)
            continue
        weight, name = weights[node.name], node.input[1]
        inputs = [node.input[0], name + _CODES, name + _SCALE]
        add_initializer(model, name + _CODES, pack_codes(weight))
        add_initializer(model, name + _SCALE, weight.scale.numpy())
        zero_points = pack_zero_points(weight)
        if zero_points is not None:
            add_initializer(model, name + _ZERO_POINT, zero_points)
            inputs.append(name + _ZERO_POINT)
        bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
        product = node.output[0] + "_product" if bias else node.output[0]
        outputs, features = weight.codes.shape
        rewritten.append(
            helper.make_node(
                "MatMulNBits", inputs, [product], node.name, domain=DOMAIN, K=features, N=outputs,
                bits=weight.grid.num_bits, block_size=weight.grid.group_size, accuracy_level=accuracy_level,
            )
        )  # fmt: skip
        if bias:
            rewritten.append(helper.make_node("Add", [product, bias], [node.output[0]], f"{node.name}_bias"))
    replace_nodes(model, rewritten)
    if all(one.domain != DOMAIN for one in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))


def pack_codes(weight: GroupedWeight) -> npt.NDArray[np.uint8]:
    """Codes as the operator reads them; padding repeats the zero point, so that it stands for zeros."""
    size, bits = weight.grid.group_size, weight.grid.num_bits
    outputs, groups = weight.scale.shape
    zeros = weight.zero_point.float().round().clamp(0, weight.grid.levels).to(torch.uint8)
    padded = zeros.repeat_interleave(size, dim=1)
    padded[:, : weight.codes.shape[1]] = weight.codes
    return in_bytes(padded, bits).reshape(outputs, groups, size * bits // 8)


def pack_zero_points(weight: GroupedWeight) -> npt.NDArray[np.uint8] | npt.NDArray[np.float32] | None:
    """Zero points as the operator reads them; None where it knows them."""
    if weight.grid.symmetric:
        return None
    if weight.zero_point.is_floating_point():
        return np.asarray(weight.zero_point.numpy(), dtype=np.float32)
    return in_bytes(weight.zero_point, weight.grid.num_bits)


def in_bytes(codes: Tensor, num_bits: int) -> npt.NDArray[np.uint8]:
    """Rows of codes, (rows, columns) uint8, as rows of bytes: of two 4-bit codes the first in the low half."""
    array: npt.NDArray[np.uint8] = codes.numpy()
    if num_bits == 8:
        return array
    array = np.pad(array, ((0, 0), (0, array.shape[1] % 2)))
    return np.asarray(array[:, ::2] | (array[:, 1::2] << 4), dtype=np.uint8)
