"""Compiled inner loops of the Huffman coder: code lengths, tables, encoding, decoding with the merge of planes fused.

The layout of a chunk is in `container/FORMAT.md`, under "Coder huffman"; `huffman` is the same code written out, and
the oracle of these loops. Codes are canonical with their bits reversed, lowest bit first, so that the next code is
always in the lowest bits of a word. What makes decoding fast:

- A table looked up with `MAX_BITS` bits gives up to six symbols at once, as zstandard's double-symbol decoder gives
  two (Collet 2013, "Huff0"). Where codes are long, it gives one, from a smaller table.
- A chunk is cut into segments of a fixed number of symbols that share no bits. Four are decoded side by side and hide
  each other's latencies (Giesen 2014, "Interleaved entropy coders", arXiv:1402.3392, section 2), and since the number
  of symbols is fixed, a segment's place in the output is known without decoding those before it.
- Symbols go to rows that stay in the first-level cache; from there planes are merged into the output, once.

Compiled by numba without the interpreter's lock, and cached beside this file, or where NUMBA_CACHE_DIR says. Its
cache knows this file's time of change alone, so all loops are in this file. Types are numba's to infer and check.
Arguments are trusted: callers check lengths, and nothing here reads or writes beyond what they gave.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

SEGMENT = 4096
"""Symbols of a segment; the last of a chunk may have fewer."""
LANES = 4
SKIP = 255
"""A gap byte of 255 stands for 255 zeros and no value."""
MAX_BITS = 11
"""Longest code; a table has 2**11 entries of 8 bytes, half of a small first-level cache."""
SYMBOLS_PER_ENTRY = 6
LONG = 5
"""Mean bits of a symbol from which on a table with one symbol per entry decodes faster."""
ESCAPE = 3
"""In a table: 0, 1 and 2 say that a length is that of the symbol before, one more, one less; 3 that it follows."""
MAX_TABLE_BYTES = 2 + 256 * 6 // 8
STORED_FIRST, STORED_LAST = 1, 0
"""In place of a table: the chunk's symbols follow as they are."""
MIN_GAIN = 0.005
"""A chunk whose code would save less is stored as it is: decoding it would cost more than it saves."""
PROBED_SEGMENTS = 2
"""Segments of a chunk by which it is judged beforehand."""
PAIR_COST = 16
"""Symbols to encode per entry of a table of pairs that make it worth while."""
LOOKUPS = 5
"""Look-ups per refill: 5 · 11 bits are among the 57 that a shifted 64-bit word surely has."""
SLACK = 64
"""A lane may write so many symbols beyond its last: LOOKUPS · SYMBOLS_PER_ENTRY + 8, rounded up."""
ROW = SEGMENT + SLACK
OK, BAD_TABLE, BAD_LENGTHS, BAD_POSITION = 0, 1, 2, 3
"""What a decoder returns: all is well; a table that is no code; lengths, or zeros and values, that do not fit."""

_log = logging.getLogger(__name__)


def _jit(function: Callable[..., Any]) -> Any:
    options = {"nogil": True, "boundscheck": False, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError as error:  # numba found no folder that it may write to
        _log.warning("%s is compiled again in each process: %s; set NUMBA_CACHE_DIR", function.__name__, error)
        return numba.njit(**options)(function)


@intrinsic
def _load64(typing, base, offset):
    """Eight bytes at base + offset, unaligned."""

    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(builder.add(*arguments), ir.IntType(64).as_pointer())
        return builder.load(pointer, align=1)

    return types.uint64(types.uint64, types.uint64), generate


@intrinsic
def _store64(typing, base, offset, value):
    """Put eight bytes at base + offset, unaligned."""

    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(builder.add(arguments[0], arguments[1]), ir.IntType(64).as_pointer())
        builder.store(arguments[2], pointer, align=1)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, types.uint64), generate


@_jit
def code_lengths(counts, max_bits, lengths):
    """Optimal code lengths of at most `max_bits`, by package-merge (see `huffman.code_lengths`); 0 for absent symbols.

    A single symbol gets length 0: it needs no bits. Ties are broken so that the result is a function of the counts.
    """
    present = 0
    for symbol in range(256):
        lengths[symbol] = 0
        present += counts[symbol] > 0
    if present < 2:
        return
    order = np.empty(present, np.int64)
    weights = np.empty(present, np.int64)
    filled = 0
    for symbol in range(256):
        if counts[symbol] > 0:
            at = filled
            while at > 0 and weights[at - 1] > counts[symbol]:
                weights[at], order[at] = weights[at - 1], order[at - 1]
                at -= 1
            weights[at], order[at] = counts[symbol], symbol
            filled += 1
    is_leaf = np.empty((max_bits, 2 * present), np.bool_)
    packages = np.empty(2 * present, np.int64)
    merged = np.empty(2 * present, np.int64)
    size = 0
    for level in range(max_bits):
        leaf, package, total = 0, 0, present + size
        for at in range(total):
            take_leaf = package >= size or (leaf < present and weights[leaf] <= packages[package])
            is_leaf[level, at] = take_leaf
            if take_leaf:
                merged[at] = weights[leaf]
                leaf += 1
            else:
                merged[at] = packages[package]
                package += 1
        size = total // 2
        for at in range(size):
            packages[at] = merged[2 * at] + merged[2 * at + 1]
    active = 2 * present - 2
    for level in range(max_bits - 1, -1, -1):
        leaves = 0
        for at in range(active):
            leaves += is_leaf[level, at]
        for at in range(leaves):
            lengths[order[at]] += 1
        active = 2 * (active - leaves)


