"""Weight-only quantization of a graph: grouped weights; the graph's activations stay in float."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from onnx import ModelProto, numpy_helper
from torch import Tensor

from modelpress.config import QuantizeConfig
from modelpress.errors import StageError
from modelpress.progress import Progress
from modelpress.quantize import nbits
from modelpress.quantize.float8 import Float8Weight, round_to_float8
from modelpress.quantize.frozen import Frozen
from modelpress.quantize.gptq import gptq
from modelpress.quantize.groups import Earlier, Grid, GroupedWeight, round_to_nearest
from modelpress.quantize.hqq import hqq
from modelpress.quantize.observe import Inputs, hessians
from modelpress.quantize.rewrite import channel_axis, transposes_weight
from modelpress.quantize.selection import Layer

MOST_ZEROS = 0.25
"""Share of zeros above which a weight counts as pruned."""


def quantize_layers(
    model: ModelProto,
    layers: Sequence[Layer],
    batches: Sequence[Inputs],
    config: QuantizeConfig,
    progress: Progress,
    frozen: Frozen | None = None,
) -> dict[str, GroupedWeight]:
    """Quantize the weights of MatMul and Gemm nodes; nodes that share a weight share its codes.

    With `frozen` on an earlier version's scales.

    GPTQ goes through the graph in its order, input by input: the Hessian of a layer is taken from the graph whose
    earlier layers are quantized already, as in the paper.

    Returns:
        The quantized weights by node.

    Raises:
        StageError: a weight that is not finite, a Hessian that cannot be inverted, a pruned weight for `hqq`; the node
            is named.
    """
    shared = _shared(model, layers)
    grid = Grid(config.num_bits, config.group_size, config.symmetric)
    made: dict[str, GroupedWeight] = {}
    if config.algorithm != "gptq":
        for one in shared:
            real = config.algorithm == "hqq"
            earlier = frozen.groups(one.name, one.values, grid, real=real) if frozen else None
            made |= dict.fromkeys(one.nodes, quantize_weight(one.nodes, one.values, grid, config, earlier=earlier))
        return made
    steps: dict[str, list[_Weight]] = {}
    for one in shared:
        steps.setdefault(one.inputs[0], []).append(one)
    for done, (value, step) in enumerate(steps.items(), start=1):
        progress(0, 1, f"GPTQ: input {done} of {len(steps)}, {value}")
        current = ModelProto()
        current.CopyFrom(model)
        nbits.replace_products_(current, made)
        moments = hessians(current, list(dict.fromkeys(name for one in step for name in one.inputs)), batches)
        for one in step:
            hessian = torch.stack([moments[name] for name in one.inputs]).sum(0)
            earlier = frozen.groups(one.name, one.values, grid) if frozen else None
            made |= dict.fromkeys(one.nodes, quantize_weight(one.nodes, one.values, grid, config, hessian, earlier))
    return made


def round_layers(
    model: ModelProto, layers: Sequence[Layer], grid: Grid, frozen: Frozen | None = None
) -> dict[str, GroupedWeight]:
    """The same by rounding to the nearest, whatever the config's algorithm: for layers that need more bits."""
    made: dict[str, GroupedWeight] = {}
    for one in _shared(model, layers):
        with naming(one.nodes):
            earlier = frozen.groups(one.name, one.values, grid) if frozen else None
            made |= dict.fromkeys(one.nodes, round_to_nearest(one.values, grid, earlier))
    return made


def float8_layers(model: ModelProto, layers: Sequence[Layer], per_channel: bool) -> dict[str, Float8Weight]:
    """The weights of MatMul, Gemm and Conv nodes in float8, by node, in the shape that the node reads.

    Raises:
        StageError: a weight that is not finite; the node is named.
    """
    nodes = {node.name: node for node in model.graph.node}
    initializers = {one.name: one for one in model.graph.initializer}
    made: dict[tuple[str, int | None], Float8Weight] = {}
    found: dict[str, Float8Weight] = {}
    for layer in layers:
        axis = channel_axis(nodes[layer.node], layer.dimensions) if per_channel else None
        if (layer.weight, axis) not in made:
            values = torch.from_numpy(np.array(numpy_helper.to_array(initializers[layer.weight])))
            with naming([layer.node]):
                made[layer.weight, axis] = round_to_float8(values, axis)
        found[layer.node] = made[layer.weight, axis]
    return found


@dataclass(frozen=True)
class _Weight:
    name: str
    values: Tensor
    """(out, in) float32."""
    nodes: list[str]
    inputs: list[str]
    """What these nodes multiply by it."""


def _shared(model: ModelProto, layers: Sequence[Layer]) -> list[_Weight]:
    """The layers' weights, each with its nodes, in the order of their first ones."""
    nodes = {node.name: node for node in model.graph.node}
    initializers = {one.name: one for one in model.graph.initializer}
    found: dict[tuple[str, bool], _Weight] = {}
    for layer in layers:
        node = nodes[layer.node]
        as_rows = transposes_weight(node)
        if (layer.weight, as_rows) not in found:
            values = torch.from_numpy(np.array(numpy_helper.to_array(initializers[layer.weight])))
            found[layer.weight, as_rows] = _Weight(layer.weight, values if as_rows else values.T.contiguous(), [], [])
        one = found[layer.weight, as_rows]
        one.nodes.append(layer.node)
        if node.input[0] not in one.inputs:
            one.inputs.append(node.input[0])
    return list(found.values())


def quantize_weight(
    names: Sequence[str],
    weight: Tensor,
    grid: Grid,
    config: QuantizeConfig,
    hessian: Tensor | None = None,
    earlier: Earlier | None = None,
) -> GroupedWeight:
    """Round one weight by `config.algorithm`: a graph's or a module's.

    Args:
        names: of the nodes or layers that it belongs to, for errors.
        weight: (out, in) float.
        grid: bits, group size, symmetric or not.
        config: the algorithm, and whether `gptq` orders its inputs.
        hessian: (in, in), for `gptq`: Σ x xᵀ of the inputs; overwritten above its diagonal.
        earlier: its earlier version, on whose scales it is rounded.

    Raises:
        StageError: see `quantize_layers`.
    """
    with naming(names):
        if hessian is not None:
            return gptq(weight, hessian, grid, config.act_order, earlier=earlier, overwrite=True)
        if config.algorithm == "rtn":
            return round_to_nearest(weight, grid, earlier)
        zeros = float((weight == 0).float().mean())
        if zeros > MOST_ZEROS:
            raise StageError(
                "quantizing with real zero points",
                found=f"{zeros:.0%} zeros, which would come back as small numbers",
                expected=f"at most {MOST_ZEROS:.0%}",
                fix="use quantize.algorithm 'gptq' or 'rtn', which keep zeros",
            )
        if earlier is None:
            return hqq(weight, grid)
        return replace(round_to_nearest(weight, grid, earlier), zero_point=earlier.zero_point)


@contextlib.contextmanager
def naming(names: Sequence[str]) -> Iterator[None]:
    """Errors say whose weight it was."""
    try:
        yield
    except StageError as error:
        doing = f"quantizing {', '.join(map(repr, names))}: {error.doing}"
        raise StageError(doing, found=error.found, expected=error.expected, fix=error.fix) from error
