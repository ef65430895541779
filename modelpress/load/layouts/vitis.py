"""A graph as ONNX Runtime's Vitis AI provider gives it to a DPU: fixed shapes, and rounded by powers of two.

The compiler for the board runs when the graph is loaded there. It leaves to the CPU, without an error, what has a shape
that varies or another rounding; so a pack that would end there is refused here. No graph of ours was run on a board.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from onnx import ModelProto, ValueInfoProto, numpy_helper

from modelpress.errors import ConfigError
from modelpress.load.layouts.graphs import write_onnx
from modelpress.load.read import Parts
from modelpress.manifest import Manifest

ROWS = 1
"""Samples of a run: the first axis, which varies in a pack, is fixed at this."""
_SHOWN = 3


def write_vitis(manifest: Manifest, parts: Parts, folder: Path) -> None:
    """``model.onnx`` for one sample a run, and its weights as `write_onnx` writes them.

    Raises:
        ConfigError: an axis other than the first varies, or the graph is rounded otherwise than a DPU takes it.
        CorruptionError: see `write_onnx`.
    """

    def fitted(model: ModelProto) -> None:
        doing = f"laying out pack {manifest.name} for Vitis AI"
        fix_rows_(model, doing)
        if wrong := list(islice(unfit(model), _SHOWN)):
            raise ConfigError(
                doing,
                found="; ".join(wrong),
                expected="QuantizeLinear and DequantizeLinear with powers of two as scales and zero points 0",
                fix="run the recipe with quantize: {method: static, scales: power-of-two, per_channel: false}",
            )

    write_onnx(manifest, parts, folder, fitted)


def fix_rows_(model: ModelProto, doing: str) -> None:
    """Fix the first axis of inputs, and of outputs where it is the same, at one sample, in place.

    Raises:
        ConfigError: another axis of an input varies.
    """
    weights = {one.name for one in model.graph.initializer}
    names: set[str] = set()
    for given in model.graph.input:
        if given.name in weights:
            continue
        for number, axis in enumerate(given.type.tensor_type.shape.dim):
            if axis.WhichOneof("value") == "dim_value" and axis.dim_value > 0:
                continue
            if number:
                raise ConfigError(
                    doing,
                    found=f"axis {number} of input {given.name!r} varies ({axis.dim_param or 'without a name'})",
                    expected="fixed sizes of every axis but the first",
                    fix="a workload whose dynamic_axes() names the first axis alone",
                )
            names |= {axis.dim_param} - {""}
            axis.dim_value = ROWS
    for value in (*model.graph.output, *model.graph.value_info):
        _fix(value, names)


def _fix(value: ValueInfoProto, names: set[str]) -> None:
    for axis in value.type.tensor_type.shape.dim:
        if axis.dim_param in names:
            axis.dim_value = ROWS


def unfit(model: ModelProto) -> Iterator[str]:
    """What of a graph's rounding such processors do not take, in words; nothing where all fits."""
    constants = {one.name: one for one in model.graph.initializer}
    rounding = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    if not rounding:
        yield "nothing in it is rounded"
    for node in rounding:
        parts = [constants.get(name) for name in node.input[1:3]]
        if len(parts) < 2 or any(part is None or part.external_data for part in parts):
            yield f"{node.name}: its scale or its zero point is no constant in the graph"
            continue
        scale, zero = (numpy_helper.to_array(part) for part in parts if part is not None)
        if zero.dtype not in (np.int8, np.int32) or zero.any():
            yield f"{node.name}: {zero.dtype} with the zero point {zero.reshape(-1)[0]}, not int8 with 0"
        elif scale.size != 1:
            yield f"{node.name}: {scale.size} scales, not one for the tensor"
        elif scale <= 0 or math.frexp(float(scale.reshape(())))[0] != 0.5:
            yield f"{node.name}: the scale {float(scale.reshape(())):.6g}, not a power of two"
