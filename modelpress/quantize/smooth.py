"""SmoothQuant: scale outlying channels of activations down, and the weights that read them up by as much.

Xiao et al. 2022, arXiv:2211.10438: channel j of a value that MatMuls read is divided by
s_j = max|x_j|^α ÷ max|w_j|^(1−α) and row j of their weights multiplied by it, which changes nothing in float and makes
the value easier to round. The division costs nothing where the value's producer takes it into its own weight: a
LayerNormalization, or a MatMul or Gemm, with a bias and a Relu between or without.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from modelpress.errors import CoverageError
from modelpress.quantize.frozen import Frozen
from modelpress.quantize.observe import Inputs, observe
from modelpress.quantize.rewrite import add_initializer, has_bodies, is_plain, replace_nodes, transposes_weight

Floats = npt.NDArray[np.float32]

LEAST_SHARE = 0.1
"""Of the median of the channels' largest values."""

_SMOOTH = "_smooth"


@dataclass
class _Migration:
    """One value, those who read it with a weight, and where its division goes."""

    value: str
    readers: list[NodeProto]
    normalisation: NodeProto | None = None
    scaled: list[tuple[NodeProto, int, int]] = field(default_factory=list)
    """Node, place of the initializer among its inputs, axis: what of a linear producer is divided."""


def smooth(
    model: ModelProto,
    nodes: Collection[str],
    batches: Sequence[Inputs],
    alpha: float,
    frozen: Frozen | None = None,
) -> ModelProto:
    """Move the scale of activations into weights for the named MatMul and Gemm nodes.

    Where others read a normalisation's output as it is (a residual, a node that is not named), the named nodes get a
    normalisation of their own beside it. Values whose producer cannot take the division stay as they are, and so do
    those whose weights other nodes share.

    Args:
        model: left as it is.
        nodes: names of those that are to be quantized.
        batches: calibration data.
        alpha: share of the difficulty that moves to the weights, between 0 and 1.
        frozen: an earlier version: where it smoothed the same weights, its factors are taken.

    Returns:
        The model, equal in float but for rounding.

    Raises:
        CoverageError: a value without a finite range.
    """
    made = ModelProto()
    made.CopyFrom(model)
    migrations = _migrations(made, nodes)
    largest: dict[str, Floats] = {}
    if migrations:
        for rows in observe(made, [one.value for one in migrations], batches, finite=False):
            for name, array in rows.items():
                largest[name] = np.maximum(np.abs(array).max(axis=0, initial=0.0), largest.get(name, np.float32(0)))
    initializers = {one.name: one for one in made.graph.initializer}
    twins: dict[str, NodeProto] = {}
    for one in migrations:
        _check_finite(one, largest[one.value])
        weights = {node.input[1]: node for node in one.readers}
        read = {name: _rows_first(node, numpy_helper.to_array(initializers[name])) for name, node in weights.items()}
        factor = frozen.factor([(weights[name], array) for name, array in read.items()]) if frozen else None
        if factor is None:
            factor = _factor(largest[one.value], list(read.values()), alpha)
        for name, node in weights.items():
            _overwrite(initializers[name], _rows_first(node, read[name] * factor[:, None]))
        for node, place, axis in one.scaled:
            values = numpy_helper.to_array(initializers[node.input[place]])
            divided = values / (factor[:, None] if axis < values.ndim - 1 else factor)
            if place == 1 and values.ndim == 2:
                _overwrite(initializers[node.input[place]], divided)
            else:  # equal biases are stored once
                node.input[place] = f"{node.name}.input{place}{_SMOOTH}"
                add_initializer(made, node.input[place], divided)
        if one.normalisation is not None:
            twins[one.normalisation.name] = _divided_twin(made, one, factor, initializers)
    _insert(made, twins)
    return made


def _migrations(model: ModelProto, nodes: Collection[str]) -> list[_Migration]:
    if has_bodies(model):
        return []  # what a body reads from around it is not followed
    constants = {one.name: len(one.dims) for one in model.graph.initializer}
    chains = _Chains(model, constants)
    found = []
    for producer in model.graph.node:
        value = producer.output[0]
        taking = [node for node in chains.readers.get(value, []) if _multiplies(node, value, constants)]
        taking = [node for node in taking if node.name in nodes]
        shared = {node.input[1] for node in taking}
        as_rows = {name: {transposes_weight(node) for node in taking if node.input[1] == name} for name in shared}
        alone = all(chains.reads[name] == sum(node.input[1] == name for node in taking) for name in shared)
        if not taking or not alone or any(len(found) > 1 for found in as_rows.values()):
            continue
        one = _Migration(value, taking)
        if producer.op_type == "LayerNormalization" and constants.get(producer.input[1]) == 1:
            one.normalisation = producer
        elif len(taking) == chains.reads[value]:
            one.scaled = chains.linear(producer)
        if one.normalisation is not None or one.scaled:
            found.append(one)
    return found


