"""Tensors over JSON: every datatype returns bit for bit; what does not fit is refused before anything is allocated."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from modelpress.errors import ServingError
from serving.protocol import (
    DATATYPES,
    InferRequest,
    RequestError,
    TensorSpec,
    TooLargeError,
    datatype_of,
    decode_request,
    decode_response,
    encode_mixed,
    encode_request,
    encode_response,
)
from serving.raw import as_strings, to_raw

X = TensorSpec("x", "FP32", ("batch", 2))
Y = TensorSpec("y", "FP32", ("batch",))


def elements(dtype: np.dtype[Any]) -> st.SearchStrategy[Any]:
    if dtype.kind == "O":
        return st.text(max_size=8).map(str.encode)
    options = {"allow_nan": False, "allow_infinity": False} if dtype.kind == "f" else {}
    return hnp.from_dtype(dtype, **options)


arrays = st.sampled_from(sorted(DATATYPES)).flatmap(
    lambda name: hnp.arrays(
        DATATYPES[name], hnp.array_shapes(min_dims=0, max_dims=4, max_side=4), elements=elements(DATATYPES[name])
    )
)


def tensor(**changes: Any) -> dict[str, Any]:
    return {"name": "x", "shape": [2, 2], "datatype": "FP32", "data": [1, 2.5, 3, 4]} | changes


def decode(document: Any, inputs: list[TensorSpec] | None = None) -> InferRequest:
    return decode_request(json.dumps(document).encode(), inputs or [X], [Y])


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and to_raw(one) == to_raw(other)


@given(arrays)
def test_every_datatype_returns_bit_for_bit(array: np.ndarray) -> None:
    spec = TensorSpec("x", datatype_of(array.dtype), (None,) * array.ndim)
    found = decode_request(encode_request({"x": array}, "7"), [spec], [Y])
    assert found.id == "7"
    assert same_bits(found.inputs["x"], array)
    answer = encode_response("m", "v", "7", {"x": array})
    assert same_bits(decode_response(answer)["x"], array)
    assert {key: json.loads(answer)[key] for key in ("model_name", "model_version", "id")} == {
        "model_name": "m",
        "model_version": "v",
        "id": "7",
    }


@given(arrays)
def test_nested_data_is_the_same_as_flat(array: np.ndarray) -> None:
    spec = TensorSpec("x", datatype_of(array.dtype), tuple(array.shape))
    texts = np.vectorize(bytes.decode, otypes=[object])(array) if array.dtype.kind == "O" else array
    nested = texts.tolist() if array.ndim else [texts.tolist()]
    body = {"name": "x", "shape": list(array.shape), "datatype": spec.datatype, "data": nested}
    assert same_bits(decode({"inputs": [body]}, [spec]).inputs["x"], array)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "z"}, "one of ['x']"),
        ({"name": 3}, "one of ['x']"),
        ({"datatype": "FP64"}, "FP32"),
        ({"datatype": None}, "FP32"),
        ({"datatype": ["FP32"]}, "FP32"),
        ({"shape": [4]}, "[-1, 2]"),
        ({"shape": [4, 1]}, "[-1, 2]"),
        ({"shape": [2, 2, 1]}, "[-1, 2]"),
        ({"shape": [-1, 2]}, "[-1, 2]"),
        ({"shape": [0, 2], "data": []}, "[-1, 2]"),
        ({"shape": [2.0, 2]}, "[-1, 2]"),
        ({"shape": [True, 2], "data": [1, 2]}, "[-1, 2]"),
        ({"shape": "2,2"}, "[-1, 2]"),
        ({"shape": None}, "[-1, 2]"),
        ({"data": [1, 2, 3]}, "4 for shape"),
        ({"data": []}, "4 for shape"),
        ({"data": None}, "a list"),
        ({"data": "1,2,3,4"}, "a list"),
        ({"data": [1, 2, 3, "4"]}, "numbers"),
        ({"data": [1, 2, 3, None]}, "numbers"),
        ({"data": [1, 2, 3, True]}, "numbers"),
        ({"data": [1, 2, 3, 1e300]}, "FP32 values"),
        ({"data": [[1, 2], [3]]}, "nested as [2, 2]"),
        ({"data": [[1, 2, 3, 4]]}, "nested as [2, 2]"),
        ({"data": [[1, 2], 3, 4]}, "nested as [2, 2]"),
        ({"data": [[[1], [2]], [[3], [4]]]}, "numbers"),
        ({"parameters": {"binary_data_size": 16}}, "one of them"),
        ({"parameters": {"classification": 3}}, "an extension that is not served"),
        ({"parameters": {"shared_memory_region": "x"}}, "an extension that is not served"),
        ({"parameters": 3}, "an object"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError) as caught:
        decode({"inputs": [tensor(**changes)]})
    assert said in (caught.value.expected or "")
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("datatype", "value"),
    [
        ("BOOL", 1),
        ("UINT8", 256),
        ("UINT8", -1),
        ("INT8", 128),
        ("INT64", 2**63),
        ("INT64", 1.5),
        ("INT64", 1.0),
        ("INT64", True),
        ("UINT64", 2**64),
        ("UINT64", -1),
        ("FP16", 70_000.0),
        ("FP32", -1e39),
        ("FP64", "1"),
    ],
)
def test_no_value_is_converted_in_silence(datatype: str, value: Any) -> None:
    spec = TensorSpec("x", datatype, (1,))
    with pytest.raises(RequestError):
        decode({"inputs": [tensor(shape=[1], datatype=datatype, data=[value])]}, [spec])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b"{}",
        b'{"inputs": []}',
        b'{"inputs": [3]}',
        b'{"inputs": {"x": 1}}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, NaN]}]}',
        b'{"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 1e999]}]}',
        b'{"id": 3, "inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}',
        b'{"outputs": [{"name": "z"}], "inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}',
        b'{"outputs": 3, "inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}',
    ],
    ids=lambda body: body[:40].decode("latin-1"),
)
def test_a_body_that_is_no_request_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError):
        decode_request(body, [X], [Y])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(["name", "shape", "datatype", "data", "parameters"]), json_values))
@settings(max_examples=300)
def test_any_tensor_is_decoded_or_refused(changes: dict[str, Any]) -> None:
    try:
        found = decode({"inputs": [tensor(**changes)]})
    except RequestError as error:
        length = len(str(error))
    else:
        length = 0
        assert found.inputs["x"].dtype == np.float32
        assert found.inputs["x"].shape[1] == 2
    assert length < 500


def test_a_claimed_shape_allocates_nothing() -> None:
    wide = TensorSpec("x", "FP64", (None, None))
    body = json.dumps({"inputs": [tensor(datatype="FP64", shape=[2**40, 2**62], data=[1.0])]}).encode()
    tracemalloc.start()
    with pytest.raises(RequestError, match="1 elements"):
        decode_request(body, [wide], [Y], max_tensor_bytes=2**200)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


def test_inputs_are_all_there_and_once() -> None:
    two = [X, TensorSpec("mask", "BOOL", ("batch",))]
    mask = {"name": "mask", "shape": [2], "datatype": "BOOL", "data": [True, False]}
    assert list(decode({"inputs": [tensor(), mask]}, two).inputs) == ["x", "mask"]
    with pytest.raises(RequestError, match="mask"):
        decode({"inputs": [tensor()]}, two)
    with pytest.raises(RequestError, match="twice"):
        decode({"inputs": [tensor(), tensor(), mask]}, two)


def test_axes_of_one_name_have_one_size() -> None:
    two = [X, TensorSpec("mask", "BOOL", ("batch",))]
    mask = {"name": "mask", "shape": [3], "datatype": "BOOL", "data": [True, False, True]}
    with pytest.raises(RequestError) as caught:
        decode({"inputs": [tensor(), mask]}, two)
    assert (caught.value.found, caught.value.expected) == ("batch 3", "batch 2, as in 'x'")


def test_outputs_are_those_asked_for() -> None:
    both = [Y, TensorSpec("z", "FP32", ("batch",))]
    body = {"inputs": [tensor()]}
    assert decode_request(json.dumps(body).encode(), [X], both).outputs == ["y", "z"]
    body["outputs"] = [{"name": "z"}]
    assert decode_request(json.dumps(body).encode(), [X], both).outputs == ["z"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_json_cannot_say_is_refused(value: float) -> None:
    with pytest.raises(RequestError, match="1 of 2 values"):
        encode_response("m", "v", None, {"y": np.array([0, value], np.float32)})


def test_what_the_protocol_has_no_name_for_is_refused() -> None:
    with pytest.raises(ServingError, match="complex64"):
        datatype_of(np.dtype(np.complex64))


def test_a_tensor_over_the_cap_is_refused_before_it_is_made() -> None:
    body = json.dumps({"inputs": [tensor(shape=[3, 2], data=[1] * 6)]}).encode()
    with pytest.raises(TooLargeError, match="24 bytes"):
        decode_request(body, [X], [Y], max_tensor_bytes=23)
    assert decode_request(body, [X], [Y], max_tensor_bytes=24).inputs["x"].nbytes == 24


def binary(array: np.ndarray, **changes: Any) -> tuple[bytes, int]:
    """A request whose one input lies behind its JSON, and the length of the JSON."""
    data = to_raw(array)
    size = {"binary_data_size": len(data)}
    one = {"name": "x", "shape": list(array.shape), "datatype": datatype_of(array.dtype), "parameters": size} | changes
    header = json.dumps({"inputs": [one]}).encode()
    return header + data, len(header)


@given(arrays)
def test_every_datatype_returns_bit_for_bit_as_binary_data(array: np.ndarray) -> None:
    spec = TensorSpec("x", datatype_of(array.dtype), (None,) * array.ndim)
    body, header_bytes = binary(array)
    assert same_bits(decode_request(body, [spec], [Y], header_bytes).inputs["x"], array)
    answer, header_bytes = encode_mixed("m", "v", None, {"x": array}, {"x"})
    assert header_bytes is not None
    assert json.loads(answer[:header_bytes])["outputs"][0]["parameters"] == {"binary_data_size": len(to_raw(array))}
    assert same_bits(decode_response(answer, header_bytes)["x"], array)


def test_json_and_binary_tensors_go_together() -> None:
    two = [TensorSpec("a", "FP32", (2,)), TensorSpec("b", "INT64", (1,)), TensorSpec("c", "FP16", (3,))]
    a, c = np.array([1, np.nan], np.float32), np.array([1, 2, 3], np.float16)
    header = json.dumps(
        {
            "inputs": [
                {"name": "c", "shape": [3], "datatype": "FP16", "parameters": {"binary_data_size": 6}},
                {"name": "b", "shape": [1], "datatype": "INT64", "data": [7]},
                {"name": "a", "shape": [2], "datatype": "FP32", "parameters": {"binary_data_size": 8}},
            ]
        }
    ).encode()
    found = decode_request(header + c.tobytes() + a.tobytes(), two, [Y], len(header)).inputs
    assert (found["a"].tobytes(), found["b"].tolist(), found["c"].tobytes()) == (a.tobytes(), [7], c.tobytes())
    assert all(array.flags.aligned for array in found.values())
    answer, length = encode_mixed("m", "v", None, {"a": a, "c": c}, {"a"})
    assert length is not None
    back = decode_response(answer, length)
    assert same_bits(back["a"], a)
    assert same_bits(back["c"], c)


@pytest.mark.parametrize(
    ("asked", "binary"),
    [
        ({}, set()),
        ({"parameters": {"binary_data_output": True}}, {"y", "z"}),
        ({"outputs": [{"name": "z", "parameters": {"binary_data": True}}, {"name": "y"}]}, {"z"}),
        (
            {
                "parameters": {"binary_data_output": True},
                "outputs": [{"name": "y", "parameters": {"binary_data": False}}, {"name": "z"}],
            },
            {"z"},
        ),
    ],
)
def test_which_outputs_are_asked_for_as_binary_data(asked: dict[str, Any], binary: set[str]) -> None:
    both = [Y, TensorSpec("z", "FP32", ("batch",))]
    found = decode_request(json.dumps({"inputs": [tensor()]} | asked).encode(), [X], both)
    assert found.binary == binary


ONE = np.ones((1, 2), np.float32)


@pytest.mark.parametrize(
    ("body", "header_bytes", "said"),
    [
        (binary(ONE)[0], None, "JSON object"),
        (binary(ONE)[0][: binary(ONE)[1]], None, "the bytes behind the JSON"),
        (binary(ONE)[0], 10**9, "length of its JSON"),
        (binary(ONE)[0], binary(ONE)[1] + 1, "JSON object"),
        (binary(ONE)[0] + b"x", binary(ONE)[1], "1 bytes behind"),
        (binary(ONE)[0][:-1], binary(ONE)[1], "bytes left"),
        (*binary(ONE, parameters={"binary_data_size": 4}), "8 for FP32"),
        (*binary(ONE, parameters={"binary_data_size": -1}), "a number of bytes"),
        (*binary(ONE, parameters={"binary_data_size": True}), "a number of bytes"),
        (*binary(ONE, parameters={"binary_data_size": 2**63}), "bytes left"),
        (*binary(ONE, data=[1, 2]), "one of them"),
        (*binary(ONE, shape=[2, 2]), "16 for FP32"),
    ],
    ids=str,
)
def test_binary_data_that_does_not_fit_is_named(body: bytes, header_bytes: int | None, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        decode_request(body, [X], [Y], header_bytes)
    assert said in str(caught.value)


@pytest.mark.parametrize("value", [3, "1", -1, True, 1.5])
def test_a_timeout_is_a_number_of_microseconds(value: Any) -> None:
    body = {"inputs": [tensor()], "parameters": {"timeout": value}}
    if value == 3 and value is not True:
        assert decode(body).timeout_seconds == pytest.approx(3e-6)
    else:
        with pytest.raises(RequestError, match="microseconds"):
            decode(body)


def test_bytes_that_are_no_text_ask_for_binary_data() -> None:
    with pytest.raises(RequestError, match="as binary"):
        encode_response("m", "v", None, {"y": as_strings([b"\xff"])})


@given(st.binary(max_size=120), st.integers(-2, 130))
@settings(max_examples=200)
def test_any_bytes_behind_a_header_are_decoded_or_refused(data: bytes, size: int) -> None:
    spec = TensorSpec("x", "BYTES", (None,))
    one = {"name": "x", "shape": [2], "datatype": "BYTES", "parameters": {"binary_data_size": size}}
    header = json.dumps({"inputs": [one]}).encode()
    try:
        found = decode_request(header + data, [spec], [Y], len(header)).inputs["x"]
    except RequestError:
        return
    assert to_raw(found) == data
