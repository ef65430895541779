"""Numbers and names in words: never 0 for what was not measured, never a letter that nobody sees."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpress.page import words


@given(st.text(), st.integers(8, 40))
def test_a_short_name_is_short_and_visible(text: str, most: int) -> None:
    found = words.short(text, most)
    assert len(found) <= most
    assert not any(unicodedata.category(letter) in ("Cc", "Cf", "Cs") for letter in found)
    assert words.short(found, most) == found


@given(st.text(st.characters(exclude_categories=["C"])))
def test_what_is_visible_stays(text: str) -> None:
    assert words.clean(text) == text


def test_what_was_not_measured_says_so() -> None:
    forms = (words.exact_bytes, words.size, words.time, words.rate, words.number, words.quality, words.difference)
    assert {form(None) for form in forms} == {"not measured"}
    assert words.ratio(None, 3.0) == words.ratio(3.0, 0.0) == "not measured"
    assert words.size(0) == "0 B", "nothing is a number"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (words.size(1_234_567), "1.23 MB"),
        (words.size(999), "999 B"),
        (words.time(0.00123), "1.23 ms"),
        (words.time(4e-5), "40 µs"),
        (words.time(240), "4.0 min"),
        (words.rate(12_345.6), "12,346/s"),
        (words.rate(1.5), "1.5/s"),
        (words.number(3.0, "J"), "3 J"),
        (words.number(float("inf")), "inf"),
        (words.ratio(12.0, 5.0), "2.40×"),
        (words.shape([3, 64]), "3×64"),
        (words.shape([]), "scalar"),
        (words.bits(4, 8), "4.000"),
        (words.bits(4, 0), "–"),
    ],
)
def test_numbers_as_people_read_them(found: str, expected: str) -> None:
    assert found == expected


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("encoder.layer.3.attention.self.query.weight", "encoder.layer.3"),
        ("/encoder/layer.11/MatMul", "/encoder/layer.11"),
        ("conv1.weight", "conv1"),
        ("onnx::MatMul_123", "onnx::MatMul_123"),
        ("bias", "bias"),
        (".x", ".x"),
        ("", ""),
    ],
)
def test_the_layer_of_a_tensor(name: str, layer: str) -> None:
    assert words.layer_of(name) == layer
