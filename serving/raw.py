"""Tensors as bytes: the binary tensor data extension of REST and the raw contents of gRPC.

Row-major, little-endian, nothing between the elements; a BOOL is one byte, 0 or 1; an element of BYTES is its length in
four bytes and then itself. https://github.com/triton-inference-server/server,
`docs/protocol/extension_binary_data.md`.
"""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from serving.refusals import RequestError

BYTES = "BYTES"
"""Datatype of strings of bytes; as an array, of dtype object and elements `bytes`."""
_LENGTH = struct.Struct("<I")
_SWAPPED = sys.byteorder != "little"


def from_raw(data: memoryview, datatype: str, dtype: np.dtype[Any], shape: Sequence[int], where: str) -> np.ndarray:
    """An array of `shape` over raw bytes; it shares their memory where that is aligned, and may be read only.

    Raises:
        RequestError: they are not the bytes of so many elements.
    """
    count = math.prod(shape)
    if datatype == BYTES:
        return _strings(data, count, where).reshape(shape)
    if data.nbytes != count * dtype.itemsize:
        expected = f"{count * dtype.itemsize} for {datatype} of shape {list(shape)}"
        raise RequestError(f"{where}: data", found=f"{data.nbytes} bytes", expected=expected)
    if dtype.kind == "b" and count and np.frombuffer(data, np.uint8).max() > 1:
        raise RequestError(f"{where}: data", found="a byte that is neither 0 nor 1", expected="one of them for BOOL")
    array = np.frombuffer(data, dtype)
    if _SWAPPED:
        array = array.byteswap()
    # ONNX Runtime reads it in place, and a kernel may count on the alignment of its type.
    return (array if array.flags.aligned else array.copy()).reshape(shape)


def to_raw(array: np.ndarray) -> bytes:
    """The bytes of an array."""
    if array.dtype.kind == "O":
        return b"".join(_LENGTH.pack(len(one)) + one for one in array.ravel().tolist())
    return (array.byteswap() if _SWAPPED else array).tobytes()


def _strings(data: memoryview, count: int, where: str) -> np.ndarray:
    """`count` elements of BYTES; each takes four bytes at least, so that nothing is made for a claim alone."""
    if data.nbytes < count * _LENGTH.size:
        found, expected = f"{data.nbytes} bytes", f"{count} elements of four bytes and more"
        raise RequestError(f"{where}: data", found=found, expected=expected)
    elements, at = [], 0
    for number in range(count):
        end = at + _LENGTH.size
        length = _LENGTH.unpack_from(data, at)[0] if end <= data.nbytes else -1
        if length < 0 or end + length > data.nbytes:
            expected = "a length in four bytes, little-endian, and as many bytes"
            raise RequestError(f"{where}: data", found=f"element {number} cut short", expected=expected)
        elements.append(bytes(data[end : end + length]))
        at = end + length
    if at != data.nbytes:
        found = f"{data.nbytes - at} bytes after the last element"
        raise RequestError(f"{where}: data", found=found, expected=f"{count} elements")
    return as_strings(elements)


def as_strings(elements: Sequence[bytes]) -> np.ndarray:
    """A flat array of strings of bytes; numpy would take a list of them for another dtype."""
    array = np.empty(len(elements), object)
    array[:] = elements
    return array
