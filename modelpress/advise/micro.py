"""Graphs of single products, by each kernel, that measure what one product takes.

Several products of one shape stand side by side, each with a weight and an input of its own: weights that stay in the
cache from one call to the next would hide what reading them costs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from modelpress import graph
from modelpress.advise.work import Kernel, Work
from modelpress.agreement import Inputs
from modelpress.checkpoint import Checkpoint
from modelpress.quantize import nbits, rewrite, weight_only
from modelpress.quantize.groups import Grid
from modelpress.quantize.selection import eligible_layers

OPSET = 18
GROUP_SIZE = 128
MOST_COPIES, LEAST_COPIES = 6, 2
MOST_ELEMENTS = 2**23
"""Of all weights of a graph: more say nothing new."""
SCALE = 0.05
"""Of the activations' codes: it changes no kernel's time."""


def copies(work: Work, alike: int) -> int:
    """Products that stand side by side."""
    return max(LEAST_COPIES, min(alike, MOST_COPIES, MOST_ELEMENTS // max(work.elements, 1)))


def empty(work: Work) -> tuple[Checkpoint, Inputs]:
    """A graph that is called as the others are, and computes nothing."""
    names = ["x0"]
    nodes = [_taste("x0", "y0")]
    return graph.split(_model(nodes, names, work.input, [], len(work.input), TensorProto.FLOAT)), _inputs(work, 1)


def products(work: Work, kernel: Kernel, count: int, *, chained: bool) -> tuple[Checkpoint, Inputs]:
    """A graph of `count` products by a kernel, and what it is called with.

    Args:
        work: the product.
        kernel: one that it takes.
        count: products.
        chained: for `static`: its neighbours compute in integers as well, as in networks of convolutions, so that
            neither its input nor its output is in float.

    Raises:
        StageError, CorruptionError: the kernel has no form for this shape.
    """
    random = np.random.default_rng(0)
    weights = [random.standard_normal(work.weight).astype(np.float32) for _ in range(count)]
    if kernel == "static":
        return _static(work, weights, chained=chained)
    names = [f"x{index}" for index in range(count)]
    nodes: list[NodeProto] = []
    initializers = []
    for index, weight in enumerate(weights):
        nodes.append(_product(work, f"x{index}", f"w{index}", f"z{index}", f"p{index}"))
        nodes.append(_taste(f"z{index}", f"y{index}"))
        initializers.append(numpy_helper.from_array(weight, f"w{index}"))
    model = _model(nodes, names, work.input, initializers, len(work.output), TensorProto.FLOAT)
    _convert_(model, kernel)
    return graph.split(model), _inputs(work, count)


def _convert_(model: ModelProto, kernel: Kernel) -> None:
    layers = eligible_layers(model, False)
    if kernel == "dynamic":
        rewrite.quantize_dynamic_(model, [layer.node for layer in layers], True)
    elif kernel in ("nbits-8", "nbits-4"):
        grid = Grid(8 if kernel == "nbits-8" else 4, GROUP_SIZE, clip=False)
        nbits.replace_products_(model, weight_only.round_layers(model, layers, grid))


def _static(work: Work, weights: list[np.ndarray], *, chained: bool) -> tuple[Checkpoint, Inputs]:
    """QDQ form; chained, what goes in and comes out are codes."""
    names = [f"{'u' if chained else 'x'}{index}" for index in range(len(weights))]
    nodes: list[NodeProto] = []
    initializers = [
        numpy_helper.from_array(np.array(SCALE, np.float32), "scale"),
        numpy_helper.from_array(np.array(128, np.uint8), "zero"),
        # Outputs are sums of many products: their codes are coarser.
        numpy_helper.from_array(np.array(SCALE * 20, np.float32), "coarse"),
    ]
    for index, weight in enumerate(weights):
        axis = rewrite.channel_axis(_product(work, "x", "w", "z", "p"), weight.ndim)
        others = tuple(other for other in range(weight.ndim) if other != axis % weight.ndim)
        scale = np.abs(weight).max(axis=others) / 127
        shape = [-1 if other == axis % weight.ndim else 1 for other in range(weight.ndim)]
        codes = np.rint(weight / scale.reshape(shape)).astype(np.int8)
        initializers += [
            numpy_helper.from_array(codes, f"w{index}"),
            numpy_helper.from_array(scale.astype(np.float32), f"s{index}"),
            numpy_helper.from_array(np.zeros(scale.shape, np.int8), f"n{index}"),
        ]
        given = names[index]
        if not chained:
            nodes.append(helper.make_node("QuantizeLinear", [given, "scale", "zero"], [f"q{index}"]))
            given = f"q{index}"
        nodes += [
            helper.make_node("DequantizeLinear", [given, "scale", "zero"], [f"d{index}"]),
            helper.make_node(
                "DequantizeLinear", [f"w{index}", f"s{index}", f"n{index}"], [f"v{index}"], axis=axis % weight.ndim
            ),
            _product(work, f"d{index}", f"v{index}", f"z{index}", f"p{index}"),
        ]
        last = f"z{index}"
        if chained:
            nodes.append(helper.make_node("QuantizeLinear", [last, "coarse", "zero"], [f"c{index}"]))
            last = f"c{index}"
        nodes.append(_taste(last, f"y{index}"))
    kind = TensorProto.UINT8 if chained else TensorProto.FLOAT
    model = _model(nodes, names, work.input, initializers, len(work.output), kind)
    return graph.split(model), _inputs(work, len(weights), codes=chained)


def _product(work: Work, given: str, weight: str, result: str, name: str) -> NodeProto:
    options: dict[str, Any] = {}
    if work.op_type == "Gemm" and work.transposed:
        options["transB"] = 1
    if work.op_type == "Conv":
        options |= {"group": work.groups}
        options |= {"strides": list(work.strides)} if work.strides else {}
        options |= {"pads": list(work.pads)} if work.pads else {}
    return helper.make_node(work.op_type, [given, weight], [result], name, **options)


def _taste(value: str, result: str) -> NodeProto:
    """One element: a whole result would be copied on its way out."""
    return helper.make_node("Slice", [value, "start", "end"], [result])


def _model(
    nodes: list[NodeProto],
    names: list[str],
    shape: tuple[int, ...],
    initializers: list[TensorProto],
    rank: int,
    kind: int,
) -> ModelProto:
    ends = [
        numpy_helper.from_array(np.zeros(rank, np.int64), "start"),
        numpy_helper.from_array(np.ones(rank, np.int64), "end"),
    ]
    inputs = [helper.make_tensor_value_info(name, kind, shape) for name in names]
    outputs = [helper.make_tensor_value_info(f"y{index}", kind, [1] * rank) for index in range(len(names))]
    opset = [helper.make_opsetid("", OPSET)]
    body = helper.make_graph(nodes, "products", inputs, outputs, [*initializers, *ends])
    return helper.make_model(body, opset_imports=opset, ir_version=onnx.IR_VERSION_2023_5_5)


def _inputs(work: Work, count: int, *, codes: bool = False) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(work.input, generator=generator) for _ in range(count)]
    if codes:
        return {f"u{index}": (one * 20 + 128).clamp(0, 255).to(torch.uint8) for index, one in enumerate(values)}
    return {f"x{index}": one for index, one in enumerate(values)}
