"""What hangs together: which rows of which layers carry a structure, and which columns read it.

The module is traced to its ATen graph by `torch.export`, as it is for ONNX. From each linear and convolution layer the
output channels are followed through what keeps them apart (activations, pooling, batch normalisation, reshapes,
attention's products) to the layers that read them. Two flows that meet in a product or a sum must lose the same
channels: they become one group, as in DepGraph (Fang et al. 2023, arXiv:2301.12900). A flow that ends anywhere else
(the model's output, a layer normalisation over the channels) cannot be pruned, and says why.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from modelpress.errors import ExportError
from modelpress.prune.repair import unreadable

StructureKind = Literal["channels", "neurons", "heads"]

LAYERS = {"linear", "conv1d", "conv2d"}
KEEPING = {
    *("relu", "relu_", "relu6", "gelu", "silu", "silu_", "mish", "tanh", "sigmoid", "elu", "leaky_relu", "hardtanh"),
    *("hardswish", "hardsigmoid", "softplus", "dropout", "clone", "contiguous", "to", "alias", "detach", "neg", "pow"),
    *("max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"),
}
"""Operators that work on each channel apart and leave the shape's axes in place."""
ELEMENTWISE = {"add", "add_", "sub", "mul", "mul_", "div"}
RESHAPING = {"view", "reshape", "flatten", "unflatten", "_unsafe_view", "squeeze", "unsqueeze"}
REPEATING = {"expand", "repeat", "repeat_interleave"}
PRODUCTS = {"matmul", "bmm", "scaled_dot_product_attention"}


@dataclass(frozen=True)
class Reader:
    """A layer whose input holds the structures: structure s is the columns [s · block, (s + 1) · block)."""

    name: str
    block: int


@dataclass
class Group:
    """Structures that live and die together."""

    kind: StructureKind
    size: int
    """Number of structures."""
    width: int
    """Rows of each producer per structure (1, or the size of a head)."""
    producers: list[str]
    """Layers whose output rows are the structures."""
    followers: list[str]
    """Batch normalisations and depthwise convolutions: one row per structure."""
    readers: list[Reader]
    """Layers that read the structures."""


@dataclass(frozen=True)
class _Place:
    """Where structures stand in a tensor: axis, elements per structure within the axis, structures, rows of each."""

    axis: int
    block: int
    size: int
    width: int


@dataclass
class _Flow:
    """One layer's output on its way."""

    producer: str
    is_conv: bool
    places: dict[fx.Node, _Place] = field(default_factory=dict)
    joins: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    followers: list[str] = field(default_factory=list)
    readers: list[Reader] = field(default_factory=list)
    sizes: set[int] = field(default_factory=set)
    """Numbers of structures that the followers and readers see."""
    obstacle: str = ""


def find_groups(module: nn.Module, example: dict[str, Tensor]) -> tuple[list[Group], dict[str, str]]:
    """Prunable groups in the order of the forward pass, and for each other layer why it is none.

    Args:
        module: in eval mode.
        example: inputs of `forward`, with more than one sample.

    Raises:
        ExportError: the module cannot be traced.
    """
    try:
        program = torch.export.export(module, (), kwargs=example, strict=False)
    except (RuntimeError, ValueError, TypeError, torch._dynamo.exc.TorchDynamoException) as error:
        raise ExportError(
            f"tracing {type(module).__name__} for structured pruning",
            found=str(error).split("\n")[0],
            expected="a forward pass without branches on values",
            fix="use prune.method 'magnitude', which needs no trace",
        ) from error
    tracer = _Tracer(module, program)
    flows = [tracer.follow(node) for node in program.graph.nodes if _operator(node) in LAYERS]
    groups: list[Group] = []
    refused: dict[str, str] = {}
    for members in _merge([flow for flow in flows if flow.producer]):
        obstacle = next((flow.obstacle for flow in members if flow.obstacle), "") or _disagreement(members)
        if obstacle:
            refused |= {flow.producer: obstacle for flow in members}
        else:
            groups.append(_group(members))
    return groups, refused


