"""The scales of an earlier version: codes on them differ from its codes only where weights have moved.

A light fine-tune moves weights by a small part of a step, so that few codes change, by one, and a new version is stored
as the difference (`modelpress.delta`). Fresh scales move a little with the largest weight of each channel, and with
them most codes of large weights. A weight that no longer fits its scales gets fresh ones; the report tells of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnx import NodeProto, helper, numpy_helper
from torch import Tensor

from modelpress import graph
from modelpress.checkpoint import Checkpoint
from modelpress.config import QuantizeConfig
from modelpress.errors import ConfigError
from modelpress.quantize.groups import Earlier, Grid, encode, in_groups, parameters
from modelpress.quantize.selection import Layer
from modelpress.quantize.weights import Floats, quantize_symmetric, relative_error
from modelpress.reports import FrozenWeight

MAX_ERROR_GROWTH = 1.25
"""Rounding error on the earlier version's scales ÷ that on fresh ones, both as root mean squares, from which on a
weight gets fresh scales. Clipping and steps that are too wide both show in it; a quarter more error is a third of a
bit."""

Doubles = npt.NDArray[np.float64]

_CODES, _SCALE, _ZERO_POINT, _VALUE = "_quantized", "_scale", "_zero_point", "_value"
_SWEEPS = 8
"""Alternations by which factors of rows and columns are found; they settle in two or three."""


class Frozen:
    """What a quantized graph says of its scales, and of the form of its layers.

    Args:
        base: the ONNX checkpoint of the earlier version, quantized by the same method.

    Raises:
        CorruptionError: no ONNX checkpoint.
    """

    def __init__(self, base: Checkpoint) -> None:
        model = graph.join(base)
        self._arrays = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
        self._nodes = {node.name: node for node in model.graph.node}
        self._rows: dict[str, FrozenWeight] = {}

    @property
    def rows(self) -> list[FrozenWeight]:
        """Each weight that was asked for: whether it stays on the earlier scales."""
        return [self._rows[name] for name in sorted(self._rows)]

    def forms(self, layers: Sequence[Layer], config: QuantizeConfig) -> tuple[list[str], list[str]]:
        """Nodes that compute in integers in the earlier version, and those that compute in float from stored integers
        (with 4 bits: that have 8), so that the new version takes the same forms.

        Raises:
            ConfigError: the graph has none of these nodes, or none in integers: another model or method.
        """
        integers: list[str] = []
        in_float: list[str] = []
        for layer in layers:
            node = self._nodes.get(layer.node)
            if node is None or self._array(layer.weight + _CODES) is None:
                continue
            (integers if self._computes_in_integers(node, layer, config) else in_float).append(layer.node)
        if not integers:
            raise ConfigError(
                "taking the scales of quantize.scales_from",
                found=f"none of the {len(layers)} layers in integers there",
                expected=f"a pack of the same model, quantized by {config.method!r} with the same options",
                fix="leave quantize.scales_from out for the first version, or name another pack",
            )
        return integers, in_float

    def scale(self, weight: str) -> Floats | None:
        """The earlier scales of a weight, as they are stored."""
        return self._array(weight + _SCALE, np.float32)

    def has_grid(self, weight: str, grid: Grid) -> bool:
        """Whether the earlier version has grouped codes of so many bits."""
        codes = self._array(weight + _CODES, np.uint8)
        return codes is not None and codes.shape[-1] == grid.group_size * grid.num_bits // 8

    def symmetric(self, weight: str, values: Floats, axis: int | None) -> Floats | None:
        """The earlier scales of an int8 weight, (channels,) or (); None where fresh ones are to be taken."""
        channels = 1 if axis is None else values.shape[axis]
        scale = self.scale(weight)
        if scale is None or scale.size != channels or self._array(weight + _CODES, np.int8) is None:
            self._keep(weight, None)
            return None
        scale = np.array(scale.reshape(()) if axis is None else scale.reshape(-1))
        shape = [-1 if one == axis else 1 for one in range(values.ndim)]
        errors = []
        for given in (scale, None):
            codes, found = quantize_symmetric(values, axis, given)
            errors.append(relative_error(values, codes, found if axis is None else found.reshape(shape)))
        return scale if self._keep(weight, _growth(*errors)) else None

    def groups(self, weight: str, values: Tensor, grid: Grid, *, real: bool = False) -> Earlier | None:
        """The earlier scales, zero points and codes of a weight (out, in); None as above.

        Real zero points count as none unless `real`: a method whose zero points are integers has no place for them.
        """
        groups = in_groups(values, grid.group_size)
        shape = groups.shape[:2]
        codes, scale = self._array(weight + _CODES, np.uint8), self.scale(weight)
        if codes is None or scale is None or scale.size != shape.numel():
            self._keep(weight, None)
            return None
        if codes.shape != (*shape, grid.group_size * grid.num_bits // 8):
            self._keep(weight, None)
            return None
        zero_point = self._zero_points(weight, shape, grid, real)
        if zero_point is None:
            self._keep(weight, None)
            return None
        earlier = Earlier(torch.from_numpy(scale.reshape(shape).copy()), zero_point, _unpacked(codes, values, grid))
        errors = []
        for scales, zeros in (earlier[:2], parameters(groups, grid)):
            scales, zeros = scales.unsqueeze(-1), zeros.unsqueeze(-1)
            rounded = (encode(groups, scales, zeros, grid) - zeros) * scales
            errors.append(float((rounded - groups).double().square().mean().sqrt()))
        return earlier if self._keep(weight, _growth(*errors)) else None

    def activation(self, value: str) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]] | None:
        """Scale and zero point of an activation in a QDQ graph, both (); None where it has none."""
        scale = self._array(value + _SCALE, np.float32)
        zero_point = self._array(value + _ZERO_POINT, np.uint8)
        if scale is None or zero_point is None or scale.size != 1 or zero_point.size != 1:
            return None
        return scale.reshape(()), zero_point.reshape(())

    def factor(self, weights: Sequence[tuple[NodeProto, Floats]]) -> Floats | None:
        """By what smoothing had multiplied the rows of weights that read one value: (in,), with geometric mean 1.

        It is stored nowhere, and need not be: the earlier weights are diag(s) · W · diag(t) but for their rounding and
        what training changed, and s and t are found by least squares, by turns. Any positive factor is exact in float;
        one that is off by a thousandth moves a code in a hundred.

        Args:
            weights: the nodes, each with its weight as (in, out), not smoothed.

        Returns:
            The factors; None where the earlier version has not all of these weights.
        """
        pairs = [(values, self._rows_first(node, values.shape)) for node, values in weights]
        if any(earlier is None for _, earlier in pairs):
            return None
        now = np.concatenate([values for values, _ in pairs], axis=1).astype(np.float64)
        then = np.concatenate([earlier for _, earlier in pairs if earlier is not None], axis=1)
        return np.asarray(scales_between(now, then), dtype=np.float32)

    def _rows_first(self, node: NodeProto, shape: tuple[int, ...]) -> Doubles | None:
        """The earlier weight of a MatMul or Gemm as (in, out)."""
        earlier, name = self._nodes.get(node.name), node.input[1]
        codes, scale = self._array(name + _CODES, np.int8), self.scale(name)
        transposed = any(one.name == "transB" and one.i for one in node.attribute)
        values = self._array(name, np.float32)
        if earlier is not None and codes is not None and scale is not None and codes.ndim == 2:
            as_columns = not transposed or earlier.op_type == "MatMulInteger"
            transposed = not as_columns
            if scale.size not in (1, codes.shape[1 if as_columns else 0]):
                return None
            values = codes * (scale.reshape(1, -1) if as_columns else scale.reshape(-1, 1))
        if values is None:
            return None
        values = values.T if transposed else values
        return values.astype(np.float64) if values.shape == shape else None

    def _computes_in_integers(self, node: NodeProto, layer: Layer, config: QuantizeConfig) -> bool:
        if layer.op_type == "Gather":
            return True
        if config.method == "dynamic":
            return bool(node.op_type == "MatMulInteger")
        if config.method == "static":
            return node.op_type == layer.op_type and node.input[1] not in (layer.weight, layer.weight + _VALUE)
        bits = {one.name: helper.get_attribute_value(one) for one in node.attribute}.get("bits")
        return bool(node.op_type == "MatMulNBits" and bits == config.num_bits)

    def _zero_points(self, weight: str, shape: torch.Size, grid: Grid, real: bool) -> Tensor | None:
        stored = self._arrays.get(weight + _ZERO_POINT)
        if grid.symmetric or stored is None:
            return torch.full(shape, float(grid.middle)) if grid.symmetric and stored is None else None
        if stored.dtype == np.float32:
            return torch.from_numpy(stored.reshape(shape).copy()) if real else None
        if grid.num_bits == 4:
            stored = _nibbles(stored.reshape(shape[0], -1))[:, : shape[1]]
        return torch.from_numpy(stored.reshape(shape).astype(np.float32))

    def _array(self, name: str, dtype: type[np.generic] | None = None) -> npt.NDArray[Any] | None:
        found = self._arrays.get(name)
        return None if found is None or (dtype is not None and found.dtype != dtype) else found

    def _keep(self, weight: str, growth: float | None) -> bool:
        """Whether a weight stays on the earlier scales, noted."""
        kept = growth is not None and growth <= MAX_ERROR_GROWTH
        reason = "" if kept else "no such scales there" if growth is None else "moved out of its range"
        self._rows[weight] = FrozenWeight(name=weight, frozen=kept, error_growth=growth, reason=reason)
        return kept


def scales_between(now: Doubles, then: Doubles) -> Doubles:
    """s of then ≈ diag(s) · now · diag(t), by least squares: (rows,), of geometric mean 1, and 1 for rows of zeros."""
    rows, columns = np.ones(len(now)), np.ones(now.shape[1])
    for _ in range(_SWEEPS):
        rows = _ratio((then * now) @ columns, (now**2) @ columns**2)
        columns = _ratio(rows @ (then * now), rows**2 @ (now**2))
    rows = _ratio((then * now) @ columns, (now**2) @ columns**2)
    alive = (now != 0).any(axis=1)
    if not alive.any():
        return np.ones(len(now))
    scaled: Doubles = np.where(alive, rows / np.exp(np.log(rows[alive]).mean()), 1.0)
    return scaled


def _unpacked(codes: npt.NDArray[np.uint8], values: Tensor, grid: Grid) -> Tensor:
    """Codes as `nbits.pack_codes` packed them, (out, groups, bytes), as (out, in) float32."""
    rows = codes.reshape(len(codes), -1)
    rows = _nibbles(rows) if grid.num_bits == 4 else rows
    return torch.from_numpy(rows[:, : values.shape[1]].astype(np.float32))


def _nibbles(rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return np.stack([rows & 15, rows >> 4], axis=-1).reshape(len(rows), -1)


def _growth(frozen: float, fresh: float) -> float:
    return frozen / fresh if fresh else float("inf") if frozen else 1.0


def _ratio(above: Doubles, below: Doubles) -> Doubles:
    """Element by element; 1 where it is no positive number."""
    with np.errstate(all="ignore"):
        found = above / below
    return np.where(np.isfinite(found) & (found > 0), found, 1.0)
