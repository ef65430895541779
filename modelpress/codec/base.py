"""What a codec is: a reversible way from a tensor's bytes to a few streams of independently decodable chunks."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import zstandard

from modelpress.codec.threads import share
from modelpress.config import CompressConfig
from modelpress.dtypes import DType
from modelpress.errors import CorruptionError

Bytes = npt.NDArray[np.uint8]
Bounds = npt.NDArray[np.int64]
Buffer = bytes | memoryview
Coder = Literal["raw", "zstd", "huffman"]

WORDS: dict[int, np.dtype[np.unsignedinteger[Any]]] = {
    1: np.dtype("<u1"),
    2: np.dtype("<u2"),
    4: np.dtype("<u4"),
    8: np.dtype("<u8"),
}
"""Unsigned integers by their bytes."""
MIN_PARALLEL_BYTES = 2**20
"""Tensors under this size are decoded by one thread: waking others would take longer."""
BLOCK = 4096
"""Chunks whose claims are checked together: fast, and in memory that does not grow with their number."""
HEAD_BYTES = 6
"""Of a chunk of coder `huffman`: the number of symbols, and what its table spans."""


class ChunkError(ValueError):
    """A chunk's parts contradict each other; `chunk` counts from the stream's begin."""

    def __init__(self, chunk: int, message: str) -> None:
        super().__init__(message)
        self.chunk = chunk


@dataclass(frozen=True, eq=False)
class Stream:
    """One part of a coded tensor, cut into chunks; chunk i of every stream together give the i-th run of symbols.

    `coder` says what a chunk is: its bytes as they are (`raw`), one standard zstandard frame with its content size
    (`zstd`), or a chunk of our Huffman coder (`huffman`, see `container/FORMAT.md`). Chunk i lies at
    `body[bounds[i]:bounds[i + 1]]`, and `bounds[0]` is 0.
    """

    name: str
    coder: Coder
    body: Buffer
    bounds: Bounds

    @classmethod
    def of(cls, name: str, coder: Coder, chunks: Sequence[Buffer]) -> Stream:
        """Join chunks."""
        bounds = np.cumsum([0, *(len(chunk) for chunk in chunks)], dtype=np.int64)
        return cls(name, coder, chunks[0] if len(chunks) == 1 else b"".join(chunks), bounds)

    @property
    def chunks(self) -> list[memoryview]:
        """The chunks, as views of the body."""
        return list(self.each_chunk())

    def each_chunk(self) -> Iterator[memoryview]:
        """The chunks, one view at a time: a list of them all may take 200 times the bytes of a hostile body."""
        view = memoryview(self.body)
        for begin, end in itertools.pairwise(self.bounds):
            yield view[int(begin) : int(end)]

    @property
    def size_bytes(self) -> int:
        """Length of all chunks."""
        return int(self.bounds[-1])

    def cut(self, first: int, last: int) -> Stream:
        """Chunks `[first, last)`; nothing is copied."""
        begin, end = int(self.bounds[first]), int(self.bounds[last])
        bounds = self.bounds[first : last + 1] - begin
        return Stream(self.name, self.coder, memoryview(self.body)[begin:end], bounds)


class Codec(abc.ABC):
    """A lossless codec. Instances hold no state and are safe to share between threads."""

    codec_id: ClassVar[str]
    coders: ClassVar[tuple[Coder, ...]]
    """What its chunks may be; another coder's would pass the checks of lengths and mean something else."""
    decode_bytes_per_second: ClassVar[float]
    """Raw bytes that one core decodes per second, at least, on the machine of `benchmarks/results`; the decode-speed
    floor is judged by this figure, so that the same input gives the same bytes on every machine."""

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
    def decode_into(
        self, streams: Sequence[Stream], dtype: DType, symbols: int, chunk_symbols: int, out: Bytes
    ) -> None:
        """Rebuild a run of `symbols` elements, whole chunks but for the last, into `out`, (symbols · itemsize,) uint8.

        Memory beyond `out` is that of one chunk. `out` is aligned to the element.

        Raises:
            ChunkError: a chunk is not what the codec writes.
        """


