"""Rounded weights in the layout of compressed-tensors, which vLLM and transformers read, and what config.json says.

``pack-quantized``: integer codes, eight of 4 bits or four of 8 in an int32 with the first lowest, scales and (unless
symmetric) zero points per group of inputs, the zero points packed along the outputs. ``float-quantized``: float8 e4m3
and a scale per output channel, or one. Source: the package compressed-tensors 0.20; it is not needed to write them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from modelpress.config import QuantizeConfig
from modelpress.quantize.float8 import Float8Weight
from modelpress.quantize.groups import Grid, GroupedWeight
from modelpress.quantize.nbits import in_bytes

RoundedWeight = GroupedWeight | Float8Weight


def pack(weight: RoundedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """One layer's tensors by the format's names.

    Args:
        weight: (out, in); its groups must all be full, as the format knows no others.
        dtype: of the scales, which it must hold exactly.

    Returns:
        ``weight_packed`` (out, in · bits ÷ 32) int32, ``weight_scale`` (out, groups), ``weight_zero_point``
        (out · bits ÷ 32, groups) int32 unless symmetric, ``weight_shape`` (2,) int64; or ``weight`` (out, in)
        float8_e4m3fn and ``weight_scale`` (out, 1) or (1,).
    """
    if isinstance(weight, Float8Weight):
        scale = weight.scale.reshape(1) if weight.axis is None else weight.scale
        return {"weight": weight.codes.contiguous(), "weight_scale": scale.to(dtype).contiguous()}
    bits = weight.grid.num_bits
    made = {
        "weight_packed": _in_words(weight.codes, bits),
        "weight_scale": weight.scale.to(dtype).contiguous(),
        "weight_shape": torch.tensor(weight.codes.shape),
    }
    if not weight.grid.symmetric:
        made["weight_zero_point"] = _in_words(weight.zero_point.T.contiguous(), bits).T.contiguous()
    return made


def unpack(tensors: Mapping[str, Tensor], config: QuantizeConfig) -> RoundedWeight:
    """What `pack` was given, rounded as `config` says."""
    scale = tensors["weight_scale"].float()
    if config.algorithm == "fp8":
        return Float8Weight(tensors["weight"], scale, 0 if config.per_channel else None)
    grid = Grid(config.num_bits, config.group_size, config.symmetric)
    outputs, inputs = tensors["weight_shape"].tolist()
    if grid.symmetric:
        zero_point = torch.full(scale.shape, grid.middle, dtype=torch.uint8)
    else:
        zero_point = _from_words(tensors["weight_zero_point"].T, grid.num_bits, outputs).T.contiguous()
    return GroupedWeight(_from_words(tensors["weight_packed"], grid.num_bits, inputs), scale, zero_point, grid)


def quantization_config(config: QuantizeConfig, ignore: Sequence[str]) -> dict[str, Any]:
    """What compressed-tensors' `QuantizationConfig` reads.

    Args:
        config: of method `weight-only`.
        ignore: names of linear layers that stay in float.
    """
    float8 = config.algorithm == "fp8"
    weights: dict[str, Any] = {"num_bits": config.num_bits, "symmetric": config.symmetric, "dynamic": False}
    if float8:
        weights |= {"type": "float", "strategy": "channel" if config.per_channel else "tensor"}
    else:
        weights |= {"type": "int", "strategy": "group", "group_size": config.group_size}
    if config.act_order:
        weights["actorder"] = "weight"  # the order of rounding alone: groups are of neighbours, and no index is stored
    layout = "float-quantized" if float8 else "pack-quantized"
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "config_groups": {"group_0": scheme | {"format": layout}},
        "ignore": sorted(ignore),
    }


def scheme_name(config: QuantizeConfig) -> str:
    """Bits of weights and activations, such as W4A16."""
    kind = "-fp8" if config.algorithm == "fp8" else "" if config.symmetric else "-asym"
    return f"W{config.num_bits}A16{kind}"


def _in_words(codes: Tensor, bits: int) -> Tensor:
    """(rows, columns) uint8 codes as (rows, words) int32, the first code lowest."""
    packed = in_bytes(codes, bits)
    packed = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 4)))
    return torch.from_numpy(np.ascontiguousarray(packed).view("<i4").astype(np.int32))


def _from_words(words: Tensor, bits: int, columns: int) -> Tensor:
    """(rows, words) int32 as (rows, columns) uint8 codes."""
    codes: npt.NDArray[np.uint8] = np.ascontiguousarray(words.numpy().astype("<i4")).view(np.uint8)
    if bits == 4:
        halves = np.stack([codes & 15, codes >> 4], axis=-1)
        codes = np.asarray(halves.reshape(len(codes), -1), dtype=np.uint8)
    return torch.from_numpy(np.ascontiguousarray(codes[:, :columns]))
