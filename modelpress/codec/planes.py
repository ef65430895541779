"""Byte planes of a tensor, the exponent alone in the first: `planes-huffman`.

Trained weights waste bits in the exponent only: sign and mantissa are almost uniform, while the exponent of bf16
holds about 2.7 of its 8 bits (ZipNN, Hershcovitch et al. 2024, arXiv:2411.05239; DFloat11, Zhang et al. 2025,
arXiv:2504.11651). A float is rotated left by one bit, so that the sign goes to the end and the exponent begins the
word, and the word is cut into bytes. Each byte plane is Huffman coded where that gains something, chunk by chunk: a
mantissa's lower bytes are noise in most matrices, and not in those that came from half precision or hold few values.

A plane of one-byte symbols serves fp8, int8, indices of a codebook, and int4 packed in pairs as well: a code for
pairs of nibbles is at least as small as one for nibbles, and gives two weights per symbol.
"""

from __future__ import annotations

from collections.abc import Sequence

from modelpress.codec.base import Bytes, Codec, Stream
from modelpress.codec.coders import decode_planes, encode_planes
from modelpress.config import CompressConfig
from modelpress.dtypes import DType


def plane_names(dtype: DType, prefix: str = "plane") -> list[str]:
    """Names of the planes, most significant byte first."""
    return [f"{prefix}{index}" for index in range(dtype.itemsize)]


class PlanesHuffman(Codec):
    """Byte planes, each Huffman coded or raw."""

    codec_id = "planes-huffman"
    coders = ("raw", "huffman", "zstd")
    decode_bytes_per_second = 1e9

    def suits(self, raw: Bytes, dtype: DType) -> bool:  # noqa: ARG002
        """Always."""
        return True

    def layout(self, dtype: DType) -> dict[str, int | None]:
        """One byte per symbol in each plane."""
        return dict.fromkeys(plane_names(dtype), 1)

    def encode(self, raw: Bytes, dtype: DType, config: CompressConfig) -> list[Stream]:
        """See `Codec.encode`."""
        return encode_planes(raw, dtype, config.chunk_symbols, plane_names(dtype))

    def decode_into(
        self, streams: Sequence[Stream], dtype: DType, symbols: int, chunk_symbols: int, out: Bytes
    ) -> None:
        """See `Codec.decode_into`."""
        decode_planes(streams, dtype, symbols, chunk_symbols, out)
