"""Small graphs by which an execution provider is tried."""

from __future__ import annotations

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from modelpress.providers import is_of

_CHANNELS, _SIZE, _KERNEL = 16, 16, 3
_STEP = 2.0**-6


def probe(provider: str) -> ModelProto:
    """A graph that a provider should take: one float operator, and for an FPGA's a convolution in integers."""
    return _convolution() if is_of("fpga", provider) else _float()


def _float() -> ModelProto:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    return _model(helper.make_graph([helper.make_node("Abs", ["x"], ["y"])], "probe", ends[:1], ends[1:]))


def _convolution() -> ModelProto:
    """Of fixed shape, in QDQ form: int8, one scale a tensor, each a power of two, zero points 0."""
    nodes: list[NodeProto] = []
    for before, after in (("x", "x_value"), ("product", "y")):
        nodes.append(helper.make_node("QuantizeLinear", [before, "step", "zero"], [f"{after}_codes"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{after}_codes", "step", "zero"], [after]))
    nodes.insert(2, helper.make_node("DequantizeLinear", ["codes", "step", "zero"], ["weight"]))
    nodes.insert(3, helper.make_node("Conv", ["x_value", "weight"], ["product"], pads=[_KERNEL // 2] * 4))
    shape = [1, _CHANNELS, _SIZE, _SIZE]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    constants: dict[str, np.ndarray] = {
        "step": np.array(_STEP, np.float32),
        "zero": np.array(0, np.int8),
        "codes": np.ones((_CHANNELS, _CHANNELS, _KERNEL, _KERNEL), np.int8),
    }
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    return _model(helper.make_graph(nodes, "probe", ends[:1], ends[1:], initializers))


def _model(body: GraphProto) -> ModelProto:
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
