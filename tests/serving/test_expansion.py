"""How much memory JSON takes once it is read: never more than was reckoned before."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.expansion import MAX_JSON_BYTES, MOST_PER_BYTE, check_expansion, estimate
from serving.infer import MAX_BODY_BYTES
from serving.protocol import decode_request
from serving.refusals import TooLargeError
from serving.tensors import TensorSpec

SIZE = 60_000


def listed(part: str) -> bytes:
    """A list of so many of these that it has `SIZE` bytes."""
    return ("[" + ",".join([part] * (SIZE // (len(part) + 1))) + "]").encode()


def members(make: Any) -> bytes:
    return ("{" + ",".join(make(number) for number in range(SIZE // 10)) + "}").encode()


HOSTILE = {
    "zeros": listed("0"),
    "numbers": listed("999"),
    "floats": listed("1e9"),
    "empty lists": listed("[]"),
    "empty objects": listed("{}"),
    "lists of one": listed("[0]"),
    "objects of one": listed('{"":0}'),
    "lists of lists": listed("[[]]"),
    "strings": listed('"ab"'),
    "empty strings": listed('""'),
    "words": listed("null"),
    "wide strings": listed('"\\ud83d\\ude00' + "a" * 200 + '"'),
    "wide characters": listed('"\U0001f600' + "a" * 200 + '"'),
    "one wide string": json.dumps(["\U0001f600" + "a" * SIZE], ensure_ascii=False).encode(),
    "members": members(lambda number: f'"{number:x}":0'),
    "long members": members(lambda number: f'"{number:0100}":0'),
    "members of lists": members(lambda number: f'"{number:x}":[]'),
    "six members": listed('{"a":0,"b":0,"c":0,"d":0,"e":0,"f":0}'),
    "a deep list": listed("[" * 900 + "]" * 900),
    "a deep object": listed('{"":' * 900 + "0" + "}" * 900),
}


def taken(text: bytes) -> int:
    """Bytes of what it becomes, with a node of the parser's for each thing that could be a value.

    The parser asks for twelve times the text at once and touches what it uses: sixteen bytes for each value.
    """
    orjson.loads(text)  # what is kept for later calls is not this call's
    tracemalloc.start()
    try:
        found = orjson.loads(text)
        objects = tracemalloc.get_traced_memory()[0]
        del found
    finally:
        tracemalloc.stop()
    values = 1 + sum(text.count(one) for one in (b",", b":", b"[", b"{"))
    return objects + 16 * values


@pytest.mark.parametrize("kind", HOSTILE)
def test_no_kind_of_json_takes_more_than_was_reckoned(kind: str) -> None:
    text = HOSTILE[kind]
    assert taken(text) <= estimate(text) + 1000
    assert estimate(text) <= MOST_PER_BYTE * len(text) + 1000


def test_a_deeper_list_is_not_read_at_all() -> None:
    with pytest.raises(orjson.JSONDecodeError):
        orjson.loads(b"[" * 2000 + b"]" * 2000)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(max_size=8), inner, max_size=20),
    max_leaves=200,
)


@settings(max_examples=60, deadline=None)
@given(values)
def test_whatever_it_holds(value: Any) -> None:
    text = json.dumps([value] * 20, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:  # half of a pair is no text
        return
    assert taken(text) <= estimate(text) + 1000


def test_it_is_refused_before_it_is_read() -> None:
    text = b"[" + b"[]," * (MAX_BODY_BYTES // 3 - 1) + b"0]"
    assert len(text) <= MAX_BODY_BYTES
    tracemalloc.start()
    try:
        with pytest.raises(TooLargeError, match="binary data"):
            decode_request(text, [TensorSpec("x", "FP32", (None,))], [])
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("number", ["0.30000001192092896", "-1.5", "255"])
def test_numbers_by_the_million_are_read(number: str) -> None:
    many = min(4_000_000, MAX_BODY_BYTES // (len(number) + 1))
    check_expansion(b"[" + f"{number},".encode() * many + b"0]", MAX_JSON_BYTES)


def test_bytes_in_one_string_cost_what_they_are() -> None:
    check_expansion(b'{"inputs":[{"data":["' + b"A" * (MAX_BODY_BYTES - 30) + b'"]}]}', MAX_JSON_BYTES)


def test_small_bodies_are_not_counted() -> None:
    check_expansion(b"[" * 1000, 1000 * MOST_PER_BYTE)
    with pytest.raises(TooLargeError):
        check_expansion(b"[" * 1000, 1000 * 100)
