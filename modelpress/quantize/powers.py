"""Static int8 for processors that shift where others multiply: every scale a power of two, every zero point 0.

The DPUs of AMD's FPGAs take graphs in QDQ form whose activations and weights are int8, symmetric, with a power of two
as the scale of a tensor: what AMD's Quark calls VINT8 where biases have 32 bits, as here, and XINT8 where they have 8.
A convolution and the Relu behind it are one operation there, so nothing is rounded between the two.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from onnxruntime.quantization.calibrate import TensorsData

from modelpress.quantize.ranges import Doubles, Range

LOWEST, HIGHEST = -128, 127
"""Codes."""
LEAST, MOST = -60, 60
"""Exponents of a scale. The product of two, which is a bias's, stays far from what float32 can't hold."""
HALVINGS = 4
"""How many smaller scales are tried beside the least that clips nothing; each halves the step, and clips more."""
BIAS_STEPS = 2**24
"""Steps of a bias that fit beside the products of int8, whose sums are far below, and that float32 counts exactly."""

_FUSED = ("Relu", "Clip")
_CODED, _DECODED = "QuantizeLinear", "DequantizeLinear"
_Scales = dict[str, list[dict[str, Any]]]


def covering(low: float, high: float) -> float:
    """The least power of two by which −128 … 127 reach over a finite range, and over 0."""
    needed = max(low / LOWEST, high / HIGHEST, 0.0)
    if needed == 0:
        return 1.0  # only zeros, which any scale gives back
    exponent = math.frexp(needed)[1] - 1  # 2^exponent ≤ needed < 2^(exponent + 1)
    scale = 2.0 ** min(max(exponent, LEAST), MOST)
    covers = LOWEST * scale <= low and high <= HIGHEST * scale
    return scale if covers or scale == 2.0**MOST else 2 * scale


def least_error_range(counts: Doubles, low: float, high: float) -> Range:
    """What −128 … 127 stand for by the scale that rounds a histogram with the least squared error.

    Args:
        counts: of bins of equal width.
        low: where the first begins, at most 0.
        high: where the last ends, at least 0.
    """
    middles = low + (np.arange(len(counts)) + 0.5) * (high - low) / len(counts)
    scale = min(_candidates(covering(low, high)), key=lambda one: float(counts @ _squares(middles, one, LOWEST)))
    return LOWEST * scale, HIGHEST * scale


def weight_scale(values: npt.NDArray[np.float32], least: float = 0.0) -> float:
    """The power of two that rounds a weight with the least squared error, and is no smaller than `least`."""
    largest = float(np.abs(values).max(initial=0.0))
    flat = values.astype(np.float64).reshape(-1)
    found = min(_candidates(covering(-largest, largest)), key=lambda one: float(_squares(flat, one, -HIGHEST).sum()))
    return max(found, covering(0.0, least * HIGHEST)) if least else found


def scales(model: ModelProto, nodes: Collection[str], ranges: TensorsData) -> _Scales:
    """Scale and zero point of every activation with a range and of the named nodes' weights.

    They are in the form that ONNX Runtime's quantizer takes; it makes a bias's scale of the two.
    """
    typed = {one.name for one in (*model.graph.value_info, *model.graph.input, *model.graph.output)}
    activations = {
        name: covering(*(np.asarray(end).item() for end in ranges[name].range_value))
        for name in ranges.keys()  # noqa: SIM118
        if name in typed and np.isfinite(ranges[name].range_value).all()
    }
    constants = {one.name: one for one in model.graph.initializer}
    weights: dict[str, float] = {}
    for node in model.graph.node:
        if node.name not in nodes or len(node.input) < 2 or node.input[1] not in constants:
            continue
        least = _least_for_bias(node, activations, constants)
        found = weight_scale(numpy_helper.to_array(constants[node.input[1]]), least)
        weights[node.input[1]] = max(found, weights.get(node.input[1], 0.0))
    zero = np.array(0, np.int8)
    every = (activations | weights).items()
    return {name: [{"scale": np.array(one, np.float32), "zero_point": zero}] for name, one in every}


def fuse_activations_(model: ModelProto, nodes: Collection[str]) -> None:
    """Take the rounding out from between a named node and the Relu or Clip that alone reads it, in place."""
    makers = {name: node for node in model.graph.node for name in node.output}
    readers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    kept_values = {one.name for one in model.graph.output}
    dropped: list[NodeProto] = []
    for node in model.graph.node:
        if node.op_type not in _FUSED:
            continue
        decoded = makers.get(node.input[0])
        coded = makers.get(decoded.input[0]) if decoded is not None and decoded.op_type == _DECODED else None
        if decoded is None or coded is None or coded.op_type != _CODED:
            continue
        product = makers.get(coded.input[0])
        chain = (coded.input[0], coded.output[0], decoded.output[0])
        alone = all(len(readers.get(name, [])) == 1 and name not in kept_values for name in chain)
        if product is not None and product.name in nodes and alone:
            node.input[0] = coded.input[0]
            dropped += [coded, decoded]
    for node in dropped:
        model.graph.node.remove(node)


def _candidates(scale: float) -> list[float]:
    """The scale, and smaller ones; the first of equals wins where the least is sought."""
    return [max(scale / 2**number, 2.0**LEAST) for number in range(HALVINGS + 1)]


def _squares(values: Doubles, scale: float, lowest: int) -> Doubles:
    return np.square(np.clip(np.rint(values / scale), lowest, HIGHEST) * scale - values)


def _least_for_bias(node: NodeProto, activations: Mapping[str, float], constants: Mapping[str, TensorProto]) -> float:
    """The least scale of a node's weight with which its bias, of the scale of both products' factors, fits."""
    bias = constants.get(node.input[2]) if len(node.input) > 2 else None
    step = activations.get(node.input[0])
    if bias is None or step is None:
        return 0.0
    return float(np.abs(numpy_helper.to_array(bias)).max(initial=0.0)) / (step * BIAS_STEPS)
