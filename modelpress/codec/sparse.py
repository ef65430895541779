"""Tensors with many zeros: where the values are, and the values: `rle-huffman` and `mask-huffman`.

A Huffman code alone cannot go under one bit per zero. `rle-huffman` stores each element whose bits are not all zero
as the number of zeros before it (a gap of one byte) and its value, both Huffman coded on their own, as in Deep
Compression (Han et al. 2016, arXiv:1510.00149, section 2). A gap byte of 255 stands for 255 zeros and no value; zeros
after the last value of a chunk are not stored. `mask-huffman` stores one bit per element and the values: smaller
where up to half are zeros, and for masks with a pattern (2:4 needs log2(6)/4 = 0.65 bits an element, and the code of
the mask's bytes finds that by itself), and for booleans. −0.0 is a value: only all-zero bits are a zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from modelpress.codec.base import Bytes, Codec, Stream
from modelpress.codec.coders import decode_sparse, encode_sparse, words_of
from modelpress.codec.planes import plane_names
from modelpress.config import CompressConfig
from modelpress.dtypes import DType


class _Sparse(Codec):
    coders = ("huffman", "zstd")
    index: ClassVar[str]
    min_zeros: ClassVar[float]
    """Share of zeros under which plain planes are smaller; not worth a try."""

    def suits(self, raw: Bytes, dtype: DType) -> bool:
        """Enough zeros."""
        words = words_of(raw, dtype)
        return int(np.count_nonzero(words)) <= (1 - self.min_zeros) * words.size

    def layout(self, dtype: DType) -> dict[str, int | None]:
        """The index, then the values' planes; their lengths vary by chunk."""
        return dict.fromkeys([self.index, *plane_names(dtype, "values")])

    def encode(self, raw: Bytes, dtype: DType, config: CompressConfig) -> list[Stream]:
        """See `Codec.encode`."""
        names = list(self.layout(dtype))
        return encode_sparse(raw, dtype, config.chunk_symbols, names, by_mask=self.index == "mask")

    def decode_into(
        self, streams: Sequence[Stream], dtype: DType, symbols: int, chunk_symbols: int, out: Bytes
    ) -> None:
        """See `Codec.decode_into`."""
        decode_sparse(streams, dtype, symbols, chunk_symbols, out, by_mask=self.index == "mask")


class RleHuffman(_Sparse):
    """Gaps and values of a sparse tensor."""

    codec_id = "rle-huffman"
    decode_bytes_per_second = 1e9
    index = "gaps"
    min_zeros = 0.4


class MaskHuffman(_Sparse):
    """Bit mask and values of a tensor with zeros."""

    codec_id = "mask-huffman"
    decode_bytes_per_second = 0.5e9
    index = "mask"
    min_zeros = 0.1

    def suits(self, raw: Bytes, dtype: DType) -> bool:
        """Enough zeros, or booleans."""
        return dtype.name == "BOOL" or super().suits(raw, dtype)
