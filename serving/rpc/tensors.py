"""Requests and answers of gRPC as numpy arrays, with the checks that REST's go through."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from serving.protocol import InferRequest, checked_inputs, checked_outputs
from serving.raw import as_strings, from_raw, to_raw
from serving.refusals import RequestError
from serving.rpc.messages import MESSAGES
from serving.tensors import DATATYPES, TensorSpec, check_shape, datatype_of, short

_FIELDS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""Field of InferTensorContents by datatype; FP16 has none."""
_OTHER_EXTENSIONS = ("classification", "shared_memory_region")


def decode(
    request: Any, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], max_tensor_bytes: int
) -> InferRequest:
    """Decode and check a ModelInferRequest against what the model takes and gives.

    Raises:
        RequestError: not such a request; says which tensor and what it should have been.
    """
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise RequestError("raw_input_contents", found=f"{len(raw)} entries", expected=f"{len(request.inputs)} or none")
    named: list[tuple[Any, Callable[[TensorSpec], np.ndarray]]] = []
    for number, tensor in enumerate(request.inputs):
        data = raw[number] if raw else None
        named.append((tensor.name, partial(_array, tensor, data, max_tensor_bytes)))
    arrays = checked_inputs(named, inputs)
    for output in request.outputs:
        _refuse_extensions(output.parameters, f"output {short(output.name)}")
    asked = checked_outputs([output.name for output in request.outputs] or None, outputs)
    return InferRequest(
        request.id or None,
        arrays,
        asked,
        frozenset(asked if raw else ()),
        timeout_seconds=_timeout(request.parameters),
    )


def encode(name: str, pack: str, asked: InferRequest, outputs: Mapping[str, np.ndarray]) -> Any:
    """A ModelInferResponse: raw where the request was, and where a type has no field of its own."""
    answer = MESSAGES["ModelInferResponse"](model_name=name, model_version=pack, id=asked.id or "")
    raw = bool(asked.binary) or any(datatype_of(array.dtype) not in _FIELDS for array in outputs.values())
    for output, array in outputs.items():
        datatype = datatype_of(array.dtype)
        tensor = answer.outputs.add(name=output, datatype=datatype, shape=array.shape)
        if raw:
            answer.raw_output_contents.append(to_raw(array))
        else:
            getattr(tensor.contents, _FIELDS[datatype]).extend(array.ravel().tolist())
    return answer


def _array(tensor: Any, raw: bytes | None, max_tensor_bytes: int, spec: TensorSpec) -> np.ndarray:
    where = f"input {spec.name!r}"
    if tensor.datatype != spec.datatype:
        raise RequestError(f"{where}: datatype", found=short(tensor.datatype), expected=spec.datatype)
    _refuse_extensions(tensor.parameters, where)
    shape = check_shape(list(tensor.shape), where, spec, max_tensor_bytes)
    dtype = DATATYPES[spec.datatype]
    if raw is not None:
        if tensor.HasField("contents"):
            raise RequestError(f"{where}: contents", found="raw contents as well", expected="one of them")
        return from_raw(memoryview(raw), spec.datatype, dtype, shape, where)
    if spec.datatype not in _FIELDS:
        raise RequestError(f"{where}: contents", found=f"no raw contents for {spec.datatype}", expected="raw contents")
    found = getattr(tensor.contents, _FIELDS[spec.datatype])
    if len(found) != math.prod(shape):
        expected = f"{math.prod(shape)} in {_FIELDS[spec.datatype]} for shape {shape}"
        raise RequestError(f"{where}: contents", found=f"{len(found)} elements", expected=expected)
    if dtype.kind == "O":
        return as_strings(list(found)).reshape(shape)
    try:
        return np.array(list(found), dtype).reshape(shape)
    except OverflowError as error:
        raise RequestError(
            f"{where}: contents", found="a number out of range", expected=f"{spec.datatype} values"
        ) from error


def _refuse_extensions(parameters: Any, where: str) -> None:
    for name in _OTHER_EXTENSIONS:
        if name in parameters:
            raise RequestError(f"{where}: parameters", found=name, expected="none of an extension that is not served")


def _timeout(parameters: Any) -> float | None:
    if "timeout" not in parameters:
        return None
    choice = parameters["timeout"].WhichOneof("parameter_choice")
    found = getattr(parameters["timeout"], choice) if choice in ("int64_param", "uint64_param") else None
    if found is None or found < 0:
        raise RequestError("request: timeout", found=short(found), expected="microseconds, an integer from 1")
    return found / 1e6 if found else None
