"""Tensors of gRPC's messages: raw and typed contents, and what is refused as over REST."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from serving.protocol import DATATYPES, RequestError, TensorSpec, datatype_of
from serving.raw import to_raw
from serving.rpc.messages import MESSAGES
from serving.rpc.tensors import _FIELDS, decode, encode
from tests.serving.test_protocol import elements, same_bits

X, Y = TensorSpec("x", "FP32", ("batch", 2)), TensorSpec("y", "FP32", ("batch",))
CAP = 10**6

arrays = st.sampled_from(sorted(DATATYPES)).flatmap(
    lambda name: hnp.arrays(
        DATATYPES[name], hnp.array_shapes(min_dims=0, max_dims=3, max_side=4), elements=elements(DATATYPES[name])
    )
)


def request(array: np.ndarray, *, raw: bool, **more: Any) -> Any:
    made = MESSAGES["ModelInferRequest"](model_name="m", **more)
    datatype = datatype_of(array.dtype)
    tensor = made.inputs.add(name="x", datatype=datatype, shape=array.shape)
    if raw:
        made.raw_input_contents.append(to_raw(array))
    elif datatype in _FIELDS:
        getattr(tensor.contents, _FIELDS[datatype]).extend(array.ravel().tolist())
    return made


@given(arrays, st.booleans())
def test_every_datatype_goes_in_and_out_bit_for_bit(array: np.ndarray, raw: bool) -> None:
    spec = TensorSpec("x", datatype_of(array.dtype), (None,) * array.ndim)
    raw = raw or spec.datatype == "FP16"
    sent = MESSAGES["ModelInferRequest"].FromString(request(array, raw=raw, id="7").SerializeToString())
    asked = decode(sent, [spec], [TensorSpec("x", spec.datatype, spec.shape)], CAP)
    assert asked.id == "7"
    assert same_bits(asked.inputs["x"], array)
    answer = encode("m", "v", asked, {"x": array})
    assert bool(answer.raw_output_contents) == raw
    back = MESSAGES["ModelInferRequest"](model_name="m", raw_input_contents=answer.raw_output_contents)
    tensor = back.inputs.add()
    tensor.ParseFromString(answer.outputs[0].SerializeToString())  # outputs are laid out as inputs are
    assert same_bits(decode(back, [spec], [Y], CAP).inputs["x"], array)


ONE = np.ones((1, 2), np.float32)


def changed(**changes: Any) -> Any:
    made = request(ONE, raw=False)
    for name, value in changes.items():
        if name == "shape":
            made.inputs[0].shape[:] = value
        else:
            setattr(made.inputs[0], name, value)
    return made


def with_parameter(where: str, name: str, **value: Any) -> Any:
    made = request(ONE, raw=True)
    holder = made if where == "request" else made.inputs[0] if where == "input" else made.outputs.add(name="y")
    for field, content in value.items():
        setattr(holder.parameters[name], field, content)
    return made


def doubled() -> Any:
    made = request(ONE, raw=False)
    made.inputs.append(made.inputs[0])
    return made


def both() -> Any:
    made = request(ONE, raw=False)
    made.raw_input_contents.append(to_raw(ONE))
    return made


def wide(value: int) -> Any:
    made = request(np.ones((1, 2), np.int8), raw=False)
    made.inputs[0].contents.int_contents[0] = value
    return made


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (MESSAGES["ModelInferRequest"](), "also ['x']"),
        (changed(name="z"), "one of ['x']"),
        (changed(datatype="FP64"), "FP32"),
        (changed(shape=[2, 2]), "4 in fp32_contents"),
        (changed(shape=[-1, 2]), "[-1, 2]"),
        (changed(shape=[2**40, 2]), "at most"),
        (doubled(), "once"),
        (both(), "one of them"),
        (MESSAGES["ModelInferRequest"](raw_input_contents=[b""]), "0 or none"),
        (with_parameter("output", "classification", int64_param=3), "not served"),
        (with_parameter("input", "shared_memory_region", string_param="x"), "not served"),
        (with_parameter("request", "timeout", string_param="1"), "microseconds"),
        (with_parameter("request", "timeout", int64_param=-1), "microseconds"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(made: Any, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        decode(made, [X], [Y], CAP)
    assert said in str(caught.value)


def test_a_number_out_of_its_type_s_range_is_refused() -> None:
    spec = TensorSpec("x", "INT8", (1, 2))
    assert decode(wide(-128), [spec], [Y], CAP).inputs["x"].tolist() == [[-128, 1]]
    with pytest.raises(RequestError, match="out of range"):
        decode(wide(128), [spec], [Y], CAP)


def test_half_floats_go_as_raw_contents() -> None:
    with pytest.raises(RequestError, match="raw contents"):
        decode(request(ONE.astype(np.float16), raw=False), [TensorSpec("x", "FP16", (1, 2))], [Y], CAP)


def test_a_timeout_counts_in_microseconds() -> None:
    made = with_parameter("request", "timeout", int64_param=2_000_000)
    assert decode(made, [X], [Y], CAP).timeout_seconds == 2.0
    assert decode(with_parameter("request", "timeout", uint64_param=0), [X], [Y], CAP).timeout_seconds is None


@given(st.binary(max_size=200))
def test_any_message_is_decoded_or_refused(data: bytes) -> None:
    try:
        made = MESSAGES["ModelInferRequest"].FromString(data)
    except DecodeError:
        return
    with pytest.raises(RequestError):
        decode(made, [X], [Y], CAP)
