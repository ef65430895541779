"""Strict JSON: what two readers could read in two ways is refused, in time that grows with the length."""

from __future__ import annotations

import time

import pytest

from modelpress.errors import CorruptionError
from modelpress.strictjson import loads


def test_plain_documents_are_read() -> None:
    assert loads(b'{"a": [1, -2.5, 1e-400, null], "b": {"a": "x"}}', "reading") == {
        "a": [1, -2.5, 0.0, None],
        "b": {"a": "x"},
    }


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"a": 1, "b": 2, "a": 3}', "'a' stands 2 times"),
        ('{"a": NaN}', "NaN"),
        ('{"a": 1e999}', "1e999"),
        ('{"a": [-1E400]}', "-1E400"),
        ('{"a": ' + "9" * 41 + "}", "41 digits"),
        ('{"a": ' + "[" * 100_000, "recursion"),
        ("[1]", "list"),
        ("{", "Expecting"),
    ],
    ids=["duplicate", "nan", "infinite", "nested infinite", "digits", "deep", "list", "cut"],
)
def test_what_is_not_strict_is_refused(text: str, found: str) -> None:
    with pytest.raises(CorruptionError, match="reading the thing") as caught:
        loads(text.encode(), "reading the thing")
    assert found in str(caught.value.found)


def test_a_late_duplicate_among_many_keys_is_found_in_linear_time() -> None:
    keys = [f'"key{number}": 0' for number in range(60_000)]
    text = "{" + ", ".join([*keys, '"key59999": 1']) + "}"
    start = time.process_time()
    with pytest.raises(CorruptionError, match="key59999"):
        loads(text.encode(), "reading")
    assert time.process_time() - start < 5, "one pass takes 0.1 s, a search per key a minute"
