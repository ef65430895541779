"""Which products of a graph may be computed by other kernels, by which, and the graphs in which they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onnx import ModelProto, NodeProto

from modelpress.config import PlanConfig
from modelpress.errors import ConfigError, CoverageError
from modelpress.plan.tensors import chosen_layers
from modelpress.quantize import nbits, rewrite, weight_only
from modelpress.quantize.groups import Grid, GroupedWeight
from modelpress.quantize.rewrite import is_plain
from modelpress.quantize.selection import Layer, eligible_layers, matches


@dataclass(frozen=True)
class Kernel:
    """One way to compute a product in integers."""

    num_bits: int
    """Of the weight's codes."""
    group_size: int | None = None
    """Inputs that share a scale, for `MatMulNBits`, which takes float activations; None: int8, a scale per channel, and
    activations ranged per call."""

    def __str__(self) -> str:
        if self.group_size is None:
            return "int8, activations ranged per call"
        return f"MatMulNBits of {self.num_bits} bits, groups of {self.group_size}"


@dataclass(frozen=True)
class Product:
    """A weight, and the products that read it: all by one kernel."""

    weight: str
    """Name of the initializer."""
    layers: tuple[Layer, ...]
    """The nodes that read it."""
    shape: tuple[int, ...]
    """Of the weight."""

    @property
    def nodes(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(layer.node for layer in self.layers)

    @property
    def alike(self) -> tuple[str, tuple[int, ...]]:
        """Products that have this in common are taken to need the same time."""
        return self.layers[0].op_type, self.shape


Choice = dict[str, Kernel]
"""By weight; one that is not in it is computed in float."""


def offered(config: PlanConfig) -> list[Kernel]:
    """The kernels that the config names."""
    kernels = [Kernel(8)] if "int8" in config.kernels else []
    for name, bits in (("nbits-8", 8), ("nbits-4", 4)):
        if name in config.kernels:
            kernels += [Kernel(bits, size) for size in config.group_sizes]
    return kernels


def products(model: ModelProto, config: PlanConfig) -> list[Product]:
    """The weights of two axes that MatMul and Gemm nodes alone read, as the config takes them, in graph order.

    Raises:
        ConfigError: a pattern that matches nothing, or a target that has no such kernel.
        CoverageError: nothing is eligible, or nothing is left.
    """
    every = eligible_layers(model, True)
    replaceable = {one.name for one in model.graph.input}
    chosen = {layer.weight for layer in chosen_layers(every, config)} - replaceable
    nodes = {node.name: node for node in model.graph.node}
    shapes = {one.name: tuple(one.dims) for one in model.graph.initializer}
    found = []
    for weight in dict.fromkeys(layer.weight for layer in every):
        readers = [layer for layer in every if layer.weight == weight]
        obstacle = next(filter(None, (_obstacle(layer, nodes[layer.node]) for layer in readers)), "")
        if weight not in chosen:
            continue
        if not obstacle:
            found.append(Product(weight, tuple(readers), shapes[weight]))
            continue
        targeted = [layer.node for layer in readers if matches(layer, config.targets)]
        if targeted:
            raise ConfigError(
                f"planning {targeted[0]!r} for time",
                found=f"{obstacle}, in plan.targets",
                expected="a MatMul or Gemm with a weight of two axes that only such nodes read",
                fix="leave it out of plan.targets: it stays in float",
            )
    if not found:
        raise CoverageError(
            "looking for products to plan for time",
            found=f"no MatMul or Gemm with a weight of its own among {len(every)} nodes with weights",
            expected="at least one",
            fix="for convolutions take quantize.method 'static'; for bytes, plan.objective 'bytes'",
        )
    return found


def _obstacle(layer: Layer, node: NodeProto) -> str:
    """Why a layer keeps its weight in float; empty where it need not."""
    if layer.op_type == "Conv":
        return "a convolution, which dynamic int8 makes slower and MatMulNBits does not know"
    if layer.op_type == "Gather":
        return "a table, which is looked up and not multiplied"
    if layer.dimensions != 2:
        return f"a weight of {layer.dimensions} axes"
    return "" if is_plain(node) else "a Gemm that scales or transposes its input"


class Builder:
    """Makes graphs in which chosen products are computed by other kernels.

    Args:
        model: the float graph; left as it is.
        planned: what may be chosen.
    """

    def __init__(self, model: ModelProto, planned: Sequence[Product]) -> None:
        self._model, self._products = model, {one.weight: one for one in planned}
        self._grouped: dict[tuple[str, Kernel], dict[str, GroupedWeight]] = {}

    def build(self, choice: Mapping[str, Kernel]) -> ModelProto:
        """A graph of its own."""
        made = ModelProto()
        made.CopyFrom(self._model)
        ranged = [name for name, kernel in choice.items() if kernel.group_size is None]
        rewrite.quantize_dynamic_(made, [node for name in ranged for node in self._products[name].nodes], True)
        grouped: dict[str, GroupedWeight] = {}
        for name, kernel in choice.items():
            if kernel.group_size is not None:
                grouped |= self._rounded(name, kernel, kernel.group_size)
        nbits.replace_products_(made, grouped)
        return made

    def _rounded(self, weight: str, kernel: Kernel, group_size: int) -> dict[str, GroupedWeight]:
        if (weight, kernel) not in self._grouped:
            grid, layers = Grid(kernel.num_bits, group_size), self._products[weight].layers
            self._grouped[weight, kernel] = weight_only.round_layers(self._model, layers, grid)
        return self._grouped[weight, kernel]
