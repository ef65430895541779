"""Tensors and messages of the Open Inference Protocol v2, as JSON and as numpy arrays.

https://github.com/kserve/open-inference-protocol, `specification/protocol/inference_rest.md`. Nothing is converted in
silence: a float for an INT64, a number out of its type's range, a shape that does not fit its data are refused before
an array is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import orjson

from modelpress.errors import ServingError

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
}
"""v2 datatypes by name. BYTES (strings) is not served; see `TensorSpec`."""

_NAMES = {dtype: name for name, dtype in DATATYPES.items()}
_JSON_TYPES: dict[str, set[type]] = {"b": {bool}, "u": {int}, "i": {int}, "f": {int, float}}
_WORDS = {"b": "true or false", "u": "integers", "i": "integers", "f": "numbers"}


class RequestError(ServingError):
    """The request can't be answered, and its sender can mend it. What it says goes to the client."""

    status: ClassVar[int] = 400

    @property
    def told(self) -> str:
        """What the client reads, in one line."""
        text = f"{self.doing}: found {self.found}" if self.found else self.doing
        return f"{text}; expected {self.expected}" if self.expected else text


class NotServedError(RequestError):
    """No such model or version here."""

    status = 404


class TooLargeError(RequestError):
    """The body is over the cap."""

    status = 413


class NotReadyError(RequestError):
    """The model is known and not loaded; worth another try later."""

    status = 503


class BusyError(RequestError):
    """As many requests as may wait are waiting; worth another try soon."""

    status = 503


class SlowBodyError(RequestError):
    """The body did not arrive in time."""

    status = 408


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


@dataclass(frozen=True)
class InferRequest:
    """A decoded request: its id, the arrays by input name, and the names of the outputs asked for."""

    id: str | None
    inputs: dict[str, np.ndarray]
    outputs: list[str]


def datatype_of(dtype: np.dtype[Any]) -> str:
    """The v2 name of a numpy dtype.

    Raises:
        ServingError: v2's JSON has none.
    """
    if dtype not in _NAMES:
        raise ServingError("naming a datatype", found=str(dtype), expected=f"one of {', '.join(DATATYPES)}")
    return _NAMES[dtype]


def decode_request(body: bytes, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> InferRequest:
    """Decode and check an inference request against what the model takes and gives.

    Fields that the protocol doesn't name, and `parameters`, are not read.

    Raises:
        RequestError: not such a request; says which tensor and what it should have been.
    """
    document = _parse(body)
    request_id = document.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise RequestError("id", found=_kind(request_id), expected="a string")
    arrays: dict[str, np.ndarray] = {}
    specs = {spec.name: spec for spec in inputs}
    for tensor in _objects(document, "inputs"):
        name = _name(tensor, "inputs", specs)
        if name in arrays:
            raise RequestError(f"input {name!r}", found="twice", expected="once")
        arrays[name] = _decode_tensor(tensor, f"input {name!r}", specs[name])
    missing = sorted(set(specs) - set(arrays))
    if missing:
        raise RequestError("inputs", found=f"{sorted(arrays)}", expected=f"also {missing}")
    _check_named_axes(arrays, inputs)
    return InferRequest(request_id, arrays, _asked_outputs(document, outputs))


def encode_response(model: str, version: str, request_id: str | None, outputs: Mapping[str, np.ndarray]) -> bytes:
    """Encode an answer.

    Raises:
        RequestError: an output holds NaN or infinity, which JSON has no word for.
    """
    answer: dict[str, Any] = {"model_name": model, "model_version": version}
    if request_id is not None:
        answer["id"] = request_id
    answer["outputs"] = [_encode_tensor(name, array, f"output {name!r}") for name, array in outputs.items()]
    return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)


def encode_request(inputs: Mapping[str, np.ndarray], request_id: str | None = None) -> bytes:
    """The client's half: a request for all outputs.

    Raises:
        RequestError: an input holds NaN or infinity.
    """
    document: dict[str, Any] = {} if request_id is None else {"id": request_id}
    document["inputs"] = [_encode_tensor(name, array, f"input {name!r}") for name, array in inputs.items()]
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)


def decode_response(body: bytes) -> dict[str, np.ndarray]:
    """The client's half: outputs by name.

    Raises:
        RequestError: not such an answer.
    """
    arrays = {}
    for tensor in _objects(_parse(body), "outputs"):
        name, datatype, shape = (tensor.get(key) for key in ("name", "datatype", "shape"))
        if not (isinstance(name, str) and isinstance(datatype, str) and isinstance(shape, list)):
            raise RequestError("outputs", found=_kind(tensor), expected="name, datatype and shape")
        if datatype not in DATATYPES:
            raise RequestError("outputs", found=_short(datatype), expected=f"one of {', '.join(DATATYPES)}")
        arrays[name] = _decode_tensor(tensor, f"output {name!r}", TensorSpec(name, datatype, (None,) * len(shape)))
    return arrays


def _parse(body: bytes) -> dict[str, Any]:
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError("body", found=str(error), expected="a JSON object") from error
    if not isinstance(document, dict):
        raise RequestError("body", found=_kind(document), expected="a JSON object")
    return document