@_jit
def canonical(lengths, words):
    """Code of each symbol, bits reversed; False if the lengths are not those of a complete code of several symbols."""
    counts = np.zeros(17, np.int64)
    for symbol in range(256):
        counts[lengths[symbol]] += 1
    counts[0] = 0
    first = np.zeros(17, np.int64)
    word = 0
    for bits in range(1, MAX_BITS + 1):
        word = (word + counts[bits - 1]) << 1
        first[bits] = word
    for bits in range(MAX_BITS + 1, 17):
        if counts[bits]:
            return False
    if word + counts[MAX_BITS] != 1 << MAX_BITS:
        return False
    for symbol in range(256):
        bits = lengths[symbol]
        if bits:
            word, reversed_word = first[bits], 0
            first[bits] += 1
            for _ in range(bits):
                reversed_word = reversed_word << 1 | word & 1
                word >>= 1
            words[symbol] = reversed_word
    return True


@_jit
def build_table(lengths, table):
    """Decoding table of 2**MAX_BITS entries: 6 symbols, a byte with the bits that they take, a byte with their number.

    Built up from the tables for fewer bits: a first symbol of b bits stands before what the other bits give.
    """
    words = np.zeros(256, np.int64)
    if not canonical(lengths, words):
        return False
    order = np.empty(256, np.int64)
    present = 0
    for symbol in range(256):
        if lengths[symbol]:
            order[present] = symbol
            present += 1
    shorter = np.zeros(1 << MAX_BITS, np.uint64)  # the table for b bits begins at 2**b
    for bits in range(1, MAX_BITS + 1):
        start = 0 if bits == MAX_BITS else 1 << bits
        target = table if bits == MAX_BITS else shorter
        for at in range(present):
            symbol = order[at]
            own = lengths[symbol]
            if own > bits:
                continue
            rest = 1 << (bits - own)
            place, step = start + words[symbol], 1 << own
            first = np.uint64(symbol) | np.uint64(own) << np.uint64(48) | np.uint64(1) << np.uint64(56)
            for index in range(rest, 2 * rest):
                entry = shorter[index]
                if entry >> np.uint64(56) == SYMBOLS_PER_ENTRY:
                    entry = _without_last(entry, lengths)
                target[place] = (
                    (entry & np.uint64(0xFFFFFFFFFF)) << np.uint64(8) | entry >> np.uint64(48) << np.uint64(48)
                ) + first
                place += step
    return True


@_jit
def build_single_table(lengths, table):
    """Decoding table with one symbol per entry, (2**MAX_BITS,) uint16: the bits it takes, and above them the symbol.

    The bits are lowest, where a shift takes them from without another instruction in the chain of look-ups.
    """
    words = np.zeros(256, np.int64)
    if not canonical(lengths, words):
        return False
    for symbol in range(256):
        bits = lengths[symbol]
        if bits:
            for index in range(words[symbol], 1 << MAX_BITS, 1 << bits):
                table[index] = bits | symbol << 8
    return True


@_jit
def _is_long(lengths):
    """Whether symbols take so many bits, by the code's own odds, that a look-up seldom gives two of them."""
    bits = 0
    for symbol in range(256):
        bits += lengths[symbol] << (MAX_BITS - lengths[symbol]) if lengths[symbol] else 0
    return bits > LONG << MAX_BITS


@_jit
def _without_last(entry, lengths):
    last = np.int64(entry >> np.uint64(8 * (SYMBOLS_PER_ENTRY - 1)) & np.uint64(255))
    return (
        entry & np.uint64(0xFFFFFFFFFF)
        | (entry >> np.uint64(48) & np.uint64(255)) - np.uint64(lengths[last]) << np.uint64(48)
        | np.uint64(SYMBOLS_PER_ENTRY - 1) << np.uint64(56)
    )


@_jit
def _look_up(word, place, table):
    entry = _load64(table, (word & np.uint64((1 << MAX_BITS) - 1)) << np.uint64(3))
    _store64(place, np.uint64(0), entry)
    return word >> (entry >> np.uint64(48) & np.uint64(63)), place + (entry >> np.uint64(56))


@_jit
def _refill(source, bit):
    """57 bits from `bit` on, and a mark at the top: its distance from there will be the number of bits taken."""
    return _load64(source, bit >> np.uint64(3)) >> (bit & np.uint64(7)) | np.uint64(1) << np.uint64(63)


@_jit
def _decode_lanes(source, ends, counts, rows, table):
    """Decode four segments that lie one after the other at `source`; `ends`: (5,) byte bounds, `counts`: (4,) symbols.

    At least 8 bytes beyond the last bound must be readable, and SLACK symbols beyond each row writable: in each round
    a lane's positions are put back to its bounds, whatever its bits say. The lanes take turns look-up by look-up:
    written one after the other, their dependent instructions would fill the processor's scheduler.
    """
    eight = np.uint64(8)
    bit0, bit1, bit2, bit3, end3 = ends[0] * eight, ends[1] * eight, ends[2] * eight, ends[3] * eight, ends[4] * eight
    end0, end1, end2 = bit1, bit2, bit3
    stride = np.uint64(rows.shape[1])
    at0 = np.uint64(rows.ctypes.data)
    at1, at2, at3 = at0 + stride, at0 + stride + stride, at0 + stride + stride + stride
    full0, full1, full2, full3 = at0 + counts[0], at1 + counts[1], at2 + counts[2], at3 + counts[3]
    while at0 < full0 or at1 < full1 or at2 < full2 or at3 < full3:
        word0, word1 = _refill(source, bit0), _refill(source, bit1)
        word2, word3 = _refill(source, bit2), _refill(source, bit3)
        for _ in range(LOOKUPS):
            word0, at0 = _look_up(word0, at0, table)
            word1, at1 = _look_up(word1, at1, table)
            word2, at2 = _look_up(word2, at2, table)
            word3, at3 = _look_up(word3, at3, table)
        bit0, at0 = min(bit0 + _leading_zeros(word0), end0), min(at0, full0)
        bit1, at1 = min(bit1 + _leading_zeros(word1), end1), min(at1, full1)
        bit2, at2 = min(bit2 + _leading_zeros(word2), end2), min(at2, full2)
        bit3, at3 = min(bit3 + _leading_zeros(word3), end3), min(at3, full3)


