"""Between streams and planes: the calls into the compiled loops, and zstandard's frames.

`kernels` is imported where it is called: importing numba takes longer than most uses of modelpress take in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from modelpress.codec.base import HEAD_BYTES, WORDS, Bytes, ChunkError, Coder, Stream
from modelpress.dtypes import DType

WRONG = (
    "",
    "a table that is no complete Huffman code",
    "lengths that do not add up to the chunk",
    "positions and values that do not fit the chunk",
)
"""What a status of the compiled loops means."""


def cut(raw: Bytes, bytes_per_chunk: int) -> list[Bytes]:
    """Consecutive views of `bytes_per_chunk` bytes; the last may be shorter."""
    return [raw[start : start + bytes_per_chunk] for start in range(0, raw.size, bytes_per_chunk)]


def is_rotated(dtype: DType) -> bool:
    """Whether a dtype's words are rotated left by a bit before they are cut, so that planes begin with the exponent."""
    return dtype.is_float and dtype.itemsize > 1


def words_of(raw: Bytes, dtype: DType) -> npt.NDArray[Any]:
    """(elements · itemsize,) bytes as (elements,) unsigned integers, aligned and contiguous."""
    raw = np.ascontiguousarray(raw)
    return (raw.copy() if raw.ctypes.data % dtype.itemsize else raw).view(WORDS[dtype.itemsize])


def count_planes(raw: Bytes, dtype: DType) -> npt.NDArray[np.int64]:
    """Counts of every byte value in every plane: (itemsize, 256) int64."""
    from modelpress.codec import kernels

    counts = np.zeros((dtype.itemsize, 256), np.int64)
    kernels.count_planes(words_of(raw, dtype).view(np.uint8), dtype.itemsize, is_rotated(dtype), counts)
    return counts