class _Chains:
    """Who writes and who reads each value."""

    def __init__(self, model: ModelProto, constants: dict[str, int]) -> None:
        self._constants = constants
        self._producers = {output: node for node in model.graph.node for output in node.output}
        self.readers: dict[str, list[NodeProto]] = {}
        self.reads = Counter(one.name for one in model.graph.output)
        for node in model.graph.node:
            self.reads.update(node.input)
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def linear(self, node: NodeProto) -> list[tuple[NodeProto, int, int]]:
        """What to divide in the chain of Relu, Add and MatMul or Gemm that ends in this node; empty for another."""
        scaled: list[tuple[NodeProto, int, int]] = []
        while node.op_type in ("Relu", "Add"):
            place = next((place for place, name in enumerate(node.input) if self._constants.get(name) == 1), None)
            if node.op_type == "Add" and (place is None or scaled):
                return []
            if place is not None:
                scaled.append((node, place, 0))
            inner = node.input[1 - place] if place is not None else node.input[0]
            if inner not in self._producers or self.reads[inner] > 1:
                return []
            node = self._producers[inner]
        weight = node.input[1] if node.op_type in ("MatMul", "Gemm") else ""
        if self._constants.get(weight) != 2 or self.reads[weight] > 1 or not is_plain(node):
            return []
        scaled.append((node, 1, 0 if transposes_weight(node) else 1))
        if node.op_type == "Gemm" and len(node.input) > 2:
            return [*scaled, (node, 2, 0)] if self._constants.get(node.input[2]) == 1 else []
        return scaled


def _multiplies(node: NodeProto, value: str, constants: dict[str, int]) -> bool:
    takes = node.op_type in ("MatMul", "Gemm") and node.input[0] == value and constants.get(node.input[1]) == 2
    return takes and is_plain(node)


def _check_finite(one: _Migration, largest: Floats) -> None:
    if np.isfinite(largest).all():
        return
    name = one.readers[0].name
    raise CoverageError(
        f"calibrating {name!r}",
        found=f"{int(np.count_nonzero(~np.isfinite(largest)))} channels of its activation {one.value!r} that are NaN "
        "or infinite",
        expected="a finite range from calibration data",
        fix=f"look for NaN or infinity in the calibration data, or add {name!r} to quantize.ignore",
    )


def _factor(largest: Floats, weights: Sequence[Floats], alpha: float) -> Floats:
    """s of each channel, with geometric mean 1; a channel that is always zero, or that nobody reads, keeps its own.

    A channel that hardly shows on calibration data may show more on others: it counts as if it had a share of the
    median, or a small s would blow it up there.
    """
    read = np.max([np.abs(weight).max(axis=1) for weight in weights], axis=0)
    alive = (largest > 0) & (read > 0)
    if alive.any():
        largest = np.maximum(largest, LEAST_SHARE * np.median(largest[alive]))
    logarithm = np.zeros(len(read))
    logarithm[alive] = alpha * np.log(largest[alive]) - (1 - alpha) * np.log(read[alive])
    logarithm[alive] -= logarithm[alive].mean() if alive.any() else 0.0
    return np.asarray(np.exp(logarithm), dtype=np.float32)


def _rows_first(node: NodeProto, weight: Floats) -> Floats:
    """A weight as (in, out), or one so given as the node has it."""
    return weight.T if transposes_weight(node) else weight


def _overwrite(initializer: TensorProto, values: npt.NDArray[np.floating]) -> None:
    initializer.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values, dtype=np.float32), initializer.name))


def _divided_twin(
    model: ModelProto, one: _Migration, factor: Floats, initializers: dict[str, TensorProto]
) -> NodeProto:
    """The normalisation again with weight and bias divided, read by the migration's nodes alone."""
    assert one.normalisation is not None
    twin = NodeProto()
    twin.CopyFrom(one.normalisation)
    twin.name += _SMOOTH
    for place in range(1, len(twin.input)):
        values = numpy_helper.to_array(initializers[twin.input[place]])
        twin.input[place] = f"{twin.name}.input{place}"
        add_initializer(model, twin.input[place], values / factor)
    del twin.output[1:]
    twin.output[0] = one.value + _SMOOTH
    for node in one.readers:
        node.input[0] = twin.output[0]
    return twin


def _insert(model: ModelProto, twins: dict[str, NodeProto]) -> None:
    """Put each twin after the original, or in its place where nobody reads that any more."""
    used = {name for node in model.graph.node for name in node.input} | {one.name for one in model.graph.output}
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        if node.name not in twins or used.intersection(node.output):
            nodes.append(node)
        if node.name in twins:
            nodes.append(twins[node.name])
    replace_nodes(model, nodes)
