# mypy: ignore-errors
# Triton types its kernels when it compiles them; Python's checker cannot.
"""The two Triton kernels of `gpu`. Importing this imports triton, which reads TRITON_INTERPRET as it decorates.

Arguments are trusted as far as lengths go: `gpu` checks them on the host before it launches. Of the coded bits nothing
is trusted: loads end at the segment's last word, a table gives at most 11 bits, and stores are counted, not decoded.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode_segments(
    words,
    tables,
    begins,
    lengths,
    table_of,
    slots,
    jobs,
    segments,
    symbols,
    chunk_symbols,
    per_chunk,
    slot_words,
    SEGMENT: tl.constexpr,
    MAX_BITS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Decode one segment per lane, each to its own slot of the scratch memory.

    Args:
        words: the coded bytes, uint32; 4-byte aligned.
        tables: (tables, 2**MAX_BITS) uint16: the bits that a symbol takes (0 to MAX_BITS), and above them the symbol.
        begins: (jobs,) int64, where each segment begins in `words`, in bytes.
        lengths: (jobs,) int32, its bytes.
        table_of: (jobs,) int32, its table.
        slots: (jobs, slot_words) uint64, eight symbols each; a segment's last word is filled up with any symbols.
        jobs: segments of all coded planes, plane by plane; `segments` of one plane.
        symbols: elements of a plane; `chunk_symbols` of every chunk but the last, and `per_chunk` its segments.
    """
    job = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    alive = job < jobs
    segment = job % segments
    inside = segment % per_chunk * SEGMENT
    left = tl.minimum(chunk_symbols - inside, symbols - segment // per_chunk * chunk_symbols - inside)
    count = tl.where(alive, tl.minimum(left, SEGMENT), 0).to(tl.int32)

    begin = tl.load(begins + job, mask=alive, other=0)
    stop = begin + tl.load(lengths + job, mask=alive, other=0) + 3 >> 2
    row = tables + tl.load(table_of + job, mask=alive, other=0).to(tl.int64) * (1 << MAX_BITS)
    place = slots + job * slot_words

    # `window` holds the next `have` bits, lowest first; above them are zeros. Every word is loaded once.
    at = begin >> 2
    skip = (begin & 3).to(tl.int32) * 8
    window = tl.load(words + at, mask=alive & (at < stop), other=0).to(tl.uint64) >> skip.to(tl.uint64)
    at += 1
    have = 32 - skip
    for word in range((tl.max(count) + 7) // 8):
        packed = tl.zeros([LANES], tl.uint64)
        for step in tl.static_range(8):
            if step % 2 == 0:
                # 32 bits or more are enough for two symbols, and leave room for one more word.
                short = have < 32
                more = tl.load(words + at, mask=short & (at < stop), other=0).to(tl.uint64)
                window |= more << tl.where(short, have, 0).to(tl.uint64)
                have += tl.where(short, 32, 0)
                at += tl.where(short, 1, 0)
            entry = tl.load(row + (window & ((1 << MAX_BITS) - 1)).to(tl.int64)).to(tl.uint64)
            packed |= (entry >> 8) << (8 * step)
            window >>= entry & 255
            have -= (entry & 255).to(tl.int32)
        tl.store(place + word, packed, mask=word * 8 < count)


@triton.jit
def merge_planes(
    raw,
    slots,
    out,
    symbols,
    chunk_symbols,
    per_chunk,
    raw_bytes,
    slot_bytes,
    all_slots_bytes,
    PLANES: tl.constexpr,
    CODED: tl.constexpr,
    ROTATED: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Put the planes' bytes together, a block of one segment per program, and undo the rotation.

    Args:
        raw: the planes that are not coded, uint8, `raw_bytes` from one to the next.
        slots: the coded planes' segments, uint8: `slot_bytes` from one segment to the next, `all_slots_bytes` from
            one plane to the next.
        out: (symbols,) unsigned integers of PLANES bytes.
        symbols: elements; `chunk_symbols` of every chunk but the last, and `per_chunk` its segments.
        CODED: bit p is set where plane p is coded.
    """
    segment = tl.program_id(0).to(tl.int64)
    inside = segment % per_chunk * SEGMENT
    start = segment // per_chunk * chunk_symbols + inside
    count = tl.minimum(tl.minimum(chunk_symbols - inside, symbols - start), SEGMENT)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mine = index < count
    wide: tl.constexpr = tl.uint64 if PLANES == 8 else tl.uint32
    word = tl.zeros([BLOCK], wide)
    from_slots, from_raw = slots + segment * slot_bytes, raw + start
    for plane in tl.static_range(PLANES):
        if (CODED >> plane) & 1:
            byte = tl.load(from_slots + index, mask=mine, other=0)
            from_slots += all_slots_bytes
        else:
            byte = tl.load(from_raw + index, mask=mine, other=0)
            from_raw += raw_bytes
        word = (word << 8) | byte.to(wide)
    if ROTATED:
        word = (word >> 1) | (word << (8 * PLANES - 1))
    tl.store(out + start + index, word.to(out.dtype.element_ty), mask=mine)


INTERPRETED = not isinstance(decode_segments, triton.JITFunction)
"""Whether TRITON_INTERPRET was set: the kernels run on the CPU, in numpy, for tests."""
