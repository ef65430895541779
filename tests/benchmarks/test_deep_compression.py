"""What the benchmark counts by itself: the size of Deep Compression's own format."""

from __future__ import annotations

from collections import Counter

import numpy as np

from benchmarks.methods.deep_compression import han_bytes, huffman_bits


def test_a_huffman_code_has_the_bits_of_the_textbook() -> None:
    assert huffman_bits(Counter({0: 45, 1: 13, 2: 12, 3: 16, 4: 9, 5: 5})) == 224  # Cormen et al., section 16.3
    assert huffman_bits(Counter({7: 9})) == 9
    assert huffman_bits(Counter()) == 0


def test_a_gap_that_does_not_fit_costs_a_zero() -> None:
    weights = np.zeros((1, 200), np.float32)
    weights[0, [0, 40]] = 1.0
    # Gaps 0 and 39 = 31 + one filler's place + 7: symbols {0, 31, 7} and values {1, 1, 0}, so 5 and 3 bits.
    assert han_bytes([weights]) == 1.0
    weights[0, 1:40] = 1.0
    assert han_bytes([weights]) == np.ceil((41 + 41) / 8)
