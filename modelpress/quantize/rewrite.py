"""Replace nodes of an ONNX graph by their integer forms, in standard operators.

A MatMul or Gemm with dynamic activations becomes DynamicQuantizeLinear → MatMulInteger → scale, which ONNX Runtime
fuses into one kernel; a layer that is to compute in float keeps its weight as int8; a Gather from a float table becomes
a Gather of int8 rows that are scaled back. The names of new values derive from the names of the old, so that the same
graph always gives the same bytes.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from modelpress.errors import StageError
from modelpress.quantize.frozen import Frozen
from modelpress.quantize.weights import Floats, quantize_symmetric, relative_error

TABLE_TOLERANCE = 0.05
"""Relative rounding error above which an embedding table takes one scale per row instead of one in all."""

_CODES, _UNSIGNED, _ROWS = "_quantized", "_unsigned", "_rows"
_SCALE, _ZERO_POINT = "_scale", "_zero_point"
_VALUE = "_value"


def quantize_dynamic_(
    model: ModelProto, nodes: Collection[str], per_channel: bool, frozen: Frozen | None = None
) -> None:
    """Rewrite the named MatMul and Gemm nodes in place; weights signed, activations unsigned, ranged per call.

    Weights are on the scales of `frozen`, here and below, where it has them.

    Raises:
        StageError: a Gemm that scales or transposes its input, or two nodes that need one weight in two forms.
    """
    initializers = {one.name: one for one in model.graph.initializer}
    ranged: set[str] = set()
    rewritten: list[NodeProto] = []
    for node in model.graph.node:
        if node.name not in nodes:
            rewritten.append(node)
            continue
        weight = numpy_helper.to_array(initializers[node.input[1]])
        if transposes_weight(node):
            weight = np.ascontiguousarray(weight.T)
        axis = weight.ndim - 1 if per_channel else None
        codes, scale = quantize_symmetric(weight, axis, _given(frozen, node.input[1], weight, axis))
        add_initializer(model, node.input[1] + _CODES, codes)
        add_initializer(model, node.input[1] + _SCALE, scale)
        if node.input[0] not in ranged:
            ranged.add(node.input[0])
            rewritten.append(_range(node.input[0]))
        rewritten.extend(_integer_product(node))
    replace_nodes(model, rewritten)


def quantize_weights_(
    model: ModelProto, nodes: Collection[str], per_channel: bool, frozen: Frozen | None = None
) -> None:
    """Store the weights of the named MatMul, Gemm and Conv nodes as int8 in place; the nodes compute in float.

    The weight is spelt as Cast and Mul of constants, which ONNX Runtime folds when it loads the graph (it would not
    fold a DequantizeLinear), so that a call costs what it cost in float.
    """
    initializers = {one.name: one for one in model.graph.initializer}
    spelt: set[str] = set()
    rewritten: list[NodeProto] = []
    for node in model.graph.node:
        if node.name in nodes:
            weight = node.input[1]
            if weight not in spelt:
                spelt.add(weight)
                values = numpy_helper.to_array(initializers[weight])
                axis = channel_axis(node, values.ndim) if per_channel else None
                codes, scale = quantize_symmetric(values, axis, _given(frozen, weight, values, axis))
                if axis is not None:
                    scale = scale.reshape([-1 if one == axis else 1 for one in range(values.ndim)])
                rewritten += scaled_back(model, weight, codes, scale, node.name)
            node.input[1] = weight + _VALUE
        rewritten.append(node)
    replace_nodes(model, rewritten)


def quantize_tables_(model: ModelProto, nodes: Collection[str], frozen: Frozen | None = None) -> None:
    """Rewrite the named Gather nodes in place: their tables are stored as int8.

    One scale serves the whole table where its rounding error stays within `TABLE_TOLERANCE`: at equal error, codes of
    one step size take fewer bits after entropy coding than codes whose step differs by row. A table that is no
    initializer any more stays as it is: a product that shares it has stored it as integers.

    Raises:
        StageError: a product needs the same table in another form.
    """
    initializers = {one.name: one for one in model.graph.initializer}
    by_row: dict[str, bool] = {}
    rewritten: list[NodeProto] = []
    for node in model.graph.node:
        if node.name not in nodes or node.input[0] not in initializers:
            rewritten.append(node)
            continue
        table = node.input[0]
        if table not in by_row:
            values = numpy_helper.to_array(initializers[table])
            codes, scale, by_row[table] = _table_codes(table, values, frozen)
            add_initializer(model, table + _CODES, codes)
            add_initializer(model, table + _SCALE, scale)
        rewritten.extend(_scaled_rows(node, by_row[table]))
    replace_nodes(model, rewritten)


def _table_codes(table: str, values: Floats, frozen: Frozen | None) -> tuple[np.ndarray, Floats, bool]:
    """Codes and scale of a table, () or (rows, 1), and whether it is by row: as the earlier version has it, if any."""
    given = frozen.scale(table) if frozen else None
    axis = 0 if given is not None and given.ndim == 2 else None
    codes, scale = quantize_symmetric(values, axis, _given(frozen, table, values, axis))
    if given is None and relative_error(values, codes, scale) > TABLE_TOLERANCE:
        axis = 0
        codes, scale = quantize_symmetric(values, axis)
    return codes, scale if axis is None else scale.reshape(-1, 1), axis is not None


def _given(frozen: Frozen | None, weight: str, values: Floats, axis: int | None) -> Floats | None:
    return frozen.symmetric(weight, values, axis) if frozen else None


def _range(value: str) -> NodeProto:
    outputs = [value + _UNSIGNED, value + _UNSIGNED + _SCALE, value + _UNSIGNED + _ZERO_POINT]
    return helper.make_node("DynamicQuantizeLinear", [value], outputs, f"{value}_range")


def _integer_product(node: NodeProto) -> list[NodeProto]:
    value, weight, output, name = node.input[0], node.input[1], node.output[0], node.name
    bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
    product = output if not bias else output + "_product"
    parts = [
        helper.make_node(
            "MatMulInteger",
            [value + _UNSIGNED, weight + _CODES, value + _UNSIGNED + _ZERO_POINT],
            [output + "_integer"],
            name,
        ),
        helper.make_node("Cast", [output + "_integer"], [output + "_float"], f"{name}_cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", [value + _UNSIGNED + _SCALE, weight + _SCALE], [output + _SCALE], f"{name}_scales"),
        helper.make_node("Mul", [output + "_float", output + _SCALE], [product], f"{name}_scale"),
    ]
    if bias:
        parts.append(helper.make_node("Add", [product, bias], [output], f"{name}_bias"))
    return parts


def _scaled_rows(node: NodeProto, by_row: bool) -> list[NodeProto]:
    table, indices, output, name = node.input[0], node.input[1], node.output[0], node.name
    gather = helper.make_node("Gather", [table + _CODES, indices], [output + _ROWS], name)
    if not by_row:
        dequantize = helper.make_node("DequantizeLinear", [output + _ROWS, table + _SCALE], [output], f"{name}_scale")
        return [gather, dequantize]
    return [
        gather,
        helper.make_node("Gather", [table + _SCALE, indices], [output + _ROWS + _SCALE], f"{name}_scales"),
        helper.make_node("Cast", [output + _ROWS], [output + _ROWS + "_float"], f"{name}_cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", [output + _ROWS + "_float", output + _ROWS + _SCALE], [output], f"{name}_scale"),
    ]


def channel_axis(node: NodeProto, dimensions: int) -> int:
    """Axis of a weight that numbers the output channels, or of a table that numbers its rows."""
    if node.op_type in ("Conv", "Gather") or any(one.name == "transB" and one.i for one in node.attribute):
        return 0
    return dimensions - 1


def has_bodies(model: ModelProto) -> bool:
    """Whether a node holds a graph of its own, as If and Loop do."""
    return any(attribute.g.node or attribute.graphs for node in model.graph.node for attribute in node.attribute)


def name_nodes_(model: ModelProto) -> None:
    """Give each node a name that no other has; those that have one already keep it."""
    taken = Counter(node.name for node in model.graph.node)
    used = {name for name, count in taken.items() if count == 1 and name}
    for index, node in enumerate(model.graph.node):
        if node.name in used and taken[node.name] == 1:
            continue
        base = node.name or f"{node.op_type}_{index}"
        node.name = next(name for number in itertools.count() if (name := f"{base}_{number}") not in used)
        used.add(node.name)


def is_plain(node: NodeProto) -> bool:
    """Whether a MatMul or Gemm neither scales nor transposes its input."""
    attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    return not attributes.get("transA", 0) and attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0


def transposes_weight(node: NodeProto) -> bool:
    """Whether a Gemm, or a MatMul, reads its weight as (out, in).

    Raises:
        StageError: a Gemm that scales or transposes its input.
    """
    attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    if not is_plain(node):
        raise StageError(
            f"quantizing {node.name!r}",
            found=f"a Gemm with {attributes}",
            expected="alpha = beta = 1 and transA = 0",
            fix=f"add {node.name!r} to quantize.ignore",
        )
    return bool(attributes.get("transB", 0))


def scaled_back(model: ModelProto, weight: str, codes: np.ndarray, scale: np.ndarray, node: str) -> list[NodeProto]:
    """Add codes and scales of a weight to the graph, and spell codes · scale: Cast and Mul, whose output is the weight.

    The nodes are named after the `node` that reads it; the scale must broadcast to the codes.

    Raises:
        StageError: see `add_initializer`.
    """
    add_initializer(model, weight + _CODES, codes)
    add_initializer(model, weight + _SCALE, scale)
    return [
        helper.make_node("Cast", [weight + _CODES], [f"{weight}_float"], f"{node}_cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{weight}_float", weight + _SCALE], [weight + _VALUE], f"{node}_scale"),
    ]


def add_initializer(model: ModelProto, name: str, array: np.ndarray) -> None:
    """Append an initializer; nodes that share a weight find it there.

    Raises:
        StageError: one of this name holds something else.
    """
    standing = next((one for one in model.graph.initializer if one.name == name), None)
    if standing is None:
        model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return
    found = numpy_helper.to_array(standing)
    if found.dtype != array.dtype or not np.array_equal(found, array):
        raise StageError(
            f"adding {name!r} to the graph",
            found=f"other values of this name, {found.dtype} {list(found.shape)}: nodes that share a weight need it "
            "in two forms",
            expected=f"one form, {array.dtype} {list(array.shape)}",
            fix="add one of the nodes that share it to quantize.ignore, or set quantize.embeddings to false",
        )


def replace_nodes(model: ModelProto, nodes: Sequence[NodeProto]) -> None:
    """Let the graph consist of these nodes, which may be its own."""
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)
