"""Between torch tensors and their bytes: little-endian, row-major, every bit kept."""

from __future__ import annotations

import sys
from typing import cast

import numpy as np
import torch

from modelpress.codec import Bytes
from modelpress.dtypes import DTYPES, DType
from modelpress.errors import ConfigError, SetupError

TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
}
NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def dtype_of(name: str, tensor: torch.Tensor) -> DType:
    """The pack's dtype of a tensor.

    Raises:
        ConfigError: a dtype that a pack cannot hold (complex, quantized).
    """
    if tensor.dtype not in NAMES:
        raise ConfigError(
            f"storing tensor {name!r}", found=str(tensor.dtype), expected=f"one of {', '.join(NAMES.values())}"
        )
    return DTYPES[NAMES[tensor.dtype]]


def to_bytes(tensor: torch.Tensor) -> Bytes:
    """(elements · itemsize,) uint8; shares memory where the tensor is contiguous and on the CPU."""
    _need_little_endian()
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.stride(0) != 1:  # of one element at most: contiguous by torch's word, and yet no view as bytes
        flat = flat.clone(memory_format=torch.contiguous_format)
    return cast(Bytes, flat.view(torch.uint8).numpy())


def from_bytes(raw: Bytes, dtype: DType, shape: tuple[int, ...]) -> torch.Tensor:
    """Undo `to_bytes`; the tensor takes over the memory of `raw`, which must be writable."""
    _need_little_endian()
    if not raw.size:
        return torch.empty(shape, dtype=TORCH_DTYPES[dtype.name])
    return torch.from_numpy(np.ascontiguousarray(raw)).view(TORCH_DTYPES[dtype.name]).reshape(shape)


def _need_little_endian() -> None:
    if sys.byteorder != "little":
        raise SetupError("handling tensors' bytes", found="a big-endian machine", expected="a little-endian one")
