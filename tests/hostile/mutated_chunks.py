"""Damaged chunks given to the compiled loops, past all checks: `python -m tests.hostile.mutated_chunks ROUNDS SEED`.

Every body and the output end where a page without rights begins: a read or a write one byte too far ends the process.
Bytes before the output are guards. Prints how many chunks were refused, and how many gave something.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import numpy as np

from modelpress.codec import CODECS, Bytes, Stream
from modelpress.codec.base import ChunkError
from modelpress.config import CompressConfig
from modelpress.dtypes import DTYPES

SEGMENT = 4096
GUARD = 64
CASES = [
    (codec, dtype, symbols, chunk)
    for codec in ("planes-huffman", "rle-huffman", "mask-huffman")
    for dtype in ("I8", "BF16", "F32", "F64")
    for symbols, chunk in ((1, 256), (700, 256), (4 * SEGMENT + 5, 1 << 20))
]


class Fenced:
    """Memory whose last byte is the last that may be touched."""

    def __init__(self, size: int) -> None:
        page = mmap.PAGESIZE
        self._end = -(-size // page) * page
        self._memory = mmap.mmap(-1, self._end + page)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(address + self._end), page, 0) == 0

    def last(self, size: int) -> Bytes:
        """The last bytes before the fence."""
        return np.frombuffer(self._memory, np.uint8, size, self._end - size)

    def put(self, data: bytes) -> memoryview:
        """Data right before the fence."""
        self.last(len(data))[:] = np.frombuffer(data, np.uint8)
        return self.last(len(data)).data


def damaged(body: bytes, source: np.random.Generator) -> bytes:
    """Heads, tables, lengths or bits changed; cut short; or longer."""
    changed = bytearray(body)
    reach = min(len(changed), int(source.choice([4, 6, 12, 80, len(changed), len(changed)])))
    for _ in range(int(source.integers(1, 5))):
        if reach:
            changed[int(source.integers(reach))] = int(source.choice([0, 1, 2, 127, 128, 254, 255, *source.bytes(4)]))
    kind = source.integers(6)
    if kind == 0:
        return bytes(changed[: int(source.integers(len(changed) + 1))])
    return bytes(changed) + source.bytes(int(source.integers(1, 40))) if kind == 1 else bytes(changed)


def sample(dtype: str, symbols: int, source: np.random.Generator) -> Bytes:
    """Elements of which half are zeros, each byte skewed or, in some samples, of eight even bits."""
    width = DTYPES[dtype].itemsize
    spread = float(source.choice([2, 12, 60]))
    values = np.clip(source.standard_normal((symbols, width)) * spread + 120, 0, 255).astype(np.uint8)
    values[source.random(symbols) < 0.5] = 0
    return values.reshape(-1)


def run(rounds: int, seed: int) -> tuple[int, int]:
    source = np.random.default_rng(seed)
    fences, target = [Fenced(300_000) for _ in range(9)], Fenced(300_000)
    refused = passed = 0
    for codec_id, name, symbols, chunk_symbols in CASES:
        codec, dtype = CODECS[codec_id], DTYPES[name]
        config = CompressConfig.model_construct(chunk_symbols=chunk_symbols, zstd_level=1)
        size = symbols * dtype.itemsize
        for number in range(rounds):
            if number % 100 == 0:
                streams = codec.encode(sample(name, symbols, source), dtype, config)
            hurt = int(source.integers(len(streams)))
            parts = []
            for index, stream in enumerate(streams):
                body = bytes(stream.body)
                if index == hurt or source.random() < 0.1:
                    body = damaged(body, source)
                bounds = np.minimum(stream.bounds, len(body))
                bounds[-1] = len(body)
                parts.append(Stream(stream.name, stream.coder, fences[index].put(body), bounds))
            guarded = target.last(GUARD + size)
            guarded[:GUARD] = 99
            try:
                codec.decode_into(parts, dtype, symbols, chunk_symbols, guarded[GUARD:])
                passed += 1
            except ChunkError:
                refused += 1
            assert (guarded[:GUARD] == 99).all(), (codec_id, name, symbols, number)
    return refused, passed


if __name__ == "__main__":
    print(*run(int(sys.argv[1]), int(sys.argv[2])))
