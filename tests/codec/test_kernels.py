"""The compiled coder against the one that is written out, and against damaged chunks."""

from __future__ import annotations

import contextlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelpress.codec import CODECS, Bytes, Stream, decode, entropy_bits, huffman, kernels
from modelpress.codec.coders import chunk_bytes, count_planes, encode_planes
from modelpress.config import CompressConfig
from modelpress.dtypes import DTYPES, DType
from modelpress.errors import CorruptionError

U8 = DTYPES["U8"]
SEGMENT = kernels.SEGMENT
STORED = bytes([kernels.STORED_FIRST, kernels.STORED_LAST])

counts_of_symbols = st.dictionaries(st.integers(0, 255), st.integers(1, 10**6), min_size=1, max_size=256).map(
    lambda counts: np.array([counts.get(symbol, 0) for symbol in range(256)], np.int64)
)


def coded(data: Bytes, chunk_symbols: int) -> Stream:
    return encode_planes(data, U8, chunk_symbols, ["plane0"], [True])[0]


def skewed(count: int, seed: int, spread: float = 2.0) -> Bytes:
    noise = np.random.default_rng(seed).standard_normal(count) * spread
    return np.clip(np.round(noise) + 120, 0, 255).astype(np.uint8)


@given(counts_of_symbols, st.integers(8, 15))
@settings(deadline=None)
def test_lengths_are_as_good_as_the_oracle(counts: np.ndarray, max_bits: int) -> None:
    found = np.zeros(256, np.int64)
    kernels.code_lengths(counts, max_bits, found)
    expected = huffman.code_lengths(counts, max_bits)
    if np.count_nonzero(counts) == 1:
        assert not found.any()
    else:
        assert (counts * found).sum() == (counts * expected).sum()
        assert found.max() <= max_bits


@given(counts_of_symbols)
@settings(deadline=None)
def test_words_are_the_canonical_ones_reversed(counts: np.ndarray) -> None:
    lengths = huffman.code_lengths(counts, kernels.MAX_BITS)
    words = np.zeros(256, np.int64)
    complete = kernels.canonical(lengths, words)
    assert complete == (np.count_nonzero(counts) > 1)
    if complete:
        code = huffman.canonical(lengths)
        for symbol in np.flatnonzero(lengths):
            spelled = format(code.words[symbol], f"0{code.lengths[symbol]}b")
            assert int(spelled[::-1], 2) == words[symbol]


@pytest.mark.parametrize("bits", [12, 15])
def test_codes_that_are_too_long_or_leave_gaps_are_no_code(bits: int) -> None:
    lengths = np.zeros(256, np.int64)
    lengths[:3] = 1, 2, 3
    assert not kernels.canonical(lengths, np.zeros(256, np.int64))
    lengths[3] = 3
    assert kernels.canonical(lengths, np.zeros(256, np.int64))
    lengths[4] = bits
    assert not kernels.canonical(lengths, np.zeros(256, np.int64))


@given(counts_of_symbols)
@settings(deadline=None)
def test_a_table_is_read_as_it_was_written(counts: np.ndarray) -> None:
    lengths = huffman.code_lengths(counts, kernels.MAX_BITS)
    present = np.flatnonzero(counts)
    if present.size == 1:
        return
    out = np.zeros(6 + kernels.MAX_TABLE_BYTES, np.uint8)
    end = kernels._write_lengths(out, 4, int(present[0]), int(present[-1]), lengths)
    assert end <= 4 + kernels.MAX_TABLE_BYTES
    found, position = read_table(out.tobytes(), int(out[4]), int(out[5]))
    assert np.array_equal(found, lengths)
    assert position == end


