"""The written-out Huffman code against theory, and the production coder against it."""

from __future__ import annotations

import heapq
import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelpress.codec import entropy_bits
from modelpress.codec.huffman import SYMBOLS, build, canonical, code_lengths, decode, encode, size_bits

histograms = st.dictionaries(st.integers(0, 255), st.integers(1, 10**6), min_size=1, max_size=256).map(
    lambda counts: np.array([counts.get(symbol, 0) for symbol in range(SYMBOLS)], np.int64)
)


def unlimited_size(counts: np.ndarray) -> int:
    """Size of the best prefix code without a limit, by Huffman's own algorithm (1952)."""
    heap = sorted(int(count) for count in counts if count)
    total = 0 if len(heap) > 1 else sum(heap)
    while len(heap) > 1:
        joined = heapq.heappop(heap) + heapq.heappop(heap)
        total += joined
        heapq.heappush(heap, joined)
    return total


@given(histograms, st.integers(8, 15))
@settings(deadline=None)
def test_lengths_are_a_complete_limited_code(counts: np.ndarray, max_bits: int) -> None:
    lengths = code_lengths(counts, max_bits)
    assert np.array_equal(lengths > 0, counts > 0)
    assert lengths.max() <= max_bits
    kraft = sum(Fraction(1, 2 ** int(length)) for length in lengths if length)
    assert kraft == (1 if np.count_nonzero(counts) > 1 else Fraction(1, 2))


@given(histograms)
@settings(deadline=None)
def test_size_is_between_entropy_and_one_bit_above(counts: np.ndarray) -> None:
    size = size_bits(counts, canonical(code_lengths(counts, 32)))
    assert entropy_bits(counts) <= size * (1 + 1e-12)
    assert size <= entropy_bits(counts) + counts.sum()
    assert size == unlimited_size(counts)


@given(histograms)
@settings(deadline=None)
def test_a_tighter_limit_never_gains(counts: np.ndarray) -> None:
    sizes = [size_bits(counts, canonical(code_lengths(counts, bits))) for bits in (8, 9, 11, 16)]
    assert sizes == sorted(sizes, reverse=True)


@given(histograms)
@settings(deadline=None)
def test_no_code_begins_another(counts: np.ndarray) -> None:
    code = canonical(code_lengths(counts))
    spelled = sorted(format(code.words[s], f"0{code.lengths[s]}b") for s in np.flatnonzero(code.lengths))
    assert all(not after.startswith(before) for before, after in itertools.pairwise(spelled))


@given(st.binary(max_size=300))
@settings(deadline=None)
def test_round_trip(data: bytes) -> None:
    symbols = np.frombuffer(data, np.uint8)
    code = build(symbols)
    coded = encode(symbols, code)
    assert len(coded) == -(-size_bits(np.bincount(symbols, minlength=SYMBOLS), code) // 8)
    assert decode(coded, code, symbols.size).tobytes() == data


def test_bits_that_end_early_are_refused() -> None:
    symbols = np.arange(64, dtype=np.uint8)
    code = build(symbols)
    with pytest.raises(ValueError, match="the bits end before symbol 62 of 64"):
        decode(encode(symbols, code)[:-1], code, 64)


def test_too_many_symbols_for_the_limit_are_refused() -> None:
    with pytest.raises(ValueError, match="256 symbols do not fit in codes of 7 bits"):
        code_lengths(np.ones(SYMBOLS, np.int64), 7)
