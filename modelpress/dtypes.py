"""The dtypes that a pack can hold, by their safetensors names. Imports nothing, so that a manifest is read anywhere."""

from __future__ import annotations

from math import prod
from typing import NamedTuple


class DType(NamedTuple):
    """A dtype: bytes of an element, and whether its bits are sign, exponent, mantissa (from the most significant)."""

    name: str
    itemsize: int
    is_float: bool


DTYPES = {
    dtype.name: dtype
    for dtype in (
        DType("BOOL", 1, False),
        DType("U8", 1, False),
        DType("I8", 1, False),
        DType("F8_E4M3", 1, True),
        DType("F8_E4M3FNUZ", 1, True),
        DType("F8_E5M2", 1, True),
        DType("F8_E5M2FNUZ", 1, True),
        DType("U16", 2, False),
        DType("I16", 2, False),
        DType("F16", 2, True),
        DType("BF16", 2, True),
        DType("U32", 4, False),
        DType("I32", 4, False),
        DType("F32", 4, True),
        DType("U64", 8, False),
        DType("I64", 8, False),
        DType("F64", 8, True),
    )
}


def raw_size(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of this dtype name and shape, uncompressed."""
    return prod(shape) * DTYPES[dtype].itemsize
