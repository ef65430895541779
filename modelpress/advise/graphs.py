"""What a graph consists of: its products with the shapes that they are called with, its tables, its bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from onnx import ModelProto, helper

from modelpress import graph
from modelpress.advise.work import Kernel, Work
from modelpress.agreement import Inputs
from modelpress.checkpoint import Checkpoint
from modelpress.quantize.rewrite import name_nodes_
from modelpress.quantize.selection import eligible_layers

_SHAPE = "_shape"


@dataclass(frozen=True)
class Product:
    """A node that multiplies by a constant weight."""

    node: str
    """Its name."""
    weight: str
    """Name of the initializer."""
    work: Work
    """What it has to do in a call."""


@dataclass(frozen=True)
class Traits:
    """What decides which techniques a graph can take."""

    convolutions: tuple[str, ...]
    """Names of its convolutions."""
    products: int
    """MatMul and Gemm nodes with a constant weight."""
    tables: int
    """Embedding tables."""


def named(checkpoint: Checkpoint) -> ModelProto:
    """The graph, each of its nodes with a name of its own."""
    model = graph.join(checkpoint)
    name_nodes_(model)
    return model


def traits(model: ModelProto) -> Traits:
    """Of a float graph."""
    layers = eligible_layers(model, True)
    return Traits(
        convolutions=tuple(layer.node for layer in layers if layer.op_type == "Conv"),
        products=sum(layer.op_type in ("MatMul", "Gemm") for layer in layers),
        tables=len({layer.weight for layer in layers if layer.op_type == "Gather"}),
    )


def products(model: ModelProto, inputs: Inputs) -> list[Product]:
    """Every MatMul, Gemm and Conv with a constant float32 weight, with the shape of what it is given in a call."""
    layers = eligible_layers(model, False)
    nodes = {node.name: node for node in model.graph.node}
    weights = {one.name: tuple(one.dims) for one in model.graph.initializer}
    read = list(dict.fromkeys(nodes[layer.node].input[0] for layer in layers))
    shapes = _shapes(model, read, inputs)
    found = []
    for layer in layers:
        node = nodes[layer.node]
        options = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        work = Work(
            op_type=cast("Literal['MatMul', 'Gemm', 'Conv']", layer.op_type),
            weight=weights[layer.weight],
            input=shapes[node.input[0]],
            transposed=bool(options.get("transB", 0)),
            strides=tuple(options.get("strides", ())),
            pads=tuple(options.get("pads", ())),
            groups=int(options.get("group", 1)),
        )
        found.append(Product(layer.node, layer.weight, work))
    return found


def plan(found: list[Product], kernels: dict[str, Kernel]) -> list[tuple[Work, Kernel]]:
    """Each product with its kernel, by weight; those that are not named are computed in float."""
    return [(one.work, kernels.get(one.weight, "float")) for one in found]


def _shapes(model: ModelProto, values: list[str], inputs: Inputs) -> dict[str, tuple[int, ...]]:
    """Shapes of inner values in a call. They alone come out: the values themselves may be larger than memory."""
    watched = ModelProto()
    watched.CopyFrom(model)
    del watched.graph.output[:]
    for value in values:
        watched.graph.node.append(helper.make_node("Shape", [value], [value + _SHAPE], value + _SHAPE))
        watched.graph.output.append(helper.make_empty_tensor_value_info(value + _SHAPE))
    session = graph.session(graph.split(watched))
    names = [one.name for one in session.get_inputs()]
    found = session.run([value + _SHAPE for value in values], {name: inputs[name].numpy() for name in names})
    return {value: tuple(map(int, shape)) for value, shape in zip(values, found, strict=True)}