def _objects(document: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    found = document.get(key)
    if not isinstance(found, list) or not found or not all(isinstance(one, dict) for one in found):
        raise RequestError(key, found=_kind(found), expected="a list of one or more objects")
    return found


def _name(tensor: Mapping[str, Any], where: str, known: Iterable[str]) -> str:
    name = tensor.get("name")
    if not isinstance(name, str) or name not in known:
        raise RequestError(f"{where}: name", found=_short(name), expected=f"one of {sorted(known)}")
    _refuse_binary(tensor, f"{where}: {name!r}")
    return name


def _refuse_binary(tensor: Mapping[str, Any], where: str) -> None:
    parameters = tensor.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise RequestError(f"{where}: parameters", found=_kind(parameters), expected="an object")
    if parameters.get("binary_data_size") is not None or parameters.get("binary_data"):
        raise RequestError(
            f"{where}: parameters", found="binary tensor data", expected="data as JSON; the extension is not served"
        )


def _asked_outputs(document: Mapping[str, Any], outputs: Sequence[TensorSpec]) -> list[str]:
    known = [spec.name for spec in outputs]
    if document.get("outputs") is None:
        return known
    return list(dict.fromkeys(_name(tensor, "outputs", known) for tensor in _objects(document, "outputs")))


def _decode_tensor(tensor: Mapping[str, Any], where: str, spec: TensorSpec) -> np.ndarray:
    """Nothing is allocated before shape, datatype and number of elements are known to agree."""
    if tensor.get("datatype") != spec.datatype:
        raise RequestError(f"{where}: datatype", found=_short(tensor.get("datatype")), expected=spec.datatype)
    shape = _checked_shape(tensor.get("shape"), where, spec)
    flat = _flatten(tensor.get("data"), shape, where)
    if len(flat) != math.prod(shape):
        raise RequestError(
            f"{where}: data", found=f"{len(flat)} elements", expected=f"{math.prod(shape)} for shape {shape}"
        )
    dtype = DATATYPES[spec.datatype]
    if not set(map(type, flat)) <= _JSON_TYPES[dtype.kind]:
        wrong = next(value for value in flat if type(value) not in _JSON_TYPES[dtype.kind])
        raise RequestError(f"{where}: data", found=_short(wrong), expected=f"{_WORDS[dtype.kind]} for {spec.datatype}")
    try:
        with np.errstate(over="raise"):
            return np.array(flat, dtype=dtype).reshape(shape)
    except (OverflowError, FloatingPointError) as error:
        raise RequestError(
            f"{where}: data", found="a number out of range", expected=f"{spec.datatype} values"
        ) from error


def _checked_shape(found: Any, where: str, spec: TensorSpec) -> list[int]:
    expected = spec.to_json()["shape"]
    # bool is a subclass of int, and no size
    legal = isinstance(found, list) and len(found) == len(expected) and all(type(size) is int for size in found)
    if not legal or not all(size >= 1 and wanted in (-1, size) for size, wanted in zip(found, expected, strict=True)):
        raise RequestError(f"{where}: shape", found=_short(found), expected=f"{expected} (-1: any size from 1)")
    return list(found)


def _flatten(data: Any, shape: Sequence[int], where: str) -> list[Any]:
    """Row-major elements of data that is flat, or nested exactly like its shape."""
    if not isinstance(data, list):
        raise RequestError(f"{where}: data", found=_kind(data), expected="a list")
    if not data or not isinstance(data[0], list):
        return data
    rows = [data]
    for size in shape:
        if not all(isinstance(row, list) and len(row) == size for row in rows):
            raise RequestError(
                f"{where}: data", found="other nesting", expected=f"lists nested as {list(shape)}, or flat"
            )
        rows = list(chain.from_iterable(rows))
    return rows


def _check_named_axes(arrays: Mapping[str, np.ndarray], specs: Sequence[TensorSpec]) -> None:
    """Axes of one name have one size in all inputs."""
    sizes: dict[str, tuple[int, str]] = {}
    for spec in specs:
        for axis, size in zip(spec.shape, arrays[spec.name].shape, strict=True):
            if isinstance(axis, str) and sizes.setdefault(axis, (size, spec.name))[0] != size:
                first, other = sizes[axis]
                raise RequestError(
                    f"input {spec.name!r}: shape", found=f"{axis} {size}", expected=f"{axis} {first}, as in {other!r}"
                )


def _encode_tensor(name: str, array: np.ndarray, where: str) -> dict[str, Any]:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        count = int(array.size - np.isfinite(array).sum())
        raise RequestError(
            f"{where}: data",
            found=f"{count} of {array.size} values NaN or infinite",
            expected="finite numbers: JSON has no others",
        )
    datatype = datatype_of(array.dtype)
    return {"name": name, "datatype": datatype, "shape": list(array.shape), "data": np.ascontiguousarray(array).ravel()}


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "nothing"}
    return kinds.get(type(value), "a number")


def _short(value: Any) -> str:
    """A client's value in an error message: never long."""
    text = repr(value) if value is not None else "nothing"
    return text if len(text) <= 80 else f"{text[:77]}..."
