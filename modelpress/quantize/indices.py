"""Weights of few values in an ONNX graph: stored as indices into a table of those values.

`Gather(values, Cast(indices))` gives the very bits that stood there before. All of it is constant, so that ONNX Runtime
folds it as it loads the graph and a call costs what it cost.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from modelpress.errors import StageError

MOST_VALUES = 256
"""What a byte can tell apart."""
HALVED_FROM = 64
"""Elements of a vector from which on two bytes for each are fewer than the node that reads them."""
_INDICES, _VALUES, _WIDE, _HALF = "_indices", "_values", "_places", "_half"


def index_(model: ModelProto, names: Collection[str]) -> dict[str, int]:
    """Store the named float32 initializers as uint8 indices and a table, in place; every node reads what it read.

    Index 0 is the value 0, whether it occurs or not: the codecs for sparse tensors look for zero bytes. The others
    follow by value. What has more than 256 values, or would take more bytes so, stays as it is.

    Returns:
        The number of values that occur, of each initializer that was rewritten.

    Raises:
        StageError: a name that is no float32 initializer, or one with NaN or infinity.
    """
    initializers = {one.name: one for one in model.graph.initializer}
    inputs = {one.name for one in model.graph.input}
    found: dict[str, int] = {}
    made: list[NodeProto] = []
    for name in sorted(set(names)):
        weights = _weights(initializers.get(name), name)
        # Of values that a caller may replace, nothing is known.
        table = None if name in inputs else _table(weights)
        if table is None or 4 * table.size + weights.size >= weights.nbytes:
            continue
        indices = np.searchsorted(_ranks(table[1:]), _ranks(weights)) + 1
        model.graph.initializer.remove(initializers[name])
        model.graph.initializer.append(
            numpy_helper.from_array(np.where(_is_zero(weights), 0, indices).astype(np.uint8), name + _INDICES)
        )
        model.graph.initializer.append(numpy_helper.from_array(table, name + _VALUES))
        # Gather takes no bytes for indices.
        made.append(helper.make_node("Cast", [name + _INDICES], [name + _WIDE], f"{name}.Cast", to=TensorProto.INT32))
        made.append(helper.make_node("Gather", [name + _VALUES, name + _WIDE], [name], f"{name}.Gather", axis=0))
        found[name] = int(np.unique(weights.view(np.uint32)).size)
    _prepend(model, made)
    return found


def halve_(model: ModelProto, names: Collection[str]) -> list[str]:
    """Store those of the named float32 vectors (biases, scales of norms) that have `HALVED_FROM` elements or more as
    float16, in place.

    Each element is rounded by at most 2^-11 of itself, or of a 64th of the largest one where that is more; a vector
    that float16 cannot hold so closely stays as it is.

    Returns:
        The names of those that were rewritten.
    """
    inputs = {one.name for one in model.graph.input}
    halved: list[str] = []
    made: list[NodeProto] = []
    for initializer in list(model.graph.initializer):
        name = initializer.name
        is_vector = initializer.data_type == TensorProto.FLOAT and len(initializer.dims) == 1
        if not is_vector or name not in names or name in inputs or initializer.dims[0] < HALVED_FROM:
            continue
        values = numpy_helper.to_array(initializer)
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        sizes = np.abs(values)
        if not (np.abs(half.astype(np.float32) - values) <= np.maximum(sizes, sizes.max() / 64) / 2048).all():
            continue
        model.graph.initializer.remove(initializer)
        model.graph.initializer.append(numpy_helper.from_array(half, name + _HALF))
        made.append(helper.make_node("Cast", [name + _HALF], [name], f"{name}.Cast", to=TensorProto.FLOAT))
        halved.append(name)
    _prepend(model, made)
    return halved


def _prepend(model: ModelProto, made: list[NodeProto]) -> None:
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in [*made, *model.graph.node]]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _weights(initializer: TensorProto | None, name: str) -> npt.NDArray[np.float32]:
    if initializer is None or initializer.data_type != TensorProto.FLOAT:
        raise StageError(f"storing {name!r} as indices", found="no float32 initializer", expected="one of this name")
    weights = np.ascontiguousarray(numpy_helper.to_array(initializer))
    if not np.isfinite(weights).all():
        raise StageError(
            f"storing {name!r} as indices", found="weights that are NaN or infinite", expected="finite weights"
        )
    return weights


def _table(weights: npt.NDArray[np.float32]) -> npt.NDArray[np.float32] | None:
    """0, then the other values, rising; None where a byte cannot tell them apart."""
    others = np.unique(_ranks(weights[~_is_zero(weights)]))
    if others.size > MOST_VALUES - 1:
        return None
    return np.concatenate([np.zeros(1, np.float32), _values(others)])


def _is_zero(weights: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Whether all bits are zero: −0.0 is another value, and comes back as such."""
    return np.asarray(weights.view(np.uint32) == 0)


def _ranks(weights: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Integers in the order of the floats, −0.0 before 0.0, all bits kept."""
    bits = weights.view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF) - 1, bits)


def _values(ranks: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Undo `_ranks`."""
    bits = np.where(ranks < 0, (-ranks - 1) | 0x80000000, ranks)
    return bits.astype(np.uint32).view(np.float32)