@_jit
def _look_up_single(word, place, table):
    entry = _load16(table, (word & np.uint64((1 << MAX_BITS) - 1)) << np.uint64(1))
    _store8(place, entry >> np.uint16(8))
    return word >> (np.uint64(entry) & np.uint64(63))


@_jit
def _decode_lanes_single(source, ends, count, rows, table):
    """As `_decode_lanes`, one symbol per look-up: every lane writes `count` symbols, rounded up to whole rounds."""
    eight = np.uint64(8)
    bit0, bit1, bit2, bit3, end3 = ends[0] * eight, ends[1] * eight, ends[2] * eight, ends[3] * eight, ends[4] * eight
    end0, end1, end2 = bit1, bit2, bit3
    stride = np.uint64(rows.shape[1])
    at0 = np.uint64(rows.ctypes.data)
    at1, at2, at3 = at0 + stride, at0 + stride + stride, at0 + stride + stride + stride
    for _ in range((count + LOOKUPS - 1) // LOOKUPS):
        word0, word1 = _refill(source, bit0), _refill(source, bit1)
        word2, word3 = _refill(source, bit2), _refill(source, bit3)
        for index in range(LOOKUPS):
            word0 = _look_up_single(word0, at0 + np.uint64(index), table)
            word1 = _look_up_single(word1, at1 + np.uint64(index), table)
            word2 = _look_up_single(word2, at2 + np.uint64(index), table)
            word3 = _look_up_single(word3, at3 + np.uint64(index), table)
        at0, at1, at2, at3 = (
            at0 + np.uint64(LOOKUPS),
            at1 + np.uint64(LOOKUPS),
            at2 + np.uint64(LOOKUPS),
            at3 + np.uint64(LOOKUPS),
        )
        bit0, bit1 = min(bit0 + _leading_zeros(word0), end0), min(bit1 + _leading_zeros(word1), end1)
        bit2, bit3 = min(bit2 + _leading_zeros(word2), end2), min(bit3 + _leading_zeros(word3), end3)


@intrinsic
def _load16(typing, base, offset):
    """Two bytes at base + offset."""

    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(builder.add(*arguments), ir.IntType(16).as_pointer())
        return builder.load(pointer, align=1)

    return types.uint16(types.uint64, types.uint64), generate


@intrinsic
def _store8(typing, place, value):
    """Put the low byte of a 16-bit value."""

    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())
        builder.store(builder.trunc(arguments[1], ir.IntType(8)), pointer)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint16), generate


@intrinsic
def _leading_zeros(typing, word):
    def generate(context, builder, signature, arguments):
        return builder.ctlz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.uint64(types.uint64), generate


@_jit
def _read(source, at, size):
    """Unsigned integer of `size` bytes, lowest first."""
    value = np.int64(0)
    for index in range(size):
        value |= np.int64(_byte(source, np.uint64(at + index))) << (8 * index)
    return value


@intrinsic
def _byte(typing, base, offset):
    """One byte at base + offset."""

    def generate(context, builder, signature, arguments):
        return builder.load(builder.inttoptr(builder.add(*arguments), ir.IntType(8).as_pointer()))

    return types.uint8(types.uint64, types.uint64), generate


