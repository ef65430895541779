"""Grouped weights in the layout that compressed-tensors calls `pack-quantized`, which vLLM and transformers read.

https://github.com/vllm-project/compressed-tensors, compressors/pack_quantized: the codes of a row stand in int32 words,
the first in the lowest bits; symmetric codes count from the middle one; zero points are packed along the outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from modelpress.quantize.groups import Grid, GroupedWeight

WORD = 32
"""Bits of a word."""


def pack(name: str, weight: GroupedWeight) -> dict[str, Tensor]:
    """The tensors that stand for the weight `name`, whose groups must all be full: the layout knows no others."""
    outputs, inputs = weight.codes.shape
    tensors = {
        f"{name}_packed": _pack(weight.codes, weight.grid.num_bits),
        f"{name}_scale": weight.scale,
        f"{name}_shape": torch.tensor([outputs, inputs]),
    }
    if not weight.grid.symmetric:
        tensors[f"{name}_zero_point"] = _pack(weight.zero_point.T, weight.grid.num_bits).T.contiguous()
    return tensors


def unpack(name: str, tensors: Mapping[str, Tensor], grid: Grid) -> GroupedWeight:
    """What `pack` was given."""
    outputs, inputs = tensors[f"{name}_shape"].tolist()
    scale = tensors[f"{name}_scale"].float()
    codes = _unpack(tensors[f"{name}_packed"], grid.num_bits, inputs)
    if grid.symmetric:
        zero_point = torch.full(scale.shape, grid.middle, dtype=torch.uint8)
    else:
        zero_point = _unpack(tensors[f"{name}_zero_point"].T, grid.num_bits, outputs).T.contiguous()
    return GroupedWeight(codes, scale, zero_point, grid)


def describe(grid: Grid, ignored: Sequence[str]) -> dict[str, Any]:
    """What config.json says of it: `quantization_config`; `ignored` are the linear layers that stay as they were."""
    weights = {
        "num_bits": grid.num_bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "dynamic": False,
        "strategy": "group",
        "group_size": grid.group_size,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignored),
    }


def _pack(codes: Tensor, num_bits: int) -> Tensor:
    """(rows, columns) uint8 as (rows, words) int32; `num_bits` divides a word."""
    per_word = WORD // num_bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_word)).reshape(len(codes), -1, per_word)
    words = torch.zeros(padded.shape[:2], dtype=torch.int32)
    for place in range(per_word):
        words |= padded[..., place].to(torch.int32) << (place * num_bits)
    return words


def _unpack(words: Tensor, num_bits: int, columns: int) -> Tensor:
    mask = 2**num_bits - 1
    codes = [((words >> shift) & mask).to(torch.uint8) for shift in range(0, WORD, num_bits)]
    return torch.stack(codes, dim=-1).flatten(1)[:, :columns].contiguous()
