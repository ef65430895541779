"""Tensors and messages of the Open Inference Protocol v2, as JSON with binary tensor data, and as numpy arrays.

https://github.com/kserve/open-inference-protocol, `specification/protocol/inference_rest.md`; for the bytes after the
JSON see `serving.raw`. Nothing is converted in silence: a float for an INT64, a number out of its type's range, a shape
that does not fit its data are refused before an array is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import orjson

from serving.expansion import MAX_JSON_BYTES, check_expansion
from serving.raw import BYTES, as_strings, from_raw, to_raw
from serving.refusals import (
    BusyError,
    DeadlineError,
    EncodingError,
    NotReadyError,
    NotServedError,
    RequestError,
    SlowBodyError,
    TooLargeError,
)
from serving.tensors import (
    DATATYPES,
    MAX_TENSOR_BYTES,
    TensorSpec,
    check_named_axes,
    check_shape,
    datatype_of,
    kind,
    short,
)

__all__ = [
    "BYTES",
    "DATATYPES",
    "MAX_TENSOR_BYTES",
    "BusyError",
    "DeadlineError",
    "EncodingError",
    "InferRequest",
    "NotReadyError",
    "NotServedError",
    "RequestError",
    "SlowBodyError",
    "TensorSpec",
    "TooLargeError",
    "checked_inputs",
    "checked_outputs",
    "datatype_of",
    "decode_request",
    "decode_response",
    "encode_mixed",
    "encode_request",
    "encode_response",
]


_JSON_TYPES: dict[str, set[type]] = {"b": {bool}, "u": {int}, "i": {int}, "f": {int, float}, "O": {str}}
_WORDS = {"b": "true or false", "u": "integers", "i": "integers", "f": "numbers", "O": "strings"}
_OTHER_EXTENSIONS = ("classification", "shared_memory_region")
"""Parameters that would change the answer, or say where a tensor lies; they are refused, not passed over."""


@dataclass(frozen=True)
class InferRequest:
    """A decoded request."""

    id: str | None
    """The client's own name for it; comes back with the answer."""
    inputs: dict[str, np.ndarray]
    """Arrays by input name."""
    outputs: list[str]
    """Names of the outputs asked for."""
    binary: frozenset[str] = frozenset()
    """Those of them that are asked for as binary data."""
    timeout_seconds: float | None = None
    """From its parameter `timeout` (microseconds): an answer after this is of no use."""


def decode_request(
    body: bytes,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    header_bytes: int | None = None,
    *,
    max_tensor_bytes: int = MAX_TENSOR_BYTES,
    max_json_bytes: int = MAX_JSON_BYTES,
) -> InferRequest:
    """Decode and check an inference request against what the model takes and gives.

    Fields that the protocol doesn't name are not read, nor `parameters` but those of the binary
    extension and `timeout`.

    Args:
        body: JSON, and behind it the binary data of the inputs that have some, in their order.
        inputs: what the model takes.
        outputs: what it gives.
        header_bytes: length of the JSON (Inference-Header-Content-Length); None: there is nothing behind it.
        max_tensor_bytes: an input that is larger, decoded, is refused.
        max_json_bytes: JSON whose objects would take more is refused, unread.

    Raises:
        RequestError: not such a request; says which tensor and what it should have been.
    """
    blobs = _Blobs(body, header_bytes)
    check_expansion(blobs.header, max_json_bytes)
    document = _parse(blobs.header)
    request_id = document.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise RequestError("id", found=kind(request_id), expected="a string")
    named = [
        (tensor.get("name"), partial(_decode_tensor, tensor, blobs, max_tensor_bytes))
        for tensor in _objects(document, "inputs")
    ]
    arrays = checked_inputs(named, inputs)
    blobs.check_end()
    asked, binary = _asked_outputs(document, outputs)
    return InferRequest(request_id, arrays, asked, binary, _timeout(_parameters(document, "request")))


def checked_inputs(
    named: Iterable[tuple[Any, Callable[[TensorSpec], np.ndarray]]], specs: Sequence[TensorSpec]
) -> dict[str, np.ndarray]:
    """All inputs of a model, each once; what makes an array is called when its name is known.

    Raises:
        RequestError: one is missing, there twice, not known, or their sizes don't go together.
    """
    arrays: dict[str, np.ndarray] = {}
    known = {spec.name: spec for spec in specs}
    for found, make in named:
        name = _known(found, "inputs", known)
        if name in arrays:
            raise RequestError(f"input {name!r}", found="twice", expected="once")
        arrays[name] = make(known[name])
    missing = sorted(set(known) - set(arrays))
    if missing:
        raise RequestError("inputs", found=f"{sorted(arrays)}", expected=f"also {missing}")
    check_named_axes(arrays, specs)
    return arrays


