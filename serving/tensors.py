"""What a tensor of the protocol may be: its datatype, its shape, and how much of it there may be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modelpress.errors import ServingError
from serving.raw import BYTES
from serving.refusals import RequestError, TooLargeError

MAX_TENSOR_BYTES = 64 * 2**20
"""A tensor that claims more is refused before anything is allocated for it; JSON can claim more than it sends."""

DATATYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    BYTES: np.dtype(object),
}
"""v2 datatypes by name. Elements of BYTES are `bytes`."""

_NAMES = {dtype: name for name, dtype in DATATYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a model: v2 datatype and shape, with axes that may differ per call by name (or None)."""

    name: str
    datatype: str
    shape: tuple[int | str | None, ...]

    def to_json(self) -> dict[str, Any]:
        """As in the metadata: −1 for an axis that may differ per call."""
        shape = [size if isinstance(size, int) else -1 for size in self.shape]
        return {"name": self.name, "datatype": self.datatype, "shape": shape}


def datatype_of(dtype: np.dtype[Any]) -> str:
    """The v2 name of a numpy dtype.

    Raises:
        ServingError: v2's JSON has none.
    """
    if dtype not in _NAMES:
        raise ServingError("naming a datatype", found=str(dtype), expected=f"one of {', '.join(DATATYPES)}")
    return _NAMES[dtype]


def check_shape(found: Any, where: str, spec: TensorSpec, max_tensor_bytes: int) -> list[int]:
    """A shape that fits the spec's and is not too large.

    Raises:
        RequestError: it does not fit.
        TooLargeError: so many elements would take more than `max_tensor_bytes`.
    """
    if not _fits(found, spec.shape):
        expected = f"{spec.to_json()['shape']} (-1: any size from 1)"
        raise RequestError(f"{where}: shape", found=short(found), expected=expected)
    size = math.prod(found) * DATATYPES[spec.datatype].itemsize
    if size > max_tensor_bytes:
        most = f"at most {max_tensor_bytes}"
        raise TooLargeError(f"{where}: shape", found=f"{short(found)}, {short(size)} bytes", expected=most)
    return list(found)


def _fits(found: Any, shape: tuple[int | str | None, ...]) -> bool:
    if not isinstance(found, list) or len(found) != len(shape):
        return False
    # bool is a subclass of int, and no size
    return all(
        type(size) is int and size >= 1 and (size == axis or not isinstance(axis, int))
        for size, axis in zip(found, shape, strict=True)
    )


def check_named_axes(arrays: Mapping[str, np.ndarray], specs: Sequence[TensorSpec]) -> None:
    """Axes of one name have one size in all inputs.

    Raises:
        RequestError: they have several.
    """
    sizes: dict[str, tuple[int, str]] = {}
    for spec in specs:
        for axis, size in zip(spec.shape, arrays[spec.name].shape, strict=True):
            if isinstance(axis, str) and sizes.setdefault(axis, (size, spec.name))[0] != size:
                first, other = sizes[axis]
                raise RequestError(
                    f"input {spec.name!r}: shape", found=f"{axis} {size}", expected=f"{axis} {first}, as in {other!r}"
                )


def kind(value: Any) -> str:
    """What a value of JSON is, in words."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "nothing"}
    return kinds.get(type(value), "a number")


def short(value: Any) -> str:
    """A client's value in an error message: never long."""
    text = repr(value) if value is not None else "nothing"
    return text if len(text) <= 80 else f"{text[:77]}..."
