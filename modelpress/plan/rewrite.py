"""Store chosen weights of a graph as codes and scales; it computes in float, as ever."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

from modelpress.plan.candidates import Candidate, Coding
from modelpress.plan.tensors import PlannedWeight

CODES, SCALE = "_codes", "_scale"
_CAST, _GROUPED, _SCALED = "_cast", "_grouped", "_scaled"


def stored_weights(
    model: ModelProto, plan: Mapping[str, Candidate], weights: Mapping[str, PlannedWeight]
) -> ModelProto:
    """A copy of the model in which the planned weights are Mul(Cast(codes), Cast(scale)), of constants.

    The product has the name that the weight had, so that every node reads what it read. ONNX Runtime folds it as it
    makes a session, and a call costs what it cost. With groups, two Reshapes stand around the product.

    Args:
        model: the float graph; left as it is.
        plan: candidate by weight; a weight that is not in it stays in float.
        weights: by name.
    """
    made = ModelProto()
    made.CopyFrom(model)
    initializers = {one.name: one for one in made.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for name, candidate in plan.items():
        weight = weights[name]
        coding = weight.encode(candidate)
        made.graph.initializer.remove(initializers[name])
        made.graph.initializer.append(numpy_helper.from_array(coding.codes, name + CODES))
        made.graph.initializer.append(numpy_helper.from_array(coding.scale, name + SCALE))
        nodes += _spelt(made, name, coding)
    nodes += [onnx.NodeProto.FromString(node.SerializeToString()) for node in made.graph.node]
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    return made


def _spelt(model: ModelProto, name: str, coding: Coding) -> list[onnx.NodeProto]:
    casts = [helper.make_node("Cast", [name + CODES], [name + _CAST], name + _CAST, to=TensorProto.FLOAT)]
    scale = name + SCALE
    if coding.scale.dtype == np.float16:
        casts.append(helper.make_node("Cast", [scale], [scale + _CAST], scale + _CAST, to=TensorProto.FLOAT))
        scale += _CAST
    if coding.grouped == coding.codes.shape:
        return [*casts, helper.make_node("Mul", [name + _CAST, scale], [name], name + _SCALED)]
    for suffix, shape in ((_GROUPED + "_shape", coding.grouped), ("_shape", coding.codes.shape)):
        model.graph.initializer.append(numpy_helper.from_array(np.array(shape, np.int64), name + suffix))
    return [
        *casts,
        helper.make_node("Reshape", [name + _CAST, name + _GROUPED + "_shape"], [name + _GROUPED], name + _GROUPED),
        helper.make_node("Mul", [name + _GROUPED, scale], [name + _SCALED], name + _SCALED),
        helper.make_node("Reshape", [name + _SCALED, name + "_shape"], [name], name + "_whole"),
    ]
