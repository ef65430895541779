"""The canonical, length-limited Huffman code written out: the oracle that the production coder is tested against.

Clear instead of fast: numpy and plain Python, one symbol at a time when decoding. Code lengths by package-merge
(Larmore and Hirschberg 1990, "A fast algorithm for optimal length-limited Huffman codes", J. ACM 37(3)); canonical
codes as in Deflate (RFC 1951, section 3.2.2). `kernels` is what codes the packs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from modelpress.codec.base import Bytes

SYMBOLS = 256
MAX_BITS = 11

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Code:
    """A prefix code over bytes: `lengths[s]` bits for symbol s (0: absent), `words[s]` its code, first bit highest."""

    lengths: npt.NDArray[np.int64]
    words: npt.NDArray[np.int64]


def code_lengths(counts: Counts, max_bits: int = MAX_BITS) -> npt.NDArray[np.int64]:
    """Optimal code lengths of at most `max_bits` for (256,) symbol counts: (256,) int64, 0 for absent symbols.

    Package-merge: `max_bits` times, neighbours in the list of cheapest packages are joined in pairs and merged with
    the symbols themselves; the 2n − 2 cheapest of the last list hold every symbol as often as its code has bits.

    Raises:
        ValueError: more symbols than codes of `max_bits` bits.
    """
    present = np.flatnonzero(counts)
    lengths = np.zeros(SYMBOLS, np.int64)
    if present.size > 2**max_bits:
        raise ValueError(f"{present.size} symbols do not fit in codes of {max_bits} bits")
    if present.size < 2:
        lengths[present] = 1
        return lengths
    leaves: list[tuple[int, tuple[int, ...]]] = sorted((int(counts[symbol]), (int(symbol),)) for symbol in present)
    packages = leaves
    for _ in range(max_bits - 1):
        pairs = zip(packages[::2], packages[1::2], strict=False)
        joined = [(first[0] + second[0], first[1] + second[1]) for first, second in pairs]
        packages = sorted([*leaves, *joined], key=lambda package: package[0])
    for _, symbols in packages[: 2 * present.size - 2]:
        np.add.at(lengths, list(symbols), 1)
    return lengths


def canonical(lengths: npt.NDArray[np.int64]) -> Code:
    """The canonical code of these lengths: shorter codes first, equal lengths in the order of the symbols."""
    words = np.zeros(SYMBOLS, np.int64)
    word, bits = 0, 0
    for symbol in sorted(np.flatnonzero(lengths).tolist(), key=lambda symbol: (lengths[symbol], symbol)):
        word <<= int(lengths[symbol]) - bits
        bits = int(lengths[symbol])
        words[symbol] = word
        word += 1
    return Code(lengths, words)


def build(data: Bytes, max_bits: int = MAX_BITS) -> Code:
    """The best code of at most `max_bits` for these bytes."""
    return canonical(code_lengths(np.bincount(data, minlength=SYMBOLS), max_bits))


def size_bits(counts: Counts, code: Code) -> int:
    """Bits that symbols of these counts take, without the table."""
    return int((counts * code.lengths).sum())


def encode(data: Bytes, code: Code) -> bytes:
    """The symbols' codes in order, highest bit first, padded with zero bits to a byte."""
    shifts = np.arange(int(code.lengths.max(initial=0)))[::-1]
    words, lengths = code.words[data], code.lengths[data]
    bits = (words[:, None] >> shifts) & 1
    return np.packbits(bits[shifts < lengths[:, None]].astype(np.uint8)).tobytes()


def decode(coded: bytes, code: Code, symbols: int) -> Bytes:
    """The first `symbols` symbols of what `encode` wrote: (symbols,) uint8.

    Raises:
        ValueError: the bits end too early, or spell no code.
    """
    table = {(int(code.lengths[s]), int(code.words[s])): int(s) for s in np.flatnonzero(code.lengths)}
    longest = int(code.lengths.max(initial=0))
    out, word, length = np.empty(symbols, np.uint8), 0, 0
    bits = iter(np.unpackbits(np.frombuffer(coded, np.uint8)).tolist())
    for position in range(symbols):
        while (length, word) not in table:
            if length > longest:
                raise ValueError(f"no code for symbol {position}")
            bit = next(bits, None)
            if bit is None:
                raise ValueError(f"the bits end before symbol {position} of {symbols}")
            word, length = word << 1 | bit, length + 1
        out[position] = table[length, word]
        word, length = 0, 0
    return out