@_jit
def _open_chunk(source, begin, end, built, table):
    """Read the head of the chunk at [begin, end): status, symbols, place of the segments' lengths, or of the symbols
    if they are stored as they are, and whether they are.

    The decoding table is built unless `built`, (MAX_TABLE_BYTES + 2,) uint8, says that it is this one already: a
    table's bytes, led by their number and followed by whether it has one symbol per entry. Bytes that begin with a
    whole table are that table.
    """
    if end - begin < 6:
        return BAD_LENGTHS, np.int64(0), np.int64(0), False
    symbols = _read(source, begin, 4)
    at = begin + 4
    if _byte(source, np.uint64(at)) == STORED_FIRST and _byte(source, np.uint64(at + 1)) == STORED_LAST:
        return OK if at + 2 + symbols == end else BAD_LENGTHS, symbols, at + 2, True
    same = built[0] > 0 and at + built[0] <= end
    for index in range(built[0] if same else 0):
        same &= built[1 + index] == _byte(source, np.uint64(at + index))
    if same:
        at += built[0]
    else:
        built[0] = 0
        lengths = np.zeros(256, np.int64)
        size = _read_lengths(source, at, end, lengths)
        if size == 0:
            return BAD_TABLE, np.int64(0), np.int64(0), False
        built[MAX_TABLE_BYTES + 1] = size > 2 and _is_long(lengths)
        if size == 2:
            single = np.uint64(_byte(source, np.uint64(at)))
            for index in range(1 << MAX_BITS):
                table[index] = single * np.uint64(0x010101010101) | np.uint64(SYMBOLS_PER_ENTRY) << np.uint64(56)
        elif built[MAX_TABLE_BYTES + 1]:
            if not build_single_table(lengths, table.view(np.uint16)):
                return BAD_TABLE, np.int64(0), np.int64(0), False
        elif not build_table(lengths, table):
            return BAD_TABLE, np.int64(0), np.int64(0), False
        for index in range(size):
            built[1 + index] = _byte(source, np.uint64(at + index))
        built[0] = size
        at += size
    data = at + 2 * ((symbols + SEGMENT - 1) // SEGMENT)
    if data > end or (built[0] == 2 and data != end):  # a single symbol takes no bits
        return BAD_LENGTHS, np.int64(0), np.int64(0), False
    return OK, symbols, at, False


@_jit
def _read_lengths(source, at, end, lengths):
    """Read a table of code lengths: how many bytes it takes, or 0 if it ends too early."""
    first, last = np.int64(_byte(source, np.uint64(at))), np.int64(_byte(source, np.uint64(at + 1)))
    if first >= last:
        return 2 if first == last else 0
    bit, length = 8 * (at + 2), MAX_BITS
    for symbol in range(first, last + 1):
        if bit + 6 > 8 * end:
            return 0
        step = _two_bits(source, bit)
        bit += 2
        if step == ESCAPE:
            length = _two_bits(source, bit) | _two_bits(source, bit + 2) << 2
            bit += 4
        else:
            length += step if step < 2 else -1
        if length < 0 or length > MAX_BITS:
            return 0
        lengths[symbol] = length
    return (bit + 7) // 8 - at


@_jit
def _two_bits(source, bit):
    return np.int64(_byte(source, np.uint64(bit // 8))) >> (bit % 8) & 3


@_jit
def _write_lengths(out, at, first, last, lengths):
    """Undo `_read_lengths`; returns where the table ends."""
    out[at], out[at + 1] = first, last
    at += 2
    if first == last:
        return at
    bits, filled, before = np.int64(0), 0, MAX_BITS
    for symbol in range(first, last + 1):
        step = lengths[symbol] - before
        before = lengths[symbol]
        if -1 <= step <= 1:
            bits |= (step if step >= 0 else 2) << filled
            filled += 2
        else:
            bits |= (ESCAPE | lengths[symbol] << 2) << filled
            filled += 6
        while filled >= 8:
            out[at] = bits & 255
            at += 1
            bits >>= 8
            filled -= 8
    if filled:
        out[at] = bits
        at += 1
    return at


@_jit
def _decode_group(source, limit, at, data, end, symbols, is_single, rows, table, tail):
    """Decode up to four segments of `symbols` symbols into `rows`; returns where their bytes end, or −1.

    `at`: place of their lengths; `data`: of their bytes; `end`: of the chunk's end; `limit`: of the readable memory's.
    """
    ends = np.empty(LANES + 1, np.uint64)
    counts = np.empty(LANES, np.uint64)
    ends[0] = data
    for lane in range(LANES):
        left = symbols - lane * SEGMENT
        counts[lane] = max(0, min(SEGMENT, left))
        length = _read(source, at + 2 * lane, 2) if left > 0 else 0
        if length > SEGMENT * MAX_BITS // 8:
            return np.int64(-1)
        data += length
        ends[lane + 1] = data
    if data > end:
        return np.int64(-1)
    if data + 8 > limit:  # nothing may be read beyond the buffer: decode from a padded copy
        begin = np.int64(ends[0])
        for index in range(data - begin):
            tail[index] = _byte(source, np.uint64(begin + index))
        for lane in range(LANES + 1):
            ends[lane] -= np.uint64(begin)
        source = np.uint64(tail.ctypes.data)
    if is_single:
        _decode_lanes_single(source, ends, min(SEGMENT, symbols), rows, np.uint64(table.ctypes.data))
    else:
        _decode_lanes(source, ends, counts, rows, np.uint64(table.ctypes.data))
    return data


@_jit
def _merge(rows, count, rotated, out):
    """Put the planes' bytes of one segment together into `out`, (count · itemsize,) uint8; undo the rotation.

    `rows`: (planes,) uint64, address of each plane's bytes.
    """
    planes = rows.size
    if planes == 1:
        _copy(np.uint64(out.ctypes.data), rows[0], count)
    elif planes == 2:
        high, low, halves = _view(rows[0], count), _view(rows[1], count), out.view(np.uint16)
        if rotated:
            for index in range(count):
                word = np.uint16(high[index]) << np.uint16(8) | np.uint16(low[index])
                halves[index] = np.uint16(word >> np.uint16(1)) | np.uint16(word << np.uint16(15))
        else:
            for index in range(count):
                halves[index] = np.uint16(high[index]) << np.uint16(8) | np.uint16(low[index])
    elif planes == 4:
        a, b, c, d = _view(rows[0], count), _view(rows[1], count), _view(rows[2], count), _view(rows[3], count)
        words = out.view(np.uint32)
        turn = np.uint32(1 if rotated else 0)
        back = np.uint32(31 if rotated else 0)
        for index in range(count):
            word = (
                np.uint32(a[index]) << np.uint32(24)
                | np.uint32(b[index]) << np.uint32(16)
                | np.uint32(c[index]) << np.uint32(8)
                | np.uint32(d[index])
            )
            words[index] = np.uint32(word >> turn) | np.uint32(word << back)
    else:
        doubles = out.view(np.uint64)
        for index in range(count):
            wide = np.uint64(0)
            for plane in range(8):
                wide = wide << np.uint64(8) | np.uint64(_byte(rows[plane], np.uint64(index)))
            doubles[index] = wide >> np.uint64(1) | wide << np.uint64(63) if rotated else wide


@_jit
def decode_planes(sources, limits, bounds, is_coded, symbols, chunk_symbols, rotated, out):
    """Decode and merge the byte planes of `symbols` elements into `out`, (symbols · planes,) uint8, aligned.

    Args:
        sources: (planes,) uint64, addresses of the streams' bodies.
        limits: (planes,) int64, their readable bytes.
        bounds: (planes, chunks + 1) int64, where each chunk begins and ends in its body.
        is_coded: (planes,) bool; False: the plane's bytes as they are.

    Returns:
        status, chunk and plane: (OK, 0, 0), or what is wrong with which chunk of which plane.
    """
    planes = sources.size
    tables = np.empty((planes, 1 << MAX_BITS), np.uint64)
    built = np.zeros((planes, MAX_TABLE_BYTES + 2), np.uint8)
    rows = np.empty((planes, LANES, ROW), np.uint8)
    tail = np.zeros(LANES * SEGMENT * MAX_BITS // 8 + 16, np.uint8)
    at, data, places = np.empty(planes, np.int64), np.empty(planes, np.int64), np.empty(planes, np.uint64)
    stored = np.empty(planes, np.bool_)
    for chunk in range(bounds.shape[1] - 1):
        count = min(chunk_symbols, symbols - chunk * chunk_symbols)
        for plane in range(planes):
            if bounds[plane, chunk + 1] > limits[plane]:
                return BAD_LENGTHS, chunk, plane
            if is_coded[plane]:
                status, claimed, at[plane], stored[plane] = _open_chunk(
                    sources[plane], bounds[plane, chunk], bounds[plane, chunk + 1], built[plane], tables[plane]
                )
                if status == OK and claimed != count:
                    status = BAD_LENGTHS
                if status != OK:
                    return status, chunk, plane
                data[plane] = at[plane] + (0 if stored[plane] else 2 * ((count + SEGMENT - 1) // SEGMENT))
            else:
                data[plane], stored[plane] = bounds[plane, chunk], True
                if bounds[plane, chunk + 1] - data[plane] != count:
                    return BAD_LENGTHS, chunk, plane
        for first in range(0, count, LANES * SEGMENT):
            group = min(LANES * SEGMENT, count - first)
            for plane in range(planes):
                if not stored[plane]:
                    data[plane] = _decode_group(
                        sources[plane],
                        limits[plane],
                        at[plane],
                        data[plane],
                        bounds[plane, chunk + 1],
                        group,
                        built[plane, MAX_TABLE_BYTES + 1],
                        rows[plane],
                        tables[plane],
                        tail,
                    )
                    if data[plane] < 0:
                        return BAD_LENGTHS, chunk, plane
                    at[plane] += 2 * LANES
                else:
                    data[plane] += group
            for lane in range((group + SEGMENT - 1) // SEGMENT):
                start = chunk * chunk_symbols + first + lane * SEGMENT
                size = min(SEGMENT, group - lane * SEGMENT)
                for plane in range(planes):
                    if not stored[plane]:
                        places[plane] = rows[plane, lane].ctypes.data
                    else:
                        places[plane] = sources[plane] + np.uint64(data[plane] - group + lane * SEGMENT)
                _merge(places, size, rotated, out[start * planes : (start + size) * planes])
        for plane in range(planes):
            if data[plane] != bounds[plane, chunk + 1]:
                return BAD_LENGTHS, chunk, plane
    return OK, 0, 0


@intrinsic
def _copy(typing, target, source, size):
    """Copy `size` bytes between addresses that do not overlap; an assignment of slices would go byte by byte."""

    def generate(context, builder, signature, arguments):
        byte = ir.IntType(8).as_pointer()
        to, of = builder.inttoptr(arguments[0], byte), builder.inttoptr(arguments[1], byte)
        cgutils.raw_memcpy(builder, to, of, arguments[2], 1)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, types.int64), generate


@intrinsic
def _pointer(typing, address):
    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.CPointer(types.uint8)(types.uint64), generate


@_jit
def _view(address, size):
    return numba.carray(_pointer(address), size)


@_jit
def _split(raw, planes, rotated, scratch):
    """Undo `_merge`: the planes of (count · planes,) bytes into the first `count` places of `scratch`, (planes, …)."""
    count = raw.size // planes
    if planes == 1:
        _copy(np.uint64(scratch.ctypes.data), np.uint64(raw.ctypes.data), count)
    elif planes == 2:
        high, low, halves = scratch[0], scratch[1], raw.view(np.uint16)
        if rotated:
            for index in range(count):
                high[index] = np.uint8(halves[index] >> np.uint16(7))
                low[index] = np.uint8(halves[index] << np.uint16(1) | halves[index] >> np.uint16(15))
        else:
            for index in range(count):
                high[index] = np.uint8(halves[index] >> np.uint16(8))
                low[index] = np.uint8(halves[index])
    elif planes == 4:
        a, b, c, d, words = scratch[0], scratch[1], scratch[2], scratch[3], raw.view(np.uint32)
        turn = np.uint32(1 if rotated else 0)
        back = np.uint32(31 if rotated else 0)
        for index in range(count):
            word = np.uint32(words[index] << turn) | np.uint32(words[index] >> back)
            a[index] = np.uint8(word >> np.uint32(24))
            b[index] = np.uint8(word >> np.uint32(16))
            c[index] = np.uint8(word >> np.uint32(8))
            d[index] = np.uint8(word)
    else:
        doubles = raw.view(np.uint64)
        for index in range(count):
            wide = doubles[index]
            if rotated:
                wide = wide << np.uint64(1) | wide >> np.uint64(63)
            for plane in range(8):
                scratch[plane, index] = np.uint8(wide >> np.uint64(56 - 8 * plane))


@_jit
def _count(data, counts):
    """Histogram of bytes, into four tables in turn: a run of equal bytes does not wait for its own count."""
    parts = np.zeros((4, 256), np.int64)
    whole = data.size - data.size % 4
    for index in range(0, whole, 4):
        parts[0, data[index]] += 1
        parts[1, data[index + 1]] += 1
        parts[2, data[index + 2]] += 1
        parts[3, data[index + 3]] += 1
    for index in range(whole, data.size):
        parts[0, data[index]] += 1
    for symbol in range(256):
        counts[symbol] = parts[0, symbol] + parts[1, symbol] + parts[2, symbol] + parts[3, symbol]


@_jit
def count_planes(raw, planes, rotated, counts):
    """Add the histograms of all planes to `counts`, (planes, 256) int64."""
    scratch = np.empty((planes, SEGMENT), np.uint8)
    own = np.empty(256, np.int64)
    symbols = raw.size // planes
    for start in range(0, symbols, SEGMENT):
        count = min(SEGMENT, symbols - start)
        _split(raw[start * planes : (start + count) * planes], planes, rotated, scratch)
        for plane in range(planes):
            _count(scratch[plane, :count], own)
            counts[plane] += own


@_jit
def _choose_code(counts, lengths, codes):
    """Keep the code of the chunk before where this chunk's own would gain under 0.1 %: it needs no new table.

    Returns whether there is a new one. A single symbol, which needs no bits, gets lengths of 0.
    """
    present, covered = 0, True
    for symbol in range(256):
        if counts[symbol]:
            present += 1
            covered &= lengths[symbol] > 0
    best = np.empty(256, np.int64)
    code_lengths(counts, MAX_BITS, best)
    if covered and present > 1 and _size_bits(counts, lengths) <= 1.001 * _size_bits(counts, best):
        return False
    words = np.zeros(256, np.int64)
    if present > 1:
        canonical(best, words)
    for symbol in range(256):
        lengths[symbol] = best[symbol]
        codes[symbol] = np.uint64(words[symbol]) | np.uint64(best[symbol]) << np.uint64(32)
    return True


@_jit
def _pair_codes(codes, pairs):
    """Codes of two symbols at once, (65536,) uint32, the first symbol lowest in the index: 22 bits, and from bit 24 on
    their number. Of a pair with a symbol that has no code, anything."""
    for second in range(256):
        if codes[second] >> np.uint64(32) == 0:
            continue
        for first in range(256):
            bits = codes[first] >> np.uint64(32)
            if bits:
                word = codes[first] | (codes[second] & np.uint64(0xFFFFFFFF)) << bits
                both = bits + (codes[second] >> np.uint64(32))
                pairs[first | second << 8] = np.uint32(word & np.uint64(0x3FFFFF) | both << np.uint64(24))


@_jit
def _size_bits(counts, lengths):
    bits = 0
    for symbol in range(256):
        bits += counts[symbol] * lengths[symbol]
    return bits


@_jit
def _write(out, at, value, size):
    for index in range(size):
        out[at + index] = value >> (8 * index) & 255
    return at + size


@_jit
def _put(accumulator, filled, symbol, codes):
    code = codes[symbol]
    return accumulator | (code & np.uint64(0xFFFFFFFF)) << filled, filled + (code >> np.uint64(32))


@_jit
def _put_pair(accumulator, filled, symbols, pairs):
    pair = pairs[symbols]
    return accumulator | np.uint64(pair & np.uint32(0x3FFFFF)) << filled, filled + np.uint64(pair >> np.uint32(24))


@_jit
def _flush(accumulator, filled, base, at):
    _store64(base, at, accumulator)
    whole = filled & np.uint64(0xF8)
    return accumulator >> whole, filled & np.uint64(7), at + (whole >> np.uint64(3))


@_jit
def _encode_segment(data, codes, pairs, has_pairs, out, at):
    """Write the codes of (n,) symbols from byte `at` on; returns where they end. 8 bytes beyond must be writable."""
    base, place, source = np.uint64(out.ctypes.data), np.uint64(at), np.uint64(data.ctypes.data)
    accumulator, filled = np.uint64(0), np.uint64(0)
    whole = data.size - data.size % 4
    for index in range(0, whole if has_pairs else 0, 4):
        accumulator, filled = _put_pair(accumulator, filled, _load16(source, np.uint64(index)), pairs)
        accumulator, filled = _put_pair(accumulator, filled, _load16(source, np.uint64(index + 2)), pairs)
        accumulator, filled, place = _flush(accumulator, filled, base, place)
    for index in range(whole if has_pairs else 0, whole, 4):
        accumulator, filled = _put(accumulator, filled, data[index], codes)
        accumulator, filled = _put(accumulator, filled, data[index + 1], codes)
        accumulator, filled = _put(accumulator, filled, data[index + 2], codes)
        accumulator, filled = _put(accumulator, filled, data[index + 3], codes)
        accumulator, filled, place = _flush(accumulator, filled, base, place)
    for index in range(whole, data.size):
        accumulator, filled = _put(accumulator, filled, data[index], codes)
    _store64(base, place, accumulator)
    return np.int64(place + (filled + np.uint64(7)) // np.uint64(8))


@_jit
def _encode_chunk(data, state, codes, pairs, has_pairs, out, at):
    """Append one chunk to `out` at `at`, as it is where a code gains too little; returns where it ends.

    `state`: (256,) the lengths of the code in use, `codes` its words, `pairs` those of two symbols if `has_pairs`, (1,)
    bool: they are made where that takes less time than it saves.
    """
    counts = np.empty(256, np.int64)
    _count(data, counts)
    if _choose_code(counts, state, codes):
        has_pairs[0] = False
    first, last, present = 256, 0, 0
    for symbol in range(256):
        if state[symbol] or counts[symbol]:
            first, last, present = min(first, symbol), symbol, present + 1
    if not has_pairs[0] and present > 1 and present * present <= data.size // PAIR_COST:
        _pair_codes(codes, pairs)
        has_pairs[0] = True
    first = min(first, last)
    begin = at
    at = _write_lengths(out, _write(out, at, data.size, 4), first, last, state)
    segments = (data.size + SEGMENT - 1) // SEGMENT
    lengths_at = at
    at += 2 * segments
    if data.size and at - begin + _size_bits(counts, state) / 8 > (1 - MIN_GAIN) * (6 + data.size):
        return _store_chunk(data, out, begin)
    for segment in range(segments):
        part = data[segment * SEGMENT : min(data.size, (segment + 1) * SEGMENT)]
        end = _encode_segment(part, codes, pairs, has_pairs[0], out, at)
        _write(out, lengths_at + 2 * segment, end - at, 2)
        at = end
    return at


@_jit
def _store_chunk(data, out, at):
    """Append one chunk with its symbols as they are; returns where it ends."""
    at = _write(out, at, data.size, 4)
    out[at], out[at + 1] = STORED_FIRST, STORED_LAST
    _copy(np.uint64(out.ctypes.data) + np.uint64(at + 2), np.uint64(data.ctypes.data), data.size)
    return at + 2 + data.size


@_jit
def judge_planes(raw, planes, rotated, chunk_symbols, worth):
    """Whether a code would save MIN_GAIN of each chunk of each plane, by some of its segments: (planes, chunks) bool.

    Which ones differs from chunk to chunk, so that a pattern that repeats with the chunks is not seen the same in all.
    The entropy of so few samples is too low by (values − 1) / (2 ln 2) bits in all (Miller 1955), which is added.
    """
    segments = (chunk_symbols + SEGMENT - 1) // SEGMENT
    step = max(1, segments // PROBED_SEGMENTS)
    step += step // 3  # no whole part of a chunk, in which rows may repeat
    symbols = raw.size // planes
    scratch = np.empty((planes, SEGMENT), np.uint8)
    own, counts = np.empty(256, np.int64), np.empty((planes, 256), np.int64)
    for chunk in range(worth.shape[1]):
        counts[:] = 0
        end = min(symbols, (chunk + 1) * chunk_symbols)
        inside = (end - chunk * chunk_symbols + SEGMENT - 1) // SEGMENT
        for probe in range(min(PROBED_SEGMENTS, inside)):
            start = chunk * chunk_symbols + (5 * chunk + probe * step) % inside * SEGMENT
            count = min(SEGMENT, end - start)
            _split(raw[start * planes : (start + count) * planes], planes, rotated, scratch)
            for plane in range(planes):
                _count(scratch[plane, :count], own)
                counts[plane] += own
        for plane in range(planes):
            total, present, bits = 0, 0, 0.0
            for symbol in range(256):
                total += counts[plane, symbol]
                present += counts[plane, symbol] > 0
            for symbol in range(256):
                if counts[plane, symbol]:
                    bits -= counts[plane, symbol] * np.log2(counts[plane, symbol] / total)
            worth[plane, chunk] = bits + (present - 1) / (2 * np.log(2.0)) < (1 - MIN_GAIN) * 8 * total


@_jit
def encode_planes(raw, planes, rotated, chunk_symbols, is_coded, worth, bodies, capacities, bounds):
    """Split (symbols · planes,) bytes into planes and write each to its body, coded or as it is.

    Args:
        is_coded: (planes,) bool; False: chunks without heads, as they are.
        worth: (planes, chunks) bool; False: a chunk of a coded plane that is stored without a try.
        bodies: (planes,) uint64, addresses; `capacities`, (planes,) int64, must be at least `coded_capacity`'s.
        bounds: (planes, chunks + 1) int64, filled with where the chunks begin and end.
    """
    symbols = raw.size // planes
    scratch = np.empty((planes, min(chunk_symbols, symbols)), np.uint8)
    lengths = np.zeros((planes, 256), np.int64)
    codes = np.zeros((planes, 256), np.uint64)
    pairs, has_pairs = np.empty((planes, 1 << 16), np.uint32), np.zeros((planes, 1), np.bool_)
    bounds[:, 0] = 0
    for chunk in range(bounds.shape[1] - 1):
        start = chunk * chunk_symbols
        count = min(chunk_symbols, symbols - start)
        _split(raw[start * planes : (start + count) * planes], planes, rotated, scratch)
        for plane in range(planes):
            at, body = bounds[plane, chunk], _view(bodies[plane], capacities[plane])
            data = scratch[plane, :count]
            if is_coded[plane] and worth[plane, chunk]:
                at = _encode_chunk(data, lengths[plane], codes[plane], pairs[plane], has_pairs[plane], body, at)
            elif is_coded[plane]:
                at = _store_chunk(data, body, at)
            else:
                _copy(bodies[plane] + np.uint64(at), np.uint64(scratch[plane].ctypes.data), count)
                at += count
            bounds[plane, chunk + 1] = at


@_jit
def _gaps(words, gaps, kept):
    """Relative index of (count,) words: the gap bytes and the words that are not zero; returns how many of each."""
    filled, values, run = 0, 0, 0
    for index in range(words.size):
        if words[index] == 0:
            run += 1
            continue
        while run >= SKIP:
            gaps[filled] = SKIP
            filled += 1
            run -= SKIP
        gaps[filled] = run
        filled += 1
        kept[values] = words[index]
        values += 1
        run = 0
    return filled, values


@_jit
def _mask(words, mask, kept):
    """Bit mask, lowest bit first, of (count,) words, and the words that are not zero; returns how many of each."""
    values, size = 0, (words.size + 7) // 8
    for at in range(size):
        byte = 0
        for index in range(8 * at, min(8 * at + 8, words.size)):
            present = words[index] != 0
            kept[values] = words[index]
            values += present
            byte |= np.int64(present) << (index - 8 * at)
        mask[at] = byte
    return size, values


@_jit
def _find(words, by_mask, index, kept):
    return _mask(words, index, kept) if by_mask else _gaps(words, index, kept)


@_jit
def encode_sparse(raw, planes, rotated, chunk_symbols, by_mask, bodies, capacities, bounds):
    """Write where the elements are that are not zero, as a mask or as gaps, and the planes of their values; all coded.

    Arguments are as for `encode_planes`, the index being the first stream.
    """
    streams, symbols = planes + 1, raw.size // planes
    most = min(chunk_symbols, symbols)
    index, kept = np.empty(most + most // SKIP + 1, np.uint8), np.empty((most + 1) * planes, np.uint8)
    scratch = np.empty((planes, most), np.uint8)
    lengths = np.zeros((streams, 256), np.int64)
    codes = np.zeros((streams, 256), np.uint64)
    pairs, has_pairs = np.empty((streams, 1 << 16), np.uint32), np.zeros((streams, 1), np.bool_)
    bounds[:, 0] = 0
    for chunk in range(bounds.shape[1] - 1):
        part = raw[chunk * chunk_symbols * planes : min(symbols, (chunk + 1) * chunk_symbols) * planes]
        if planes == 1:
            filled, values = _find(part, by_mask, index, kept)
        elif planes == 2:
            filled, values = _find(part.view(np.uint16), by_mask, index, kept.view(np.uint16))
        elif planes == 4:
            filled, values = _find(part.view(np.uint32), by_mask, index, kept.view(np.uint32))
        else:
            filled, values = _find(part.view(np.uint64), by_mask, index, kept.view(np.uint64))
        _split(kept[: values * planes], planes, rotated, scratch)
        for stream in range(streams):
            data = index[:filled] if stream == 0 else scratch[stream - 1, :values]
            bounds[stream, chunk + 1] = _encode_chunk(
                data,
                lengths[stream],
                codes[stream],
                pairs[stream],
                has_pairs[stream],
                _view(bodies[stream], capacities[stream]),
                bounds[stream, chunk],
            )


def coded_capacity(symbols: int, chunks: int) -> int:
    """Bytes that surely hold the chunks of so many symbols: heads, tables, segments' lengths, the longest codes."""
    segments = symbols // SEGMENT + chunks
    return chunks * (4 + MAX_TABLE_BYTES) + segments * 3 + symbols * MAX_BITS // 8 + 16


@_jit
def _decode_bytes(source, limit, begin, end, built, table, rows, tail, target):
    """Decode the chunk at [begin, end) to the first places of `target`: the number of symbols, or minus a status."""
    status, symbols, at, stored = _open_chunk(source, begin, end, built, table)
    if status != OK:
        return -status
    if symbols > target.size:
        return -BAD_LENGTHS
    if stored:
        _copy(np.uint64(target.ctypes.data), source + np.uint64(at), symbols)
        return symbols
    data = at + 2 * ((symbols + SEGMENT - 1) // SEGMENT)
    for first in range(0, symbols, LANES * SEGMENT):
        group = min(LANES * SEGMENT, symbols - first)
        is_single = built[MAX_TABLE_BYTES + 1]
        data = _decode_group(source, limit, at, data, end, group, is_single, rows, table, tail)
        if data < 0:
            return -BAD_LENGTHS
        at += 2 * LANES
        for lane in range((group + SEGMENT - 1) // SEGMENT):
            size = min(SEGMENT, group - lane * SEGMENT)
            place = np.uint64(target.ctypes.data) + np.uint64(first + lane * SEGMENT)
            _copy(place, np.uint64(rows[lane].ctypes.data), size)
    return symbols if data == end else -BAD_LENGTHS


@_jit
def _place_by_gaps(gaps, values, out):
    """Undo `_gaps` into `out`, (count,) words: OK, or BAD_POSITION."""
    out[:] = 0
    position, used = 0, 0
    for index in range(gaps.size):
        gap = np.int64(gaps[index])
        position += gap
        if gap == SKIP:
            continue
        if position >= out.size or used >= values.size:
            return BAD_POSITION
        out[position] = values[used]
        position += 1
        used += 1
    return OK if used == values.size and position <= out.size else BAD_POSITION


@_jit
def _place_by_mask(mask, values, out):
    """Undo `_mask` into `out`, (count,) words: OK, or BAD_POSITION. Goes from set bit to set bit, 64 at a time."""
    if mask.size != (out.size + 7) // 8:
        return BAD_POSITION
    if out.size % 8 and mask[-1] >> (out.size % 8):
        return BAD_POSITION
    out[:] = 0
    used, whole = 0, mask.size - mask.size % 8
    base = np.uint64(mask.ctypes.data)
    for at in range(0, whole, 8):
        used = _place_bits(_load64(base, np.uint64(at)), 8 * at, values, used, out)
    for at in range(whole, mask.size):
        used = _place_bits(np.uint64(mask[at]), 8 * at, values, used, out)
    return OK if used == values.size else BAD_POSITION


@_jit
def _place_bits(bits, start, values, used, out):
    """Place a value for each bit that is set; −1 if there are too few."""
    if used < 0 or used + _ones(np.int64(bits)) > values.size:
        return -1
    while bits:
        out[start + np.int64(_trailing_zeros(bits))] = values[used]
        used += 1
        bits &= bits - np.uint64(1)
    return used


@intrinsic
def _trailing_zeros(typing, word):
    def generate(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), generate


@intrinsic
def _ones(typing, word):
    def generate(context, builder, signature, arguments):
        return builder.ctpop(arguments[0])

    return types.int64(types.int64), generate


@_jit
def _place(index, by_mask, values, out):
    return _place_by_mask(index, values, out) if by_mask else _place_by_gaps(index, values, out)


@_jit
def place(index, by_mask, values, planes, out):
    """Put values where a chunk's mask or gaps say: OK, or BAD_POSITION. `values`, `out`: bytes, aligned."""
    if planes == 1:
        return _place(index, by_mask, values, out)
    if planes == 2:
        return _place(index, by_mask, values.view(np.uint16), out.view(np.uint16))
    if planes == 4:
        return _place(index, by_mask, values.view(np.uint32), out.view(np.uint32))
    return _place(index, by_mask, values.view(np.uint64), out.view(np.uint64))


@_jit
def decode_sparse(sources, limits, bounds, symbols, chunk_symbols, rotated, by_mask, out):
    """Undo `encode_sparse` into `out`, (symbols · planes,) uint8, aligned; otherwise as `decode_planes`."""
    streams = sources.size
    planes = streams - 1
    tables, built = np.empty((streams, 1 << MAX_BITS), np.uint64), np.zeros((streams, MAX_TABLE_BYTES + 2), np.uint8)
    rows = np.empty((LANES, ROW), np.uint8)
    tail = np.zeros(LANES * SEGMENT * MAX_BITS // 8 + 16, np.uint8)
    most = min(chunk_symbols, symbols)
    index, parts = np.empty(most + most // SKIP + 1, np.uint8), np.empty((planes, most), np.uint8)
    values = np.empty(most * planes, np.uint8)
    places = np.empty(planes, np.uint64)
    for plane in range(planes):
        places[plane] = parts[plane].ctypes.data
    for chunk in range(bounds.shape[1] - 1):
        filled, used = 0, 0
        for stream in range(streams):
            if bounds[stream, chunk + 1] > limits[stream]:
                return BAD_LENGTHS, chunk, stream
            got = _decode_bytes(
                sources[stream],
                limits[stream],
                bounds[stream, chunk],
                bounds[stream, chunk + 1],
                built[stream],
                tables[stream],
                rows,
                tail,
                index if stream == 0 else parts[stream - 1],
            )
            if got < 0:
                return -got, chunk, stream
            if stream == 0:
                filled = got
            elif stream > 1 and got != used:
                return BAD_POSITION, chunk, stream
            else:
                used = got
        _merge(places, used, rotated, values[: used * planes])
        target = out[chunk * chunk_symbols * planes : min(symbols, (chunk + 1) * chunk_symbols) * planes]
        status = place(index[:filled], by_mask, values[: used * planes], planes, target)
        if status != OK:
            return status, chunk, 0
    return OK, 0, 0
