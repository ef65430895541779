"""How much each input of a weight matters: the root of its mean square on calibration data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, helper

from modelpress import graph
from modelpress.agreement import Inputs
from modelpress.errors import StageError
from modelpress.plan.tensors import PlannedWeight
from modelpress.quantize.observe import until

Squares = npt.NDArray[np.float64]


def weighed(model: ModelProto, weights: Sequence[PlannedWeight], batches: Sequence[Inputs]) -> list[PlannedWeight]:
    """The weights with their `importance`; a table has none, nor has a weight that is shared with a Gather or that
    products read along both its axes (of an autoencoder with tied weights).

    Raises:
        StageError: an inner value that is NaN or infinite.
    """
    nodes = {node.name: node for node in model.graph.node}
    read = {one.name: [nodes[name] for name in one.nodes] for one in weights}
    products = {
        name
        for name, those in read.items()
        if all(_is_product(node) for node in those) and len({_reading(node) for node in those}) == 1
    }
    read_along = {(node.input[0], _feature_axis(node)): node for name in products for node in read[name]}
    squares = _mean_squares(model, read_along, batches)
    return [
        replace(one, importance=_broadcast(one, read[one.name], squares)) if one.name in products else one
        for one in weights
    ]


def _is_product(node: NodeProto) -> bool:
    """Whether a node multiplies the last axis of its input (a convolution: the channels) by its weight."""
    transposed = any(one.name == "transA" and one.i for one in node.attribute)
    return node.op_type in ("MatMul", "Gemm", "Conv") and not transposed


def _feature_axis(node: NodeProto) -> int:
    """The axis of its input along which a product sums: a convolution's channels, or the last one."""
    return 1 if node.op_type == "Conv" else -1


def _reading(node: NodeProto) -> tuple[str, bool, int]:
    """How a product reads its weight: products that share one have inputs of the same features where this is equal."""
    attributes = {one.name: one.i for one in node.attribute}
    return node.op_type if node.op_type == "Conv" else "", bool(attributes.get("transB", 0)), attributes.get("group", 1)


def _mean_squares(
    model: ModelProto, readers: dict[tuple[str, int], NodeProto], batches: Sequence[Inputs]
) -> dict[tuple[str, int], Squares]:
    """By value and axis, the mean square of each feature, float64; padding counts as it is computed with."""
    given = {one.name for one in model.graph.input}
    names = dict.fromkeys(name for name, _ in readers)
    inner = [name for name in names if name not in given]
    session = graph.session(graph.split(until(model, inner))) if inner else None
    sums: dict[tuple[str, int], Squares] = {}
    samples = [len(next(iter(batch.values()))) for batch in batches]
    for batch, size in zip(batches, samples, strict=True):
        found = {name: batch[name].numpy() for name in names if name in given}
        if session is not None:
            fed = [one.name for one in session.get_inputs()]
            found |= zip(inner, session.run(inner, {name: batch[name].numpy() for name in fed}), strict=True)
        for (name, axis), node in readers.items():
            values = found[name]
            others = tuple(other for other in range(values.ndim) if other != axis % values.ndim)
            mean: Squares = np.mean(np.square(values, dtype=np.float64), axis=others)
            if not np.isfinite(mean).all():
                raise StageError(
                    f"measuring the input {name!r} of {node.name!r}",
                    found="values that are NaN or infinite",
                    expected="finite activations on the calibration data",
                    fix="look for NaN or infinity in the calibration data or in the model",
                )
            sums[name, axis] = sums.get((name, axis), np.zeros_like(mean)) + mean * (size / sum(samples))
    return sums


def _broadcast(
    weight: PlannedWeight, nodes: Sequence[NodeProto], squares: dict[tuple[str, int], Squares]
) -> npt.NDArray[np.float32]:
    """Root mean square over all readers, in a shape that broadcasts to the weight."""
    mean = np.mean([squares[node.input[0], _feature_axis(node)] for node in nodes], axis=0)
    root: npt.NDArray[np.float32] = np.sqrt(mean).astype(np.float32)
    shape = weight.values.shape
    if nodes[0].op_type == "Conv":  # (out, in ÷ groups, kernel …); a group of outputs reads a group of inputs
        groups = next((int(helper.get_attribute_value(one)) for one in nodes[0].attribute if one.name == "group"), 1)
        rows = np.repeat(root.reshape(groups, -1), shape[0] // groups, axis=0)
        return rows.reshape(shape[0], shape[1], *(1 for _ in shape[2:]))
    return root.reshape(1, -1) if weight.channel_axis == 0 else root.reshape(-1, 1)
