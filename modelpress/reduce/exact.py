"""Sums of floats without rounding: the same number in whatever order, and however cut, they were added.

A float64 is an integer times a power of two, and so is a sum of them; integers add exactly. Rounding happens once,
where a float is asked for, and to the nearest: `Exact.of(values).value()` is `math.fsum(values)`, and can be carried
on. A mantissa grows by a bit for each doubling of the number of values and for each power of two between
the smallest and the largest of them.
"""

from __future__ import annotations

import re
from fractions import Fraction

import numpy as np
import numpy.typing as npt
from pydantic import field_validator, model_validator

from modelpress.reports.base import Report

Doubles = npt.NDArray[np.float64]

MOST_DIGITS = 1200
"""Hexadecimal ones of a mantissa: sums of 2⁶⁴ products of any two floats have fewer."""
MOST_EXPONENT = 2300
"""Of two, and of its inverse: products of any two floats lie within."""
_BITS = 53
_LOW_BITS = 26
_MANTISSA = re.compile(r"-?[1-9a-f][0-9a-f]*|0")


class Exact(Report):
    """mantissa · 2^exponent, exactly; of each number there is one form."""

    mantissa: str = "0"
    """Integer in hexadecimal, such as `-1f3`; odd, or 0."""
    exponent: int = 0
    """Of two; 0 where the mantissa is."""

    @field_validator("mantissa")
    @classmethod
    def _check_mantissa(cls, value: str) -> str:
        if len(value) > MOST_DIGITS or not _MANTISSA.fullmatch(value):
            raise ValueError(f"a mantissa is at most {MOST_DIGITS} hexadecimal digits, without leading zeros")
        return value

    @model_validator(mode="after")
    def _check(self) -> Exact:
        whole = int(self.mantissa, 16)
        if abs(self.exponent) > MOST_EXPONENT or (whole % 2 == 0 and (whole != 0 or self.exponent != 0)):
            raise ValueError("a mantissa must be odd, or 0 with the exponent 0; exponents are those of sums")
        return self

    @classmethod
    def make(cls, whole: int, exponent: int = 0) -> Exact:
        """Integer · 2^exponent."""
        if whole == 0:
            return cls()
        zeros = (whole & -whole).bit_length() - 1
        return cls(mantissa=format(whole >> zeros, "x"), exponent=exponent + zeros)

    @classmethod
    def of(cls, values: npt.ArrayLike) -> Exact:
        """Σ values, of any shape, taken as float64.

        Raises:
            ValueError: one is not finite.
        """
        wholes, exponents = _parts(values)
        return cls._sum({int(one): _total(wholes[exponents == one]) for one in np.unique(exponents)})

    @classmethod
    def dot(cls, first: npt.ArrayLike, second: npt.ArrayLike) -> Exact:
        """Σ first · second, of one shape, taken as float64; no product is rounded.

        Raises:
            ValueError: one is not finite, or the shapes differ.
        """
        one, two = _parts(first), _parts(second)
        if one[0].shape != two[0].shape:
            raise ValueError(f"{one[0].size} numbers cannot be multiplied with {two[0].size}")
        exponents = one[1] + two[1]
        sums: dict[int, int] = {}
        for exponent in np.unique(exponents):
            chosen = exponents == exponent
            sums[int(exponent)] = _total_of_products(one[0][chosen], two[0][chosen])
        return cls._sum(sums)

    @classmethod
    def _sum(cls, by_exponent: dict[int, int]) -> Exact:
        if not by_exponent:
            return cls()
        least = min(by_exponent)
        return cls.make(sum(whole << (exponent - least) for exponent, whole in by_exponent.items()), least)

    def __add__(self, other: Exact) -> Exact:
        least = min(self.exponent, other.exponent)
        whole = sum(int(one.mantissa, 16) << (one.exponent - least) for one in (self, other))
        return Exact.make(whole, least)

    def fraction(self) -> Fraction:
        """The number itself."""
        whole = int(self.mantissa, 16)
        return Fraction(whole << self.exponent) if self.exponent >= 0 else Fraction(whole, 1 << -self.exponent)

    def value(self) -> float:
        """The nearest float.

        Raises:
            OverflowError: it lies beyond the floats.
        """
        return float(self.fraction())


def _parts(values: npt.ArrayLike) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Integers of 53 bits and exponents of two."""
    array = np.asarray(values, np.float64).reshape(-1)
    if not np.isfinite(array).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(array))} of {array.size} numbers are not finite")
    mantissas, exponents = np.frexp(array)
    return np.ldexp(mantissas, _BITS).astype(np.int64), exponents.astype(np.int64) - _BITS


def _total(wholes: npt.NDArray[np.int64]) -> int:
    """Σ in halves of 32 bits: no sum of fewer than 2³¹ leaves 64 bits."""
    return (int((wholes >> 32).sum()) << 32) + int((wholes & 0xFFFFFFFF).sum())


def _total_of_products(first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]) -> int:
    """Σ first · second, each cut into a signed upper and an unsigned lower part, whose products have 54 bits."""
    high_1, low_1 = first >> _LOW_BITS, first & (2**_LOW_BITS - 1)
    high_2, low_2 = second >> _LOW_BITS, second & (2**_LOW_BITS - 1)
    middle = _total(high_1 * low_2) + _total(low_1 * high_2)
    return (_total(high_1 * high_2) << (2 * _LOW_BITS)) + (middle << _LOW_BITS) + _total(low_1 * low_2)