def encode_planes(
    raw: Bytes, dtype: DType, chunk_symbols: int, names: Sequence[str], coded: Sequence[bool] | None = None
) -> list[Stream]:
    """Byte planes as streams, each Huffman coded or as it is: where some chunk gains by it, unless `coded` says."""
    from modelpress.codec import kernels

    symbols = raw.size // dtype.itemsize
    chunks = -(-symbols // chunk_symbols)
    words = words_of(raw, dtype).view(np.uint8)
    worth = np.ones((dtype.itemsize, chunks), np.bool_)
    if coded is None:
        kernels.judge_planes(words, dtype.itemsize, is_rotated(dtype), chunk_symbols, worth)
    is_coded: npt.NDArray[np.bool_] = np.array(worth.any(axis=1) if coded is None else coded)
    sizes = np.where(is_coded, kernels.coded_capacity(symbols, chunks), symbols)
    bodies = [np.empty(size, np.uint8) for size in sizes]
    bounds = np.zeros((len(names), chunks + 1), np.int64)
    kernels.encode_planes(
        words, dtype.itemsize, is_rotated(dtype), chunk_symbols, is_coded, worth, *_places(bodies), bounds
    )
    useless = is_coded & (bounds[:, -1] == symbols + HEAD_BYTES * chunks)
    if coded is None and useless.any():  # the probes said yes and every chunk no
        return encode_planes(raw, dtype, chunk_symbols, names, (is_coded & ~useless).tolist())
    return _streams(names, ["huffman" if huffman else "raw" for huffman in is_coded], bodies, bounds)


def encode_sparse(raw: Bytes, dtype: DType, chunk_symbols: int, names: Sequence[str], *, by_mask: bool) -> list[Stream]:
    """Where the values are, as a mask or as gaps, and the values' planes; all Huffman coded."""
    from modelpress.codec import kernels

    words = words_of(raw, dtype)
    chunks = -(-words.size // chunk_symbols)
    values = int(np.count_nonzero(words))
    index = words.size // 8 + chunks if by_mask else values + words.size // kernels.SKIP
    capacities = [kernels.coded_capacity(index, chunks), *[kernels.coded_capacity(values, chunks)] * dtype.itemsize]
    bodies = [np.empty(capacity, np.uint8) for capacity in capacities]
    bounds = np.zeros((len(names), chunks + 1), np.int64)
    kernels.encode_sparse(
        words.view(np.uint8), dtype.itemsize, is_rotated(dtype), chunk_symbols, by_mask, *_places(bodies), bounds
    )
    return _streams(names, ["huffman"] * len(names), bodies, bounds)


def decode_planes(streams: Sequence[Stream], dtype: DType, symbols: int, chunk_symbols: int, out: Bytes) -> None:
    """Undo `encode_planes`; zstandard frames are opened one chunk at a time.

    Raises:
        ChunkError: a chunk is not what `encode_planes` writes.
    """
    from modelpress.codec import kernels

    def run(parts: Sequence[Stream], first: int, count: int, into: Bytes) -> None:
        is_coded = np.array([part.coder == "huffman" for part in parts])
        sources, limits, bounds = _inputs(parts)
        result = kernels.decode_planes(sources, limits, bounds, is_coded, count, chunk_symbols, is_rotated(dtype), into)
        _check(result, parts, first)

    if all(stream.coder != "zstd" for stream in streams):
        run(streams, 0, symbols, out)
        return
    for chunk in range(-(-symbols // chunk_symbols)):
        start = chunk * chunk_symbols
        count = min(chunk_symbols, symbols - start)
        parts = [_opened(stream, chunk, count) for stream in streams]
        run(parts, chunk, count, out[start * dtype.itemsize : (start + count) * dtype.itemsize])


def decode_sparse(
    streams: Sequence[Stream], dtype: DType, symbols: int, chunk_symbols: int, out: Bytes, *, by_mask: bool
) -> None:
    """Undo `encode_sparse`.

    Raises:
        ChunkError: a chunk is not what `encode_sparse` writes.
    """
    from modelpress.codec import kernels

    if all(stream.coder == "huffman" for stream in streams):
        result = kernels.decode_sparse(*_inputs(streams), symbols, chunk_symbols, is_rotated(dtype), by_mask, out)
        _check(result, streams, 0)
        return
    for chunk in range(-(-symbols // chunk_symbols)):
        count = min(chunk_symbols, symbols - chunk * chunk_symbols)
        target = out[chunk * chunk_symbols * dtype.itemsize :][: count * dtype.itemsize]
        index, *planes = (chunk_bytes(stream, chunk, count) for stream in streams)
        if len({plane.size for plane in planes}) > 1:
            raise ChunkError(chunk, f"values of {[plane.size for plane in planes]} bytes")
        values = np.empty(planes[0].size * dtype.itemsize, np.uint8)
        bodies = [Stream.of("", "raw", [plane.data]) for plane in planes]
        decode_planes(bodies, dtype, planes[0].size, max(planes[0].size, 1), values)
        status = kernels.place(index, by_mask, values, dtype.itemsize, target)
        _check((status, 0, 0), streams, chunk)


def chunk_bytes(stream: Stream, chunk: int, limit: int) -> Bytes:
    """What one chunk holds, at most `limit` bytes: (bytes,) uint8.

    Raises:
        ChunkError: it is damaged, or holds more.
    """
    part = _opened(stream, chunk, limit)
    if part.coder == "raw":
        return np.frombuffer(part.body, np.uint8)
    size = int.from_bytes(bytes(part.body[:4]), "little")
    if size > limit:
        raise ChunkError(chunk, f"stream {stream.name!r} holds {size} symbols, at most {limit} fit")
    out = np.empty(size, np.uint8)
    from modelpress.codec import kernels

    result = kernels.decode_planes(*_inputs([part]), np.array([True]), size, max(size, 1), False, out)
    _check(result, [part], chunk)
    return out


def zstd_stream(name: str, chunks: Sequence[Bytes], level: int) -> Stream:
    """Compress chunks with zstandard at `level`."""
    compressor = zstandard.ZstdCompressor(level=level)
    return Stream.of(name, "zstd", [compressor.compress(chunk.data) for chunk in chunks])


def decompress(frame: bytes | memoryview, limit: int, chunk: int) -> bytes:
    """Open one zstandard frame of at most `limit` bytes.

    Raises:
        ChunkError: it is damaged.
    """
    try:
        return zstandard.ZstdDecompressor().decompress(frame, max_output_size=limit, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ChunkError(chunk, str(error)) from error


def _opened(stream: Stream, chunk: int, limit: int) -> Stream:
    """One chunk as a stream of its own, without the frame of zstandard."""
    part = stream.cut(chunk, chunk + 1)
    if stream.coder != "zstd":
        return part
    return Stream.of(stream.name, "raw", [decompress(part.body, limit, chunk)])


def _inputs(streams: Sequence[Stream]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Addresses, readable bytes and bounds of the bodies; the streams must outlive the call."""
    arrays = [np.frombuffer(stream.body, np.uint8) for stream in streams]
    sources = np.array([array.ctypes.data for array in arrays], np.uint64)
    limits = np.array([array.size for array in arrays], np.int64)
    return sources, limits, np.stack([stream.bounds for stream in streams])


def _places(bodies: Sequence[Bytes]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
    return (
        np.array([body.ctypes.data for body in bodies], np.uint64),
        np.array([body.size for body in bodies], np.int64),
    )


def _streams(
    names: Sequence[str], coders: Sequence[Coder], bodies: Sequence[Bytes], bounds: npt.NDArray[np.int64]
) -> list[Stream]:
    # What was reserved and not written was never touched, and takes no memory.
    return [
        Stream(name, coder, body[: int(own[-1])].data, own)
        for name, coder, body, own in zip(names, coders, bodies, bounds, strict=True)
    ]


def _check(result: tuple[int, int, int], streams: Sequence[Stream], first: int) -> None:
    status, chunk, which = result
    if status:
        raise ChunkError(first + chunk, f"stream {streams[which].name!r}: {WRONG[status]}")