@given(counts_of_symbols)
@settings(deadline=None, max_examples=30)
def test_a_table_entry_is_what_the_bits_spell(counts: np.ndarray) -> None:
    lengths = huffman.code_lengths(counts, kernels.MAX_BITS)
    table = np.zeros(1 << kernels.MAX_BITS, np.uint64)
    if not kernels.build_table(lengths, table):
        return
    single = np.zeros(1 << kernels.MAX_BITS, np.uint16)
    assert kernels.build_single_table(lengths, single)
    code = huffman.canonical(lengths)
    by_word = {format(code.words[s], f"0{code.lengths[s]}b"): int(s) for s in np.flatnonzero(lengths)}
    for index in range(0, 1 << kernels.MAX_BITS, 7):
        bits = format(index, f"0{kernels.MAX_BITS}b")[::-1]
        symbols, used, word = [], 0, ""
        for position, bit in enumerate(bits):
            word += bit
            if word in by_word and len(symbols) < kernels.SYMBOLS_PER_ENTRY:
                symbols.append(by_word[word])
                used, word = position + 1, ""
        first = int(single[index])
        assert (first >> 8, first & 255) == (symbols[0], int(lengths[symbols[0]]))
        entry = int(table[index])
        assert (entry >> 56, entry >> 48 & 255) == (len(symbols), used)
        assert [entry >> (8 * at) & 255 for at in range(len(symbols))] == symbols