class _Tracer:
    """Follows outputs through one exported graph."""

    def __init__(self, module: nn.Module, program: ExportedProgram) -> None:
        self.module = module
        signature = program.graph_signature
        self.states = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}

    def follow(self, start: fx.Node) -> _Flow:
        flow = _Flow(self._module_of(start, 1), is_conv=_operator(start) != "linear")
        if not flow.producer:
            return flow
        shape = _shape(start)
        axis = len(shape) - 1 if _operator(start) == "linear" else 1
        if _operator(start) != "linear" and _groups(start) != 1:
            flow.obstacle = "a grouped convolution"
            return flow
        flow.places[start] = _Place(axis, 1, shape[axis], 1)
        queue = [start]
        while queue and not flow.obstacle:
            node = queue.pop(0)
            for user in node.users:
                if user not in flow.places and self._step(flow, node, user):
                    queue.append(user)
        return flow

    def _step(self, flow: _Flow, node: fx.Node, user: fx.Node) -> bool:
        """Extend `flow` from `node` to its user; True if it goes on from there."""
        place, operator = flow.places[node], _operator(user)
        if operator == "_assert_tensor_metadata":
            return False
        if operator in LAYERS:
            return self._enter_layer(flow, place, node, user)
        after: _Place | None = None
        if operator in KEEPING or (operator == "softmax" and _axis(user.args[1], node) != place.axis):
            after = place
        elif operator == "batch_norm" and place == _Place(1, 1, place.size, 1) and self._module_of(user, 1):
            flow.followers.append(self._module_of(user, 1))
            flow.sizes.add(place.size)
            after = place
        elif operator in RESHAPING:
            after = _reshaped(place, _shape(node), _shape(user))
        elif operator in ("transpose", "permute"):
            after = _permuted(place, node, user)
        elif operator in ELEMENTWISE or operator in PRODUCTS:
            after = _joined(flow, place, node, user)
        if after is None:
            shared = " (heads that several queries share)" if operator in REPEATING else ""
            flow.obstacle = f"its output meets {operator}{shared}"
            return False
        flow.places[user] = after
        return True

    def _enter_layer(self, flow: _Flow, place: _Place, node: fx.Node, user: fx.Node) -> bool:
        name, is_linear = self._module_of(user, 1), _operator(user) == "linear"
        axis = len(_shape(node)) - 1 if is_linear else 1
        fits = user.args[0] is node and name and place.axis == axis
        groups = 1 if is_linear else _groups(user)
        if fits and groups == 1:
            obstacle = unreadable(self.module.get_submodule(name))
            if obstacle:
                flow.obstacle = f"{name}, which reads it, {obstacle}"
                return False
            flow.readers.append(Reader(name, place.block))
            flow.sizes.add(place.size)
            return False
        depthwise = groups == place.size == _shape(user)[1] and place.block == place.width == 1
        if fits and depthwise:
            flow.followers.append(name)
            flow.sizes.add(place.size)
            flow.places[user] = place
            return True
        flow.obstacle = f"its output meets {_operator(user)}"
        return False

    def _module_of(self, node: fx.Node, argument: int) -> str:
        """Name of the module whose `weight` is this argument; empty if it is none, or shared with another call."""
        weight = node.args[argument] if len(node.args) > argument else None
        name = self.states.get(weight.name, "") if isinstance(weight, fx.Node) and len(weight.users) == 1 else ""
        return name.removesuffix(".weight") if name.endswith(".weight") else ""


def _operator(node: fx.Node) -> str:
    if node.op != "call_function":
        return "the model's output" if node.op == "output" else node.op
    packet = getattr(node.target, "overloadpacket", None)
    return str(getattr(packet, "__name__", node.target))


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(int(size) for size in node.meta["val"].shape)


def _axis(axis: Any, node: fx.Node) -> int:
    return int(axis) % len(_shape(node))


def _groups(node: fx.Node) -> int:
    return int(node.args[6]) if len(node.args) > 6 else 1  # type: ignore[arg-type]


