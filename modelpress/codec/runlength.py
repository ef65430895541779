"""Run-length coding of sparse tensors by relative index: `rle-huffman`.

Each element whose bits are not all zero is stored as the number of zeros before it (a gap of one byte) and its value;
both are Huffman coded on their own, as in Deep Compression (Han et al. 2016, arXiv:1510.00149, section 2). A Huffman
code alone cannot go under one bit per zero. A gap byte of 255 stands for 255 zeros and no value; zeros after
the last value of a chunk are not stored. −0.0 is a value: only all-zero bits are a zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from modelpress.codec.base import Bytes, Codec, Stream
from modelpress.codec.coders import cut, huffman_stream
from modelpress.codec.planes import WORDS, merge, plane_names, split
from modelpress.config import CompressConfig
from modelpress.dtypes import DType

SKIP = 255
MIN_ZEROS = 0.4
"""Share of zeros under which plain planes are smaller; not worth a try."""


def gaps_of(positions: npt.NDArray[np.int64]) -> Bytes:
    """Gap bytes of rising positions: (values + skips,) uint8."""
    gaps = np.diff(positions, prepend=-1) - 1
    last = np.cumsum(gaps // SKIP + 1) - 1
    coded = np.full(int(last[-1]) + 1 if last.size else 0, SKIP, np.uint8)
    coded[last] = gaps % SKIP
    return coded


def positions_of(gaps: Bytes) -> npt.NDArray[np.int64]:
    """Undo `gaps_of`: (values,) int64."""
    is_value = gaps != SKIP
    ends = np.cumsum(gaps + is_value.astype(np.int64)) - 1
    positions: npt.NDArray[np.int64] = ends[is_value]
    return positions


class RleHuffman(Codec):
    """Gaps and values of a sparse tensor."""

    codec_id = "rle-huffman"

    def suits(self, raw: Bytes, dtype: DType) -> bool:
        """Enough zeros."""
        words = raw.view(WORDS[dtype.itemsize])
        return int(np.count_nonzero(words)) <= (1 - MIN_ZEROS) * words.size

    def layout(self, dtype: DType) -> dict[str, int | None]:
        """Gaps, then the values' planes; their lengths vary by chunk."""
        return dict.fromkeys(["gaps", *plane_names(dtype, "values")])

    def encode(self, raw: Bytes, dtype: DType, config: CompressConfig) -> list[Stream]:
        """See `Codec.encode`."""
        gaps, values = [], []
        for chunk in cut(raw, config.chunk_symbols * dtype.itemsize):
            words = chunk.view(WORDS[dtype.itemsize])
            positions = np.flatnonzero(words)
            gaps.append(gaps_of(positions))
            values.append(split(words[positions].view(np.uint8), dtype))
        return [
            huffman_stream("gaps", gaps, or_raw=False),
            *(
                huffman_stream(name, [planes[index] for planes in values], or_raw=False)
                for index, name in enumerate(plane_names(dtype, "values"))
            ),
        ]

    def decode_chunk(self, parts: Sequence[Bytes], dtype: DType, out: Bytes) -> None:
        """See `Codec.decode_chunk`."""
        gaps, planes = parts[0], parts[1:]
        positions = positions_of(gaps)
        counts = {positions.size, *(plane.size for plane in planes)}
        if len(counts) > 1:
            raise ValueError(f"{positions.size} gaps for values of {[plane.size for plane in planes]} bytes")
        words = out.view(WORDS[dtype.itemsize])
        if positions.size and int(positions[-1]) >= words.size:
            raise ValueError(f"a value at position {int(positions[-1])} of {words.size}")
        values = np.empty(positions.size * dtype.itemsize, np.uint8)
        merge(planes, dtype, values)
        words[:] = 0
        words[positions] = values.view(words.dtype)
