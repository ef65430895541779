"""Which weights of a graph are planned, and what each may become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, numpy_helper

from modelpress.config import PlanConfig
from modelpress.errors import ConfigError, CoverageError, StageError
from modelpress.plan.candidates import Candidate, Coding, Floats, encode, fits, zeros
from modelpress.quantize.rewrite import channel_axis
from modelpress.quantize.selection import Layer, check_patterns, eligible_layers, matches


@dataclass(frozen=True)
class PlannedWeight:
    """A weight that one node or several read."""

    name: str
    """Of the initializer."""
    nodes: tuple[str, ...]
    """All nodes that read it as their weight or table."""
    values: Floats
    """The float weight."""
    channel_axis: int
    """What numbers the output channels (the rows of a table): 0 or the last axis."""
    candidates: tuple[Candidate, ...]
    """What it may become beside staying in float."""
    importance: Floats | None = None
    """Root mean square of each input, which broadcasts to the weight; None: not known."""

    def encode(self, candidate: Candidate) -> Coding:
        """Its codes as a candidate."""
        return encode(self.values, candidate, self.channel_axis, self.importance)

    def zeros(self, candidate: Candidate) -> npt.NDArray[np.bool_]:
        """Where it is zero as a candidate because it is now, or by the candidate's sparsity."""
        already: npt.NDArray[np.bool_] = np.equal(self.values, 0)
        if not candidate.sparsity:
            return already
        return np.logical_or(already, zeros(self.values, candidate.sparsity, self.channel_axis, self.importance))


def planned_weights(model: ModelProto, config: PlanConfig) -> list[PlannedWeight]:
    """The weights that the config takes, in graph order; one that several nodes read is one, and so is its plan.

    Raises:
        ConfigError: a pattern that matches no eligible node, or a group size that divides none of the weights.
        CoverageError: nothing is eligible, or nothing is left.
        StageError: a weight that is NaN or infinite.
    """
    layers = eligible_layers(model, config.embeddings)
    chosen = {layer.weight for layer in chosen_layers(layers, config)}
    initializers = {one.name: one for one in model.graph.initializer}
    nodes = {node.name: node for node in model.graph.node}
    replaceable = {one.name for one in model.graph.input}
    readers: dict[str, list[Layer]] = {}
    for layer in layers:
        if layer.weight in chosen and layer.weight not in replaceable:
            readers.setdefault(layer.weight, []).append(layer)
    weights = []
    for name, those in readers.items():
        values = np.ascontiguousarray(numpy_helper.to_array(initializers[name]))
        _check_finite(name, values)
        axis = channel_axis(nodes[those[0].node], values.ndim)
        wanted = [
            Candidate(bits, scale, sparsity)
            for sparsity in sorted(config.sparsity)
            for scale in config.sharing
            for bits in sorted(config.num_bits)
        ]
        offered = tuple(one for one in wanted if fits(one, values.shape, axis))
        if offered:
            weights.append(PlannedWeight(name, tuple(layer.node for layer in those), values, axis, offered))
    _check_scales(weights, config, len(readers))
    return weights


def chosen_layers(layers: Sequence[Layer], config: PlanConfig) -> list[Layer]:
    """The layers whose weights the config takes.

    Raises:
        ConfigError: a pattern that matches no layer.
        CoverageError: there is none, or none is left.
    """
    if not layers:
        raise CoverageError(
            "looking for weights to plan",
            found="no MatMul, Gemm or Conv with a constant float32 weight",
            expected="at least one",
            fix="look at the graph's nodes: is it quantized already?",
        )
    check_patterns(layers, "plan", targets=config.targets, ignore=config.ignore)
    ignored = {layer.weight for layer in layers if matches(layer, config.ignore)}
    chosen = [
        layer
        for layer in layers
        if (not config.targets or matches(layer, config.targets)) and layer.weight not in ignored
    ]
    if not chosen:
        raise CoverageError(
            "choosing weights to plan",
            found=f"none of {len(layers)} eligible layers",
            expected="at least one",
            fix="widen plan.targets or narrow plan.ignore",
        )
    return chosen


def _check_finite(name: str, values: Floats) -> None:
    wrong = int(np.count_nonzero(~np.isfinite(values)))
    if wrong:
        raise StageError(
            f"planning {name!r}",
            found=f"{wrong} of its {values.size} values NaN or infinite",
            expected="finite weights",
            fix="repair the model, or name its node in plan.ignore",
        )


def _check_scales(weights: Sequence[PlannedWeight], config: PlanConfig, readers: int) -> None:
    for size in config.group_sizes:
        if not any(one.scale == size for weight in weights for one in weight.candidates):
            raise ConfigError(
                f"offering plan.group_sizes {size}",
                found=f"a group size that divides the inputs of none of {readers} weights into two groups or more",
                expected="one that fits some weight",
                fix="take a smaller power of two, or leave it out of plan.group_sizes",
            )


def eligible_elements(model: ModelProto, config: PlanConfig) -> int:
    """Weights that could be planned, also those that `targets` and `ignore` leave out; shared ones count once."""
    return sum({layer.weight: layer.elements for layer in eligible_layers(model, config.embeddings)}.values())
