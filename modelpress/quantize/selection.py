"""Which nodes of a graph are quantized: what the method can take, what the config targets, what it ignores."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from onnx import ModelProto, TensorProto

from modelpress.config import QuantizeConfig
from modelpress.errors import ConfigError, CoverageError

WEIGHTED = ("MatMul", "Gemm", "Conv")
"""Operators whose second input is the weight."""


@dataclass(frozen=True)
class Layer:
    """A node with a constant float weight."""

    node: str
    """Node name."""
    op_type: str
    """Operator."""
    weight: str
    """Name of the weight's initializer."""
    elements: int
    """Number of weights."""
    dimensions: int = 2
    """Axes of the weight."""


def eligible_layers(model: ModelProto, embeddings: bool) -> list[Layer]:
    """Every MatMul, Gemm and Conv with a constant float32 weight, and with `embeddings` every Gather from a constant
    two-dimensional float32 table, in graph order."""
    floats = {one.name: one for one in model.graph.initializer if one.data_type == TensorProto.FLOAT}
    layers = []
    for node in model.graph.node:
        if node.op_type in WEIGHTED and len(node.input) > 1:
            weight = floats.get(node.input[1])
            taken = weight is not None and len(weight.dims) >= 2
        elif node.op_type == "Gather" and embeddings:
            weight = floats.get(node.input[0])
            axis = next((one.i for one in node.attribute if one.name == "axis"), 0)
            taken = weight is not None and len(weight.dims) == 2 and axis == 0
        else:
            continue
        if weight is not None and taken:
            elements = 1
            for size in weight.dims:
                elements *= size
            layers.append(Layer(node.name, node.op_type, weight.name, elements, len(weight.dims)))
    return layers


def chosen_layers(layers: Sequence[Layer], config: QuantizeConfig) -> list[Layer]:
    """The eligible layers that the config takes: `targets` (embeddings are asked for by `embeddings`), less `ignore`.

    Raises:
        CoverageError: nothing is eligible, or nothing is left.
        ConfigError: a pattern matches no eligible node, or a method targets what it cannot take.
    """
    if not layers:
        raise CoverageError(
            "looking for layers to quantize",
            found="no MatMul, Gemm or Conv with a constant float32 weight",
            expected="at least one",
            fix="leave the quantize stage out, or look at the graph's nodes",
        )
    check_patterns(layers, "quantize", targets=config.targets, ignore=config.ignore)
    chosen = []
    for layer in layers:
        targeted = matches(layer, config.targets)
        obstacle = _obstacle(layer, config)
        if obstacle:
            if targeted:
                raise ConfigError(
                    f"quantizing {layer.node!r}",
                    found=f"{obstacle[0]} in quantize.targets, with quantize.method {config.method!r}",
                    expected=obstacle[1],
                    fix="set quantize.method to 'static'",
                )
            continue
        wanted = targeted or not config.targets or layer.op_type == "Gather"
        if wanted and not matches(layer, config.ignore):
            chosen.append(layer)
    if not chosen:
        raise CoverageError(
            "choosing layers to quantize",
            found=f"none of {len(layers)} eligible layers",
            expected="at least one",
            fix=f"{config.method} quantization leaves convolutions in float: set quantize.method to 'static'"
            if config.method != "static" and any(layer.op_type == "Conv" for layer in layers)
            else "widen quantize.targets or narrow quantize.ignore",
        )
    return chosen


def check_patterns(layers: Sequence[Layer], stage: str, **fields: Sequence[str]) -> None:
    """Refuse a pattern that no layer's node matches; `fields` are the patterns by the config's field.

    Raises:
        ConfigError: one matches none; names that are near are given.
    """
    names = [layer.node for layer in layers]
    for field, patterns in fields.items():
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
                raise ConfigError(
                    f"matching {stage}.{field} against the graph",
                    found=f"{pattern!r}, which matches none of {len(names)} eligible nodes",
                    expected="a node name or glob" + (f", such as {', '.join(map(repr, near))}" if near else ""),
                )


def shared_weights(layers: Sequence[Layer]) -> list[tuple[str, ...]]:
    """Names of the layers' nodes, those that share a weight together, in the order of the first of each: a weight
    that one node reads as integers and another in float would be stored twice."""
    units: dict[str, list[str]] = {}
    for layer in layers:
        units.setdefault(layer.weight, []).append(layer.node)
    return [tuple(nodes) for nodes in units.values()]


def _obstacle(layer: Layer, config: QuantizeConfig) -> tuple[str, str] | None:
    """What the method cannot take about a layer, and what it takes."""
    if layer.op_type == "Conv" and config.method == "dynamic":
        return "a convolution", "MatMul or Gemm: dynamic int8 makes convolutions slower"
    if config.method != "weight-only" or config.algorithm == "fp8":
        return None
    if layer.op_type == "Conv":
        return "a convolution", "MatMul or Gemm: ONNX Runtime has no convolution with grouped weights"
    if layer.op_type != "Gather" and layer.dimensions != 2:
        return f"a weight of {layer.dimensions} axes", "one of 2 axes"
    return None


def matches(layer: Layer, patterns: Sequence[str]) -> bool:
    """Whether one of the patterns names the layer's node."""
    return any(fnmatchcase(layer.node, pattern) for pattern in patterns)