def checked_outputs(asked: Iterable[Any] | None, specs: Sequence[TensorSpec]) -> list[str]:
    """Names of the outputs asked for, each once; all where None are.

    Raises:
        RequestError: one is not known.
    """
    known = [spec.name for spec in specs]
    return known if asked is None else list(dict.fromkeys(_known(name, "outputs", known) for name in asked))


def encode_response(model: str, version: str, request_id: str | None, outputs: Mapping[str, np.ndarray]) -> bytes:
    """Encode an answer as JSON.

    Raises:
        RequestError: an output holds NaN or infinity, or bytes that are no text, which JSON has no word for.
    """
    return encode_mixed(model, version, request_id, outputs, ())[0]


def encode_mixed(
    model: str, version: str, request_id: str | None, outputs: Mapping[str, np.ndarray], binary: Collection[str]
) -> tuple[bytes, int | None]:
    """An answer with the outputs of `binary` as bytes behind its JSON, and the length of the JSON; None: all is JSON.

    Raises:
        RequestError: an output that is not binary holds what JSON has no word for.
    """
    answer: dict[str, Any] = {"model_name": model, "model_version": version}
    if request_id is not None:
        answer["id"] = request_id
    tensors, blobs = [], []
    for name, array in outputs.items():
        if name in binary:
            blobs.append(to_raw(array))
            tensors.append(_described(name, array) | {"parameters": {"binary_data_size": len(blobs[-1])}})
        else:
            tensors.append(_encode_tensor(name, array, f"output {name!r}"))
    answer["outputs"] = tensors
    header = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
    return (b"".join((header, *blobs)), len(header)) if blobs else (header, None)


def encode_request(inputs: Mapping[str, np.ndarray], request_id: str | None = None) -> bytes:
    """The client's half: a request for all outputs, as JSON.

    Raises:
        RequestError: an input holds NaN or infinity.
    """
    document: dict[str, Any] = {} if request_id is None else {"id": request_id}
    document["inputs"] = [_encode_tensor(name, array, f"input {name!r}") for name, array in inputs.items()]
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)


def decode_response(body: bytes, header_bytes: int | None = None) -> dict[str, np.ndarray]:
    """The client's half: outputs by name; `header_bytes` as in `decode_request`.

    Raises:
        RequestError: not such an answer.
    """
    arrays = {}
    blobs = _Blobs(body, header_bytes)
    for tensor in _objects(_parse(blobs.header), "outputs"):
        name, datatype, shape = (tensor.get(key) for key in ("name", "datatype", "shape"))
        if not (isinstance(name, str) and isinstance(datatype, str) and isinstance(shape, list)):
            raise RequestError("outputs", found=kind(tensor), expected="name, datatype and shape")
        if datatype not in DATATYPES:
            raise RequestError("outputs", found=short(datatype), expected=f"one of {', '.join(DATATYPES)}")
        spec = TensorSpec(name, datatype, (None,) * len(shape))
        arrays[name] = _decode_tensor(tensor, blobs, MAX_TENSOR_BYTES, spec, "output")
    blobs.check_end()
    return arrays


class _Blobs:
    """The bytes behind the JSON of a message, taken one tensor after the other."""

    def __init__(self, body: bytes, header_bytes: int | None) -> None:
        if header_bytes is not None and header_bytes > len(body):
            found = f"{header_bytes}, of a body of {len(body)} bytes"
            raise RequestError("inference-header-content-length", found=found, expected="the length of its JSON")
        self.header = body if header_bytes is None else body[:header_bytes]
        self._rest = memoryview(body)[len(self.header) :]
        self._announced = header_bytes is not None

    def take(self, size: Any, where: str) -> memoryview:
        if type(size) is not int or size < 0:
            raise RequestError(f"{where}: binary_data_size", found=short(size), expected="a number of bytes")
        if not self._announced:
            raise RequestError(
                f"{where}: binary_data_size",
                found="no header Inference-Header-Content-Length",
                expected="the length of the JSON in it, and the bytes behind the JSON",
            )
        if size > len(self._rest):
            raise RequestError(
                f"{where}: binary_data_size", found=short(size), expected=f"at most the {len(self._rest)} bytes left"
            )
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken

    def check_end(self) -> None:
        if len(self._rest):
            found = f"{len(self._rest)} bytes behind the tensors"
            raise RequestError("body", found=found, expected="the sum of all binary_data_size")


def _parse(body: bytes) -> dict[str, Any]:
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError("body", found=str(error), expected="a JSON object") from error
    if not isinstance(document, dict):
        raise RequestError("body", found=kind(document), expected="a JSON object")
    return document