def read_table(chunk: bytes, first: int, last: int) -> tuple[np.ndarray, int]:
    """Code lengths by symbol, and where the table ends; two bits a symbol, four more after an escape."""
    lengths, bits = np.zeros(256, np.int64), np.unpackbits(np.frombuffer(chunk[6:], np.uint8), bitorder="little")
    at, length = 0, kernels.MAX_BITS
    for symbol in range(first, last + 1) if last > first else ():
        step, at = int(bits[at] + 2 * bits[at + 1]), at + 2
        if step == kernels.ESCAPE:
            length, at = int(bits[at : at + 4] @ [1, 2, 4, 8]), at + 4
        else:
            length += (0, 1, -1)[step]
        lengths[symbol] = length
    return lengths, 6 + -(-at // 8)


@pytest.mark.parametrize("count", [700, SEGMENT - 1, SEGMENT, SEGMENT + 1, 4 * SEGMENT, 5 * SEGMENT + 3])
@pytest.mark.parametrize("spread", [2.0, 20.0])
def test_segments_are_the_oracles_bits(count: int, spread: float) -> None:
    """A chunk is what FORMAT.md says: symbols, table, lengths of segments, their bits, lowest first."""
    data = skewed(count, 1, spread)
    chunk = bytes(coded(data, 1 << 20).body)
    assert int.from_bytes(chunk[:4], "little") == count
    first, last = chunk[4], chunk[5]
    assert (first, last) == (data.min(), data.max())
    lengths, position = read_table(chunk, first, last)
    sizes = [
        int.from_bytes(chunk[at : at + 2], "little") for at in range(position, position + 2 * -(-count // SEGMENT), 2)
    ]
    position += 2 * len(sizes)
    assert position + sum(sizes) == len(chunk)
    code = huffman.canonical(lengths)
    for start, size in zip(range(0, count, SEGMENT), sizes, strict=True):
        part, bits = data[start : start + SEGMENT], chunk[position : position + size]
        expected = np.unpackbits(np.frombuffer(huffman.encode(part, code), np.uint8))
        assert np.array_equal(np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little"), expected)
        position += size


@given(st.integers(1, 3 * SEGMENT), st.sampled_from([0.0, 1.0, 20.0, 50.0, 1e6]), st.integers(0, 2**32))
@settings(deadline=None, max_examples=100)
def test_no_chunk_takes_more_than_its_symbols_and_a_head(count: int, spread: float, seed: int) -> None:
    data = skewed(count, seed, spread) if spread < 1e6 else np.random.default_rng(seed).bytes(count)
    data = np.frombuffer(data, np.uint8)
    stream = coded(data, 1 << 20)
    assert stream.size_bytes <= 6 + count
    if bytes(stream.body[4:6]) == STORED:
        assert bytes(stream.body[6:]) == data.tobytes()
    assert np.array_equal(chunk_bytes(stream, 0, count), data)


def test_only_the_chunks_of_a_plane_that_gain_are_coded() -> None:
    """Matrices that were rounded to half precision among such that were not."""
    fine = np.random.default_rng(9).standard_normal(4 << 16).astype("<f4")
    fine[1 << 16 : 2 << 16] = fine[1 << 16 : 2 << 16].astype("<f2")
    raw = fine.view(np.uint8)
    streams = CODECS["planes-huffman"].encode(raw, DTYPES["F32"], CompressConfig(chunk_symbols=1 << 16))
    assert [stream.coder for stream in streams] == ["huffman", "raw", "huffman", "huffman"]
    assert [bytes(chunk[4:6]) == STORED for chunk in streams[3].chunks] == [True, False, True, True]
    found = decode(CODECS["planes-huffman"], streams, DTYPES["F32"], fine.size, 1 << 16, doing="test")
    assert np.array_equal(found, raw)


def test_a_chunk_without_symbols_has_the_head_of_the_format() -> None:
    raw = np.zeros(9000, np.uint8)
    raw[5000] = 1
    for stream in CODECS["rle-huffman"].encode(raw, U8, CompressConfig(chunk_symbols=4096)):
        assert bytes(stream.chunks[0]) == bytes(6)


def test_no_period_of_the_chunks_hides_what_a_code_would_save() -> None:
    """Noise in those segments that two even probes per chunk would meet."""
    segments = np.random.default_rng(3).integers(0, 256, (64, SEGMENT)).astype(np.uint8)
    segments[np.arange(64) % 16 != 0] %= 8
    (stream,) = encode_planes(segments.reshape(-1), U8, 1 << 17, ["plane0"])
    assert stream.size_bytes < 0.6 * segments.size


@pytest.mark.parametrize("body", [b"\3\0\0\0\1\0abcd", b"\3\0\0\0\1\0ab", b"\3\0\0\0\2\0abc", b"\3\0\0\0\5\5\1\0a"])
def test_stored_symbols_and_a_single_symbol_leave_nothing_over(body: bytes) -> None:
    with pytest.raises(CorruptionError, match=r"table|add up"):
        chunk_bytes_of(body)


def chunk_bytes_of(body: bytes) -> Bytes:
    stream = Stream.of("plane0", "huffman", [body])
    return decode(CODECS["planes-huffman"], [stream], U8, 3, 1 << 20, doing="test")


def test_a_constant_takes_no_bits() -> None:
    data = np.full(100_000, 7, np.uint8)
    stream = coded(data, 1 << 20)
    assert stream.size_bytes == 6 + 2 * -(-data.size // SEGMENT)
    assert np.array_equal(chunk_bytes(stream, 0, data.size), data)


def test_a_code_is_kept_while_it_fits_and_left_when_it_does_not() -> None:
    steady, other = skewed(3 << 16, 2), skewed(1 << 16, 3, spread=20.0)
    stream = coded(np.concatenate([steady, other]), 1 << 16)
    tables = [bytes(chunk[4:6]) for chunk in stream.chunks]
    assert tables[3] != tables[0]
    for chunk, data in zip(stream.chunks, np.split(np.concatenate([steady, other]), 4), strict=True):
        best = huffman.size_bits(np.bincount(data, minlength=256), huffman.build(data))
        assert len(chunk) <= 1.01 * best / 8 + 250


@pytest.mark.parametrize(("name", "scale"), [("BF16", 0.02), ("F16", 0.05), ("F32", 1.0), ("F64", 1.0)])
def test_weights_come_within_a_percent_of_their_bound(name: str, scale: float) -> None:
    weights = np.random.default_rng(3).standard_normal(1 << 19) * scale
    if name == "BF16":
        raw = (weights.astype("<f4").view("<u4") >> 16).astype("<u2").view(np.uint8)
    else:
        raw = weights.astype({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[name]).view(np.uint8)
    dtype = DTYPES[name]
    stored = sum(s.size_bytes for s in CODECS["planes-huffman"].encode(raw, dtype, CompressConfig()))
    bound = sum(entropy_bits(plane) for plane in count_planes(raw, dtype)) / 8
    # Of a double, the first plane holds the upper exponent alone: less than the one bit that a code takes.
    assert bound <= stored <= (1.02 if name == "F64" else 1.01) * bound


@pytest.mark.parametrize("dtype", [DTYPES[name] for name in ("I8", "I16", "BF16", "I32", "F32", "U64", "F64")], ids=str)
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_decodes_into_any_memory_with_any_number_of_threads(dtype: DType, offset: int) -> None:
    raw = np.repeat(skewed(200_000, 5), dtype.itemsize)
    codec, config = CODECS["planes-huffman"], CompressConfig(chunk_symbols=4096)
    streams = codec.encode(raw, dtype, config)
    memory = np.zeros(raw.size + 8, np.uint8)
    out = memory[offset : offset + raw.size]
    for threads in (1, 2, 7):
        memory[:] = 255
        found = decode(codec, streams, dtype, 200_000, 4096, doing="test", out=out, threads=threads)
        assert found is out
        assert np.array_equal(out, raw)
        assert (memory[:offset] == 255).all()
        assert (memory[offset + raw.size :] == 255).all()


def damaged(stream: Stream, body: bytes) -> Stream:
    return Stream(stream.name, stream.coder, body, np.array([0, len(body)], np.int64))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damage_is_refused_or_gives_other_symbols_but_never_leaves_its_memory(data: st.DataObject) -> None:
    """The digests find all damage; the decoder must only stay in bounds, end, and return so many symbols."""
    size, spread = data.draw(st.sampled_from([1, 100, SEGMENT + 1, 3 * SEGMENT])), data.draw(st.sampled_from([2, 40]))
    original = skewed(size, data.draw(st.integers(0, 9)), spread)
    stream = coded(original, 1 << 20)
    body = bytearray(stream.body)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(len(body) - 1, 300)))
        body[at] = data.draw(st.integers(0, 255))
    body = body[: data.draw(st.sampled_from([len(body), len(body), len(body) // 2, 5]))]
    guarded = np.full(original.size + 4096, 99, np.uint8)
    out = guarded[: original.size]
    with contextlib.suppress(CorruptionError):
        decode(CODECS["planes-huffman"], [damaged(stream, bytes(body))], U8, original.size, 1 << 20, doing="t", out=out)
    assert (guarded[original.size :] == 99).all()


@pytest.mark.parametrize("spread", [2.0, 40.0])
def test_a_stream_at_the_very_end_of_its_memory_is_not_read_beyond(spread: float) -> None:
    """A page without rights follows the body: one byte too far ends the process, and so the test."""
    import ctypes
    import mmap

    data = skewed(50_000, 6, spread)
    stream = coded(data, 1 << 20)
    page = mmap.PAGESIZE
    pages = -(-stream.size_bytes // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    anchor = ctypes.c_char.from_buffer(memory)
    address = ctypes.addressof(anchor)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + pages * page), page, 0) == 0
    start = pages * page - stream.size_bytes
    memory[start : pages * page] = bytes(stream.body)
    view = memoryview(memory)[start : pages * page]
    try:
        found = chunk_bytes(Stream(stream.name, "huffman", view, stream.bounds), 0, data.size)
        assert np.array_equal(found, data)
    finally:
        libc.mprotect(ctypes.c_void_p(address + pages * page), page, 3)
        view.release()


def test_chunks_are_decoded_on_their_own() -> None:
    data = skewed(5 * 4096 + 77, 8)
    stream = coded(data, 4096)
    for index, (begin, end) in enumerate(itertools.pairwise([*range(0, data.size, 4096), data.size])):
        assert np.array_equal(chunk_bytes(stream, index, 4096), data[begin:end])
