"""Sums without rounding are what the standard library makes of all values at once, however they were cut."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from modelpress.reduce import Exact

finite = st.floats(allow_nan=False, allow_infinity=False)
vectors = st.lists(finite, max_size=40)


@given(vectors)
def test_a_sum_is_the_number_itself(values: list[float]) -> None:
    assert Exact.of(values).fraction() == sum(map(Fraction, values), Fraction(0))


@given(st.lists(st.floats(-1e300, 1e300), max_size=40))
def test_it_rounds_as_fsum_does(values: list[float]) -> None:
    assert Exact.of(values).value() == math.fsum(values)


@given(st.lists(st.tuples(finite, finite), max_size=40))
def test_products_are_not_rounded(pairs: list[tuple[float, float]]) -> None:
    first, second = [one for one, _ in pairs], [two for _, two in pairs]
    expected = sum((Fraction(one) * Fraction(two) for one, two in pairs), Fraction(0))
    assert Exact.dot(first, second).fraction() == expected


@given(vectors, st.randoms(use_true_random=False), st.integers(1, 6))
def test_every_cut_and_order_gives_the_same_text(values: list[float], chance: random.Random, parts: int) -> None:
    whole = Exact.of(values)
    chance.shuffle(values)
    sums = [Exact.of(values[part::parts]) for part in range(parts)]
    chance.shuffle(sums)
    total = sums[0]
    for one in sums[1:]:
        total = total + one
    assert total.model_dump_json() == whole.model_dump_json()
    assert Exact.model_validate_json(whole.model_dump_json()) == whole


def test_what_floats_lose_is_kept() -> None:
    assert Exact.of([1e16, 1.0, -1e16]).value() == 1.0
    assert (Exact.of([1e308] * 3) + Exact.of([-1e308] * 2)).value() == 1e308
    assert Exact.dot([5e-324, 1e200], [5e-324, 1e200]).fraction() == Fraction(5e-324) ** 2 + Fraction(1e200) ** 2


def test_many_values_do_not_leave_the_integers() -> None:
    """Half a million mantissas of all ones of one exponent: sums of 64 bits alone would overflow."""
    values = np.full(2**19, np.nextafter(2.0, 0.0))
    assert Exact.of(values).fraction() == Fraction(float(values[0])) * 2**19
    assert Exact.dot(values, -values).fraction() == -(Fraction(float(values[0])) ** 2) * 2**19


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        Exact.of([1.0, value])


def test_a_sum_beyond_the_floats_says_so() -> None:
    with pytest.raises(OverflowError):
        Exact.of([1.7e308, 1.7e308]).value()


@pytest.mark.parametrize(
    ("mantissa", "exponent"),
    [("2", 0), ("0", 1), ("01", 0), ("-0", 0), ("1", 2301), ("0x1", 0), ("1" * 1201, 0), ("", 0), ("1\n", 0)],
)
def test_another_form_of_a_number_is_refused(mantissa: str, exponent: int) -> None:
    with pytest.raises(ValidationError):
        Exact(mantissa=mantissa, exponent=exponent)