def _objects(document: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    found = document.get(key)
    if not isinstance(found, list) or not found or not all(isinstance(one, dict) for one in found):
        raise RequestError(key, found=kind(found), expected="a list of one or more objects")
    return found


def _known(name: Any, where: str, known: Collection[str]) -> str:
    if not isinstance(name, str) or name not in known:
        raise RequestError(f"{where}: name", found=short(name), expected=f"one of {sorted(known)}")
    return name


def _parameters(holder: Mapping[str, Any], where: str) -> dict[str, Any]:
    parameters = holder.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise RequestError(f"{where}: parameters", found=kind(parameters), expected="an object")
    for name in _OTHER_EXTENSIONS:
        if parameters.get(name):
            raise RequestError(f"{where}: parameters", found=name, expected="none of an extension that is not served")
    return parameters


def _flag(parameters: Mapping[str, Any], name: str, where: str, default: bool) -> bool:
    found = parameters.get(name, default)
    if not isinstance(found, bool):
        raise RequestError(f"{where}: {name}", found=short(found), expected="true or false")
    return found


def _timeout(parameters: Mapping[str, Any]) -> float | None:
    found = parameters.get("timeout")
    if found is None or found == 0:
        return None
    if type(found) is not int or found < 0:
        raise RequestError("request: timeout", found=short(found), expected="microseconds, an integer from 1")
    return found / 1e6


def _asked_outputs(document: Mapping[str, Any], outputs: Sequence[TensorSpec]) -> tuple[list[str], frozenset[str]]:
    """Names of the outputs asked for, and of those that are asked for as binary data."""
    all_binary = _flag(_parameters(document, "request"), "binary_data_output", "request", False)
    if document.get("outputs") is None:
        known = checked_outputs(None, outputs)
        return known, frozenset(known if all_binary else ())
    tensors = _objects(document, "outputs")
    asked = checked_outputs([tensor.get("name") for tensor in tensors], outputs)
    binary = set()
    for tensor in tensors:
        where = f"output {tensor['name']!r}"
        if _flag(_parameters(tensor, where), "binary_data", where, all_binary):
            binary.add(tensor["name"])
    return asked, frozenset(binary)


def _decode_tensor(
    tensor: Mapping[str, Any], blobs: _Blobs, max_tensor_bytes: int, spec: TensorSpec, side: str = "input"
) -> np.ndarray:
    """Nothing is allocated before shape, datatype and number of elements are known to agree."""
    where = f"{side} {spec.name!r}"
    if tensor.get("datatype") != spec.datatype:
        raise RequestError(f"{where}: datatype", found=short(tensor.get("datatype")), expected=spec.datatype)
    shape = check_shape(tensor.get("shape"), where, spec, max_tensor_bytes)
    dtype = DATATYPES[spec.datatype]
    size = _parameters(tensor, where).get("binary_data_size")
    if size is not None:
        if "data" in tensor:
            raise RequestError(f"{where}: data", found="both JSON and binary data", expected="one of them")
        return from_raw(blobs.take(size, where), spec.datatype, dtype, shape, where)
    flat = _flatten(tensor.get("data"), shape, where)
    if len(flat) != math.prod(shape):
        raise RequestError(
            f"{where}: data", found=f"{len(flat)} elements", expected=f"{math.prod(shape)} for shape {shape}"
        )
    if not set(map(type, flat)) <= _JSON_TYPES[dtype.kind]:
        wrong = next(value for value in flat if type(value) not in _JSON_TYPES[dtype.kind])
        raise RequestError(f"{where}: data", found=short(wrong), expected=f"{_WORDS[dtype.kind]} for {spec.datatype}")
    if dtype.kind == "O":
        return as_strings([one.encode() for one in flat]).reshape(shape)
    try:
        with np.errstate(over="raise"):
            return np.array(flat, dtype=dtype).reshape(shape)
    except (OverflowError, FloatingPointError) as error:
        raise RequestError(
            f"{where}: data", found="a number out of range", expected=f"{spec.datatype} values"
        ) from error


def _flatten(data: Any, shape: Sequence[int], where: str) -> list[Any]:
    """Row-major elements of data that is flat, or nested exactly like its shape."""
    if not isinstance(data, list):
        raise RequestError(f"{where}: data", found=kind(data), expected="a list")
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


def _described(name: str, array: np.ndarray) -> dict[str, Any]:
    return {"name": name, "datatype": datatype_of(array.dtype), "shape": list(array.shape)}


def _encode_tensor(name: str, array: np.ndarray, where: str) -> dict[str, Any]:
    if array.dtype.kind == "O":
        try:
            return _described(name, array) | {"data": [one.decode() for one in array.ravel().tolist()]}
        except UnicodeDecodeError as error:
            raise RequestError(
                f"{where}: data", found="bytes that are no UTF-8", expected="text, or the output asked for as binary"
            ) from error
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        count = int(array.size - np.isfinite(array).sum())
        raise RequestError(
            f"{where}: data",
            found=f"{count} of {array.size} values NaN or infinite",
            expected="finite numbers: JSON has no others; ask for the output as binary data",
        )
    return _described(name, array) | {"data": np.ascontiguousarray(array).ravel()}
