"""Byte planes of a tensor, the exponent alone in the first: `planes-huffman`.

Trained weights waste bits in the exponent only: sign and mantissa are almost uniform, while the exponent of bf16
holds about 2.7 of its 8 bits (ZipNN, Hershcovitch et al. 2024, arXiv:2411.05239; DFloat11, Zhang et al. 2025,
arXiv:2504.11651). A float is rotated left by one bit, so that the sign goes to the end and the exponent begins the
word, and the word is cut into bytes. Each byte plane is Huffman coded, or kept as it is where that gains nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from modelpress.codec.base import Bytes, Codec, Stream
from modelpress.codec.coders import cut, huffman_stream
from modelpress.config import CompressConfig
from modelpress.dtypes import DType

WORDS: dict[int, np.dtype[np.unsignedinteger[Any]]] = {
    1: np.dtype("<u1"),
    2: np.dtype("<u2"),
    4: np.dtype("<u4"),
    8: np.dtype("<u8"),
}


def plane_names(dtype: DType, prefix: str = "plane") -> list[str]:
    """Names of the planes, most significant byte first."""
    return [f"{prefix}{index}" for index in range(dtype.itemsize)]


def split(raw: Bytes, dtype: DType) -> list[Bytes]:
    """Planes of (symbols · itemsize,) bytes: itemsize arrays of (symbols,) uint8, most significant first."""
    if dtype.itemsize == 1:
        return [raw]
    if dtype.is_float:
        word = raw.view(WORDS[dtype.itemsize])
        raw = ((word << 1) | (word >> (8 * dtype.itemsize - 1))).view(np.uint8)
    columns = raw.reshape(-1, dtype.itemsize)
    return [np.ascontiguousarray(columns[:, index]) for index in reversed(range(dtype.itemsize))]


def merge(planes: Sequence[Bytes], dtype: DType, out: Bytes) -> None:
    """Undo `split` into `out`, (symbols · itemsize,) uint8."""
    if dtype.itemsize == 1:
        out[:] = planes[0]
        return
    word = out.view(WORDS[dtype.itemsize])
    if dtype.itemsize == 2 and dtype.is_float:
        _merge_halves(planes[0], planes[1], word)
        return
    columns = out.reshape(-1, dtype.itemsize)
    for index, plane in enumerate(planes):
        columns[:, dtype.itemsize - 1 - index] = plane
    if dtype.is_float:
        sign = word << (8 * dtype.itemsize - 1)
        np.right_shift(word, 1, out=word)
        np.bitwise_or(word, sign, out=word)


def _merge_halves(high: Bytes, low: Bytes, word: np.ndarray) -> None:
    """Rotated 16-bit words from two planes; whole-word operations vectorise where strided byte copies do not."""
    np.left_shift(high, 7, out=word, dtype=word.dtype)
    wide = low.astype(word.dtype)
    word |= wide >> 1
    wide <<= 15
    word |= wide


class PlanesHuffman(Codec):
    """Byte planes, each Huffman coded or raw."""

    codec_id = "planes-huffman"

    def suits(self, raw: Bytes, dtype: DType) -> bool:  # noqa: ARG002
        """Always."""
        return True

    def layout(self, dtype: DType) -> dict[str, int | None]:
        """One byte per symbol in each plane."""
        return dict.fromkeys(plane_names(dtype), 1)

    def encode(self, raw: Bytes, dtype: DType, config: CompressConfig) -> list[Stream]:
        """See `Codec.encode`."""
        chunks = [split(chunk, dtype) for chunk in cut(raw, config.chunk_symbols * dtype.itemsize)]
        return [
            huffman_stream(name, [planes[index] for planes in chunks], or_raw=True)
            for index, name in enumerate(plane_names(dtype))
        ]

    def decode_chunk(self, parts: Sequence[Bytes], dtype: DType, out: Bytes) -> None:
        """See `Codec.decode_chunk`."""
        merge(parts, dtype, out)
