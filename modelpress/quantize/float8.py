"""Weights in a byte of floating point: float8 e4m3 (4 bits of exponent, 3 of mantissa), rounded to the nearest.

Micikevicius et al. 2022, arXiv:2209.05433. The type has no infinity, and what is beyond its range becomes NaN: so the
scale takes each channel's largest weight to 448, the largest number there is, and what rounding pushes beyond it is
brought back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper
from torch import Tensor

from modelpress.errors import StageError
from modelpress.quantize.groups import storable
from modelpress.quantize.rewrite import replace_nodes, scaled_back

LARGEST = 448.0
SMALLEST_NORMAL = 2.0**-6
"""Below it the numbers are 2^-9 apart; from it on none is rounded by more than 2^-4 of itself."""

LEAST_OPSET, WIDENED_FROM = 19, 18
"""ONNX has this type from the first on. What it changed for the other operators since the second only admits more."""


@dataclass(frozen=True)
class Float8Weight:
    """A weight as codes and scales."""

    codes: Tensor
    """float8_e4m3fn, of the weight's shape, all finite."""
    scale: Tensor
    """float32, above 0: of as many axes, each of size 1 but the channels'."""
    axis: int | None
    """The channel axis; None: one scale in all."""

    def dequantize(self) -> Tensor:
        """codes · scale, float32."""
        return self.codes.float() * self.scale


def round_to_float8(weight: Tensor, axis: int | None, scale_dtype: torch.dtype = torch.float32) -> Float8Weight:
    """Round to the nearest float8, with one scale per index of `axis`, or a single one.

    Args:
        weight: any shape, float.
        axis: the channel axis, or None for one scale in all.
        scale_dtype: what the scale will be stored in; it is rounded to that before it is used.

    Raises:
        StageError: the weight is empty or not finite.
    """
    if not weight.numel() or not torch.isfinite(weight).all():
        raise StageError(
            "rounding a weight to float8",
            found=f"shape {list(weight.shape)}, {int((~torch.isfinite(weight)).sum())} of its values NaN or infinite",
            expected="finite values",
            fix="repair the model, or name the layer in quantize.ignore",
        )
    values = weight.detach().float()
    others = [other for other in range(values.ndim) if axis is None or other != axis % values.ndim]
    scale = storable(values.abs().amax(others, keepdim=True) / LARGEST, scale_dtype)
    # Saturate: what a cast makes of numbers beyond the range, NaN or the largest, is not the same everywhere.
    return Float8Weight((values / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale, axis)


def store_(model: ModelProto, weights: Mapping[str, Float8Weight]) -> None:
    """Let MatMul, Gemm and Conv nodes read float8 weights in place; they compute in float.

    The weight is spelt as Cast and Mul of constants, which ONNX Runtime folds when it makes a session. It runs a
    DequantizeLinear of float8 as well, but anew in each call.

    Args:
        model: whose nodes they are; of operator set 18 or later. It gets 19 where it has 18.
        weights: by node name; of the shape that the node reads.

    Raises:
        StageError: an operator set in which the type does not exist, or two nodes that need one weight in two forms.
    """
    if not weights:
        return
    _raise_opset_(model)
    eight = helper.tensor_dtype_to_np_dtype(TensorProto.FLOAT8E4M3FN)
    spelt: set[str] = set()
    rewritten: list[NodeProto] = []
    for node in model.graph.node:
        if node.name in weights:
            name, weight = node.input[1], weights[node.name]
            codes = weight.codes.contiguous().view(torch.uint8).numpy().view(eight)
            parts = scaled_back(model, name, codes, np.asarray(weight.scale.numpy()), node.name)
            rewritten += parts if name not in spelt else []
            spelt.add(name)
            node.input[1] = parts[-1].output[0]
        rewritten.append(node)
    replace_nodes(model, rewritten)


def _raise_opset_(model: ModelProto) -> None:
    standard = next(one for one in model.opset_import if one.domain in ("", "ai.onnx"))
    if standard.version < WIDENED_FROM:
        raise StageError(
            "storing float8 weights in an ONNX graph",
            found=f"operator set {standard.version}, which has no such type",
            expected=f"{WIDENED_FROM} or later",
            fix=f"set export.opset to {LEAST_OPSET}",
        )
    standard.version = max(standard.version, LEAST_OPSET)
    model.ir_version = max(model.ir_version, onnx.IR_VERSION_2023_5_5)
