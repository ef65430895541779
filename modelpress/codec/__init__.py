"""Lossless codecs: a tensor's bytes to streams of independently decodable chunks, and back bit by bit.

A codec is a transform and a coder. `CODECS` is the table of all that a pack may hold; ids are part of the format and
are never given a new meaning.
"""

from __future__ import annotations

from modelpress.codec.base import Bounds, Buffer, Bytes, Codec, Coder, Stream, check_streams, decode
from modelpress.codec.entropy import bound_bytes, entropy_bits
from modelpress.codec.plain import Raw, Zstd
from modelpress.codec.planes import PlanesHuffman
from modelpress.codec.sparse import MaskHuffman, RleHuffman

CODECS: dict[str, Codec] = {
    codec.codec_id: codec for codec in (Raw(), Zstd(), PlanesHuffman(), RleHuffman(), MaskHuffman())
}

__all__ = [
    "CODECS",
    "Bounds",
    "Buffer",
    "Bytes",
    "Codec",
    "Coder",
    "Stream",
    "bound_bytes",
    "check_streams",
    "decode",
    "entropy_bits",
]