def decode(
    codec: Codec,
    streams: Sequence[Stream],
    dtype: DType,
    symbols: int,
    chunk_symbols: int,
    *,
    doing: str,
    out: Bytes | None = None,
    threads: int = 1,
    consumed: Callable[[Buffer], None] | None = None,
) -> Bytes:
    """Rebuild a run of `symbols` elements from its streams: (symbols · itemsize,) uint8.

    All lengths are checked before the result is allocated. `consumed` sees every coded chunk in decoding order.

    Args:
        codec: what wrote the streams.
        streams: its streams, in its order.
        dtype: of the elements.
        symbols: number of elements.
        chunk_symbols: elements per chunk.
        doing: what to say in an error.
        out: where to put the result, (symbols · itemsize,) uint8, contiguous; allocated if None.
        threads: that decode at the same time, each some of the chunks.
        consumed: called with each coded chunk.

    Raises:
        CorruptionError: the streams are not what the codec writes for so many symbols.
    """
    check_streams(codec, streams, dtype, symbols, chunk_symbols, doing)
    if consumed is not None:
        for together in zip(*(stream.each_chunk() for stream in streams), strict=True):
            for chunk in together:
                consumed(chunk)
    size = symbols * dtype.itemsize
    if out is not None and (out.size != size or not out.flags.c_contiguous):
        raise ValueError(f"`out` has {out.size} bytes, the elements have {size}")
    target = out if out is not None and not out.ctypes.data % dtype.itemsize else np.empty(size, np.uint8)
    chunks = -(-symbols // chunk_symbols)
    runs = _runs(chunks, threads if size >= MIN_PARALLEL_BYTES else 1)

    def work(run: tuple[int, int]) -> None:
        first, last = run
        part = [stream.cut(first, last) for stream in streams] if run != (0, chunks) else streams
        start, end = first * chunk_symbols, min(last * chunk_symbols, symbols)
        into = target[start * dtype.itemsize : end * dtype.itemsize]
        try:
            codec.decode_into(part, dtype, end - start, chunk_symbols, into)
        except ChunkError as error:
            raise CorruptionError(f"{doing}, chunk {first + error.chunk}", found=str(error)) from error

    share(work, runs)
    if out is not None and target is not out:
        out[:] = target
    return target if out is None else out


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
        if stream.coder not in codec.coders:
            raise CorruptionError(where, found=f"coder {stream.coder!r}", expected=" or ".join(codec.coders))
        if stream.bounds.size != chunks + 1:
            raise CorruptionError(
                where, found=f"{stream.bounds.size - 1} chunks", expected=f"{chunks} for {symbols} symbols"
            )
        for first in range(0, chunks, BLOCK):
            left = symbols - chunk_symbols * np.arange(first, min(first + BLOCK, chunks))
            limits = np.minimum(chunk_symbols, left) * (width or 1)
            sizes = _claimed_sizes(stream, first, where)
            wrong = sizes > limits if width is None else sizes != limits
            if wrong.any():
                index = int(wrong.argmax())
                bound = f"at most {limits[index]}" if width is None else str(limits[index])
                raise CorruptionError(
                    f"{where}, chunk {first + index}", found=f"{sizes[index]} bytes", expected=f"{bound} bytes"
                )


def frame_size(frame: Buffer, doing: str) -> int:
    """Content size that a zstandard frame claims.

    Raises:
        CorruptionError: no frame, or one without a content size.
    """
    try:
        size = zstandard.get_frame_parameters(frame).content_size
    except zstandard.ZstdError as error:
        raise CorruptionError(doing, found=str(error), expected="a zstandard frame") from error
    if size >= 2**63:  # what zstandard says of a size that is not stated, and what nobody can mean
        raise CorruptionError(doing, found="a zstandard frame without its content size", expected="one with it")
    return size


def _claimed_sizes(stream: Stream, first: int, doing: str) -> Bounds:
    """What each of BLOCK chunks from `first` on says that it decodes to, in bytes: (chunks,) int64."""
    begin, end = stream.bounds[:-1][first : first + BLOCK], stream.bounds[1:][first : first + BLOCK]
    body = np.frombuffer(stream.body, np.uint8)
    head = HEAD_BYTES if stream.coder == "huffman" else 0
    outside = (begin < 0) | (end - begin < head) | (end > body.size)
    if outside.any():
        index = int(outside.argmax())
        found = f"bytes {begin[index]} to {end[index]} of {body.size}"
        raise CorruptionError(f"{doing}, chunk {first + index}", found=found, expected=f"{head} bytes or more, in them")
    if stream.coder == "raw":
        return end - begin
    if stream.coder == "huffman":
        heads = np.ascontiguousarray(body[begin[:, None] + np.arange(4)])
        return heads.view("<u4").reshape(-1).astype(np.int64)
    sizes = np.empty(begin.size, np.int64)
    for index in range(begin.size):
        frame = memoryview(stream.body)[int(begin[index]) : int(end[index])]
        sizes[index] = frame_size(frame, f"{doing}, chunk {first + index}")
    return sizes


def _runs(chunks: int, threads: int) -> list[tuple[int, int]]:
    """Chunks in so many neighbouring runs of nearly equal length."""
    cuts = [chunks * index // threads for index in range(threads + 1)]
    return [(first, last) for first, last in itertools.pairwise(cuts) if last > first]