def _reshaped(place: _Place, before: tuple[int, ...], after: tuple[int, ...]) -> _Place | None:
    """Place after a reshape that keeps the axis, merges what follows into it, or splits it into (heads, head size)."""
    length, outer = before[place.axis], math.prod(before[: place.axis])
    merges = {math.prod(before[place.axis + 1 : end]) for end in range(place.axis + 1, len(before) + 1)}
    for axis, size in enumerate(after):
        if math.prod(after[:axis]) != outer:
            continue
        if size % length == 0 and size // length in merges:
            return _Place(axis, place.block * (size // length), place.size, place.width)
        whole_rows = place.block == place.width == 1
        if whole_rows and 1 < size < length and axis + 1 < len(after) and size * after[axis + 1] == length:
            return _Place(axis, 1, size, after[axis + 1])
    return None


def _permuted(place: _Place, node: fx.Node, user: fx.Node) -> _Place:
    order = list(range(len(_shape(node))))
    if _operator(user) == "transpose":
        first, second = _axis(user.args[1], node), _axis(user.args[2], node)
        order[first], order[second] = order[second], order[first]
    else:
        order = [_axis(axis, node) for axis in user.args[1]]  # type: ignore[union-attr]
    return _Place(order.index(place.axis), place.block, place.size, place.width)


def _joined(flow: _Flow, place: _Place, node: fx.Node, user: fx.Node) -> _Place | None:
    """Place after a sum or a product with other tensors, each of which must carry the same structures or none."""
    axis_from_end = place.axis - len(_shape(node))
    product = _operator(user) in PRODUCTS
    if product and axis_from_end >= -2:
        return None  # the product sums over the structures, or has them as its rows
    others = [other for other in user.all_input_nodes if other is not node]
    for other in others:
        shape = _shape(other)
        if len(shape) >= -axis_from_end and shape[axis_from_end] != 1:
            if shape[axis_from_end] != _shape(node)[place.axis]:
                return None
            flow.joins.setdefault(user, []).append(other)
    return _Place(len(_shape(user)) + axis_from_end, place.block, place.size, place.width)


def _merge(flows: list[_Flow]) -> list[list[_Flow]]:
    """Flows that meet in a join, together; in the order of the first of each."""
    merged: list[list[_Flow]] = []
    for flow in flows:
        touching = [members for members in merged if any(flow.joins.keys() & other.joins.keys() for other in members)]
        united = [member for members in touching for member in members] + [flow]
        position = merged.index(touching[0]) if touching else len(merged)
        merged = [members for members in merged if members not in touching]
        merged.insert(position, united)
    return merged


def _disagreement(members: list[_Flow]) -> str:
    """Why a group does not close: an operand that comes from elsewhere, or readers that see other structures."""
    for flow in members:
        for join, operands in flow.joins.items():
            for operand in operands:
                carriers = [other for other in members if operand in other.places]
                if not carriers:
                    return f"its output meets {_operator(join)} with a tensor that cannot be pruned along"
                if any(other.places.get(join) != flow.places[join] for other in carriers):
                    return f"its output meets {_operator(join)} with a tensor of another layout"
    if len({_final_place([flow]).size for flow in members}.union(*[flow.sizes for flow in members])) > 1:
        return "its output is read both whole and by heads"
    if not any(flow.readers for flow in members):
        return "no layer reads its output"
    return ""


def _group(members: list[_Flow]) -> Group:
    place = _final_place(members)
    is_conv = any(flow.is_conv for flow in members)
    readers = {reader.name: reader for flow in members for reader in flow.readers}
    return Group(
        kind="channels" if is_conv else "heads" if place.width > 1 else "neurons",
        size=place.size,
        width=place.width,
        producers=[flow.producer for flow in members],
        followers=list(dict.fromkeys(name for flow in members for name in flow.followers)),
        readers=list(readers.values()),
    )


def _final_place(members: list[_Flow]) -> _Place:
    """The coarsest structures on the way: heads, once a reshape has made them of rows."""
    return min((place for flow in members for place in flow.places.values()), key=lambda place: place.size)
