"""What a codec is: a reversible way from a tensor's bytes to a few streams of independently decodable chunks."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import zstandard

from modelpress.config import CompressConfig
from modelpress.dtypes import DType
from modelpress.errors import CorruptionError

Bytes = npt.NDArray[np.uint8]
Buffer = bytes | memoryview
Coder = Literal["raw", "zstd"]


@dataclass(frozen=True)
class Stream:
    """One part of a coded tensor, cut into chunks; chunk i of every stream together give the i-th run of symbols.

    `coder` says what a chunk is: its bytes as they are, or one standard zstandard frame with its content size.
    """

    name: str
    coder: Coder
    chunks: Sequence[Buffer]

    @property
    def size_bytes(self) -> int:
        """Length of all chunks."""
        return sum(len(chunk) for chunk in self.chunks)


class Codec(abc.ABC):
    """A lossless codec. Instances hold no state and are safe to share between threads."""

    codec_id: ClassVar[str]

    @abc.abstractmethod
    def suits(self, raw: Bytes, dtype: DType) -> bool:
        """Whether it is worth trying on this tensor (a cheap look, not a promise)."""

    @abc.abstractmethod
    def layout(self, dtype: DType) -> dict[str, int | None]:
        """Streams in order: name to bytes per symbol; None where a chunk's length varies (at most one per symbol)."""

    @abc.abstractmethod
    def encode(self, raw: Bytes, dtype: DType, config: CompressConfig) -> list[Stream]:
        """Code a tensor's bytes, (elements · itemsize,) uint8, in chunks of `config.chunk_symbols` elements."""

    @abc.abstractmethod
    def decode_chunk(self, parts: Sequence[Bytes], dtype: DType, out: Bytes) -> None:
        """Rebuild one chunk into `out`, (symbols · itemsize,) uint8, from its decompressed parts in layout's order.

        Raises:
            ValueError: the parts contradict each other.
        """


def decode(
    codec: Codec,
    streams: Sequence[Stream],
    dtype: DType,
    symbols: int,
    chunk_symbols: int,
    *,
    doing: str,
    consumed: Callable[[Buffer], None] | None = None,
) -> Bytes:
    """Rebuild a run of `symbols` elements from its streams: (symbols · itemsize,) uint8.

    All lengths are checked before the result is allocated; `consumed` sees every coded chunk in decoding order.

    Raises:
        CorruptionError: the streams are not what the codec writes for so many symbols.
    """
    check_streams(codec, streams, dtype, symbols, chunk_symbols, doing)
    out = np.empty(symbols * dtype.itemsize, np.uint8)
    decompressor = zstandard.ZstdDecompressor()
    limits = [width or 1 for width in codec.layout(dtype).values()]
    for index, start in enumerate(range(0, symbols, chunk_symbols)):
        count = min(chunk_symbols, symbols - start)
        parts = []
        for stream, limit in zip(streams, limits, strict=True):
            chunk = stream.chunks[index]
            if consumed is not None:
                consumed(chunk)
            parts.append(_decode_part(decompressor, stream, chunk, limit * count, f"{doing}, chunk {index}"))
        try:
            codec.decode_chunk(parts, dtype, out[start * dtype.itemsize : (start + count) * dtype.itemsize])
        except ValueError as error:
            raise CorruptionError(f"{doing}, chunk {index}", found=str(error)) from error
    return out


def check_streams(
    codec: Codec, streams: Sequence[Stream], dtype: DType, symbols: int, chunk_symbols: int, doing: str
) -> None:
    """Refuse streams whose names, number of chunks or claimed sizes are not those of `symbols` elements.

    Raises:
        CorruptionError: they are not; both numbers are given.
    """
    layout = codec.layout(dtype)
    if [stream.name for stream in streams] != list(layout):
        raise CorruptionError(doing, found=f"streams {[s.name for s in streams]}", expected=f"streams {list(layout)}")
    chunks = -(-symbols // chunk_symbols)
    for stream in streams:
        where, width = f"{doing}, stream {stream.name!r}", layout[stream.name]
        if stream.coder == "raw" and width is None:
            raise CorruptionError(where, found="coder 'raw'", expected="coder 'zstd': its chunks vary in length")
        if len(stream.chunks) != chunks:
            raise CorruptionError(
                where, found=f"{len(stream.chunks)} chunks", expected=f"{chunks} for {symbols} symbols"
            )
        for index, chunk in enumerate(stream.chunks):
            limit = min(chunk_symbols, symbols - index * chunk_symbols) * (width or 1)
            size = len(chunk) if stream.coder == "raw" else frame_size(chunk, f"{where}, chunk {index}")
            if size > limit or (width is not None and size != limit):
                bound = f"at most {limit}" if width is None else str(limit)
                raise CorruptionError(f"{where}, chunk {index}", found=f"{size} bytes", expected=f"{bound} bytes")


def frame_size(frame: Buffer, doing: str) -> int:
    """Content size that a zstandard frame claims.

    Raises:
        CorruptionError: no frame, or one without a content size.
    """
    try:
        return zstandard.get_frame_parameters(frame).content_size
    except zstandard.ZstdError as error:
        raise CorruptionError(doing, found=str(error), expected="a zstandard frame") from error


def _decode_part(
    decompressor: zstandard.ZstdDecompressor, stream: Stream, chunk: Buffer, limit: int, doing: str
) -> Bytes:
    if stream.coder == "raw":
        return np.frombuffer(chunk, np.uint8)
    try:
        data = decompressor.decompress(chunk, max_output_size=limit, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptionError(f"{doing}, stream {stream.name!r}", found=str(error)) from error
    return np.frombuffer(data, np.uint8)
