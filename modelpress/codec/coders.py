"""The two ways in which chunks become zstandard frames: entropy coding alone, and matches as well."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import zstandard

from modelpress.codec.base import Bytes, Stream


def huffman_compressor() -> zstandard.ZstdCompressor:
    """A zstandard compressor that practically never finds a match, so that it is a Huffman coder.

    Its frames are standard (RFC 8878, literals sections). A minimal match of 7 bytes, the smallest hash table and the
    fast strategy leave byte planes of weights to the literals' Huffman code, at several times the speed of a search.
    Blocks that the code would not shrink are stored as they are.
    """
    parameters = zstandard.ZstdCompressionParameters.from_level(
        1, strategy=zstandard.STRATEGY_FAST, hash_log=6, min_match=7, target_length=0, window_log=17
    )
    return zstandard.ZstdCompressor(compression_params=parameters)


def huffman_stream(name: str, chunks: Sequence[Bytes], *, or_raw: bool) -> Stream:
    """Huffman code chunks; with `or_raw`, keep them as they are where that is no larger in all."""
    compressor = huffman_compressor()
    coded = Stream(name, "zstd", [compressor.compress(np.ascontiguousarray(chunk).data) for chunk in chunks])
    if or_raw and coded.size_bytes >= sum(chunk.size for chunk in chunks):
        return Stream(name, "raw", [np.ascontiguousarray(chunk).data for chunk in chunks])
    return coded


def zstd_stream(name: str, chunks: Sequence[Bytes], level: int) -> Stream:
    """Compress chunks with zstandard at `level`."""
    compressor = zstandard.ZstdCompressor(level=level)
    return Stream(name, "zstd", [compressor.compress(chunk.data) for chunk in chunks])


def cut(raw: Bytes, bytes_per_chunk: int) -> list[Bytes]:
    """Consecutive views of `bytes_per_chunk` bytes; the last may be shorter."""
    return [raw[start : start + bytes_per_chunk] for start in range(0, raw.size, bytes_per_chunk)]
