"""Decoding on a GPU: the coded bytes go over the bus, and the planes are decoded and merged on the device.

It reads the same streams as `decode`. The host reads the chunks' heads and refuses what contradicts itself, exactly as
strictly as the CPU's decoder; then every segment is decoded by a lane of its own, since a segment has a fixed number
of symbols and its place in the output is known (`container/FORMAT.md`, "Coder huffman"). Nothing here was ever run on
a GPU: `docs/decisions/0010-gpu-decoder.md` says what was tested, and how.

Importing this loads torch, numba's loops and nothing of CUDA; triton is imported by the first decoding.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from modelpress.codec import CODECS, kernels
from modelpress.codec.base import Bytes, ChunkError, Stream, check_streams, decode
from modelpress.codec.coders import WRONG, is_rotated
from modelpress.dtypes import DType
from modelpress.errors import CorruptionError, SetupError, UnsupportedFormatError

LANES = 64
"""Segments that a program decodes side by side: a guess, `benchmarks/gpu_codecs.py` tries others."""
LANES_PER_WARP = 32
BLOCK = 1024
"""Elements that a program merges."""
ALIGNMENT = 256
WORDS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}
STORED = bytes([kernels.STORED_FIRST, kernels.STORED_LAST])
DOING = "decoding to a device"
ON_CPU = "decode on the CPU: modelpress.codec.decode"

Ints = npt.NDArray[np.int64]


def decodes_on_device(codec_id: str, streams: Sequence[Stream]) -> bool:
    """Whether `decode_to_device` decodes these streams on the device; all others it decodes on the CPU and copies."""
    return codec_id == "planes-huffman" and all(stream.coder in ("raw", "huffman") for stream in streams)


def decode_to_device(
    codec_id: str,
    streams: Sequence[Stream],
    dtype: DType,
    symbols: int,
    chunk_symbols: int,
    device: torch.device | str,
    out: torch.Tensor | None = None,
    *,
    doing: str = DOING,
) -> torch.Tensor:
    """Rebuild a run of `symbols` elements on a CUDA device: (symbols · itemsize,) uint8.

    `planes-huffman` with coders `raw` and `huffman` is decoded on the device; `decodes_on_device` says so beforehand.
    All else (coder `zstd`, the sparse codecs, `raw` and `zstd`) is decoded on the CPU and copied: those bytes go
    over the bus uncoded. The work is enqueued on the device's current stream; digests are the caller's to check,
    on the coded bytes before the call or on the result after it.

    Args:
        codec_id: what wrote the streams.
        streams: its streams, in its order.
        dtype: of the elements.
        symbols: number of elements.
        chunk_symbols: elements per chunk.
        device: a CUDA device; "cpu" only where TRITON_INTERPRET=1 runs the kernels on the CPU, for tests.
        out: where to put the result, (symbols · itemsize,) uint8, contiguous, on the device; allocated if None.
        doing: what to say in an error.

    Raises:
        SetupError: no such device, or no triton to decode on it.
        UnsupportedFormatError: no such codec.
        CorruptionError: the streams are not what the codec writes for so many symbols; nothing was launched.
    """
    device = torch.device(device)
    _check_device(device)
    if codec_id not in CODECS:
        raise UnsupportedFormatError(doing, found=f"codec {codec_id!r}", expected=f"one of {', '.join(CODECS)}")
    if not decodes_on_device(codec_id, streams):
        decoded = torch.from_numpy(decode(CODECS[codec_id], streams, dtype, symbols, chunk_symbols, doing=doing))
        return decoded.to(device) if out is None else _checked(out, decoded.numel(), device).copy_(decoded)
    staged = stage_planes(streams, dtype, symbols, chunk_symbols, pinned=device.type == "cuda", doing=doing)
    return staged.to(device).decode(out)


@dataclass(frozen=True, eq=False)
class StagedPlanes:
    """Coded byte planes, checked, with the tables and places that the kernels need, in one buffer.

    `buffer`, (bytes,) uint8, lies on the host (pinned, if asked for) or on a device. It holds five parts, which begin
    at `places`: the tables, (tables, 2**MAX_BITS) uint16; where each segment of each coded plane begins in `buffer`,
    int64; its bytes, int32; its table, int32; the planes that are not coded, `raw_bytes` from one to the next. Then
    come the coded streams, up to the end, so that what is read beyond them would be beyond `buffer`.
    """

    buffer: torch.Tensor
    dtype: DType
    symbols: int
    chunk_symbols: int
    is_coded: tuple[bool, ...]
    places: tuple[int, int, int, int, int]
    raw_bytes: int

    @property
    def per_chunk(self) -> int:
        """Segments of a whole chunk."""
        return -(-self.chunk_symbols // kernels.SEGMENT)

    @property
    def segments(self) -> int:
        """Segments of a plane."""
        whole, rest = divmod(self.symbols, self.chunk_symbols)
        return whole * self.per_chunk + -(-rest // kernels.SEGMENT)

    @property
    def slot_bytes(self) -> int:
        """Scratch memory of one segment: its symbols, in words of eight."""
        return -(-min(kernels.SEGMENT, self.chunk_symbols) // 8) * 8

    @property
    def scratch_bytes(self) -> int:
        """Memory on the device that decoding needs beyond `buffer` and the result."""
        return sum(self.is_coded) * self.segments * self.slot_bytes

    def to(self, device: torch.device | str) -> StagedPlanes:
        """The same with its buffer on the device; from pinned memory the copy does not block."""
        return replace(self, buffer=self.buffer.to(device, non_blocking=True))

    def decode(self, out: torch.Tensor | None = None, *, lanes: int = LANES) -> torch.Tensor:
        """Decode where `buffer` lies: (symbols · itemsize,) uint8, in `out` if given.

        `lanes`, a power of two of at least 32, is the number of segments that a program decodes.

        Raises:
            SetupError: `buffer` lies on no CUDA device, or there is no triton.
        """
        device, size = self.buffer.device, self.symbols * self.dtype.itemsize
        loaded = _load_kernels(device)
        out = torch.empty(size, dtype=torch.uint8, device=device) if out is None else _checked(out, size, device)
        if not self.symbols:
            return out
        whole_words = not out.data_ptr() % self.dtype.itemsize and not out.storage_offset() % self.dtype.itemsize
        target = out if whole_words else torch.empty_like(out)
        slots = torch.empty(self.scratch_bytes, dtype=torch.uint8, device=device)
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            if any(self.is_coded):
                self.decode_segments(loaded, slots, lanes)
            self.merge(loaded, slots, target)
        return out if target is out else out.copy_(target)

    def decode_segments(self, loaded: Any, slots: torch.Tensor, lanes: int) -> None:
        """Launch the first kernel: coded planes to `slots`, (scratch_bytes,) uint8, each segment to its own slot."""
        tables, begins, lengths, table_of, _ = self.places
        jobs = sum(self.is_coded) * self.segments
        loaded.decode_segments[(-(-jobs // lanes),)](
            self.buffer.view(torch.uint32),
            self._part(tables, begins, torch.uint16),
            self._part(begins, begins + 8 * jobs, torch.int64),
            self._part(lengths, lengths + 4 * jobs, torch.int32),
            self._part(table_of, table_of + 4 * jobs, torch.int32),
            slots.view(torch.uint64),
            jobs,
            self.segments,
            self.symbols,
            self.chunk_symbols,
            self.per_chunk,
            self.slot_bytes // 8,
            SEGMENT=kernels.SEGMENT,
            MAX_BITS=kernels.MAX_BITS,
            LANES=lanes,
            num_warps=lanes // LANES_PER_WARP,
        )

    def merge(self, loaded: Any, slots: torch.Tensor, out: torch.Tensor) -> None:
        """Launch the second kernel: planes from `slots` and from `buffer` to `out`, whole words."""
        blocks = -(-min(kernels.SEGMENT, self.chunk_symbols) // BLOCK)
        loaded.merge_planes[(self.segments, blocks)](
            self.buffer[self.places[4] :],
            slots,
            out.view(WORDS[self.dtype.itemsize]),
            self.symbols,
            self.chunk_symbols,
            self.per_chunk,
            self.raw_bytes,
            self.slot_bytes,
            self.segments * self.slot_bytes,
            PLANES=self.dtype.itemsize,
            CODED=sum(1 << plane for plane, is_coded in enumerate(self.is_coded) if is_coded),
            ROTATED=is_rotated(self.dtype),
            SEGMENT=kernels.SEGMENT,
            BLOCK=BLOCK,
        )

    def _part(self, begin: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        return self.buffer[begin:end].view(dtype)


def stage_planes(
    streams: Sequence[Stream],
    dtype: DType,
    symbols: int,
    chunk_symbols: int,
    *,
    pinned: bool = False,
    doing: str = DOING,
) -> StagedPlanes:
    """Check the streams of `planes-huffman`, coders `raw` and `huffman`, and lay them out in one buffer on the host.

    Raises:
        CorruptionError: they are not what the codec writes for so many symbols; chunk and stream are named.
    """
    check_streams(CODECS["planes-huffman"], streams, dtype, symbols, chunk_symbols, doing)
    tables = _Tables()
    raw = [stream for stream in streams if stream.coder == "raw"]
    coded = [stream for stream in streams if stream.coder != "raw"]
    try:
        for stream in raw:
            _check_bounds(stream, 0)
        segments = [_read_heads(stream, symbols, chunk_symbols, tables) for stream in coded]
    except ChunkError as error:
        raise CorruptionError(f"{doing}, chunk {error.chunk}", found=str(error)) from error

    jobs = sum(begins.size for begins, _, _ in segments)
    raw_bytes = _up(symbols)
    sizes = [_up(2 * len(tables.built) << kernels.MAX_BITS), *(_up(width * jobs) for width in (8, 4, 4))]
    ends = list(itertools.accumulate([*sizes, raw_bytes * len(raw), *(_up(stream.size_bytes) for stream in coded)]))
    places = (0, ends[0], ends[1], ends[2], ends[3])
    bodies = ends[4:]  # where the coded streams begin; the last of them is the end
    end = (bodies[-2] + -(-coded[-1].size_bytes // 4) * 4) if coded else ends[4]

    buffer = torch.empty(end, dtype=torch.uint8, pin_memory=pinned)
    host = buffer.numpy()
    for index, table in enumerate(tables.built):
        host[index * table.nbytes : (index + 1) * table.nbytes] = table.view(np.uint8)
    filled = 0
    for at, (begins, lengths, table_of) in zip(bodies, segments, strict=False):
        parts: tuple[npt.NDArray[Any], ...] = (begins + at, lengths, table_of)
        for place, values in zip(places[1:4], parts, strict=True):
            start = place + filled * values.itemsize
            host[start : start + values.nbytes] = values.view(np.uint8)
        filled += begins.size
    for index, stream in enumerate(raw):
        _put(host, places[4] + index * raw_bytes, stream)
    for at, stream in zip(bodies, coded, strict=False):
        _put(host, at, stream)
    is_coded = tuple(stream.coder != "raw" for stream in streams)
    return StagedPlanes(buffer, dtype, symbols, chunk_symbols, is_coded, places, raw_bytes)


class _Tables:
    """Decoding tables with one symbol per entry, (2**MAX_BITS,) uint16, each distinct one once."""

    def __init__(self) -> None:
        self.built: list[npt.NDArray[np.uint16]] = []
        self._known: dict[bytes, int] = {}

    def read(self, body: Bytes, at: int, end: int) -> tuple[bytes, int]:
        """The table that begins at `at`: its bytes, none if it is no complete code, and its place in `built`."""
        if at + 2 <= end and (body[at], body[at + 1]) == (kernels.STORED_FIRST, kernels.STORED_LAST):
            return self._kept(STORED, np.arange(1 << kernels.MAX_BITS) % 256 << 8 | 8)
        lengths = np.zeros(256, np.int64)
        size = int(kernels._read_lengths(np.uint64(body.ctypes.data), at, end, lengths))
        coded = body[at : at + size].tobytes()
        if coded and coded not in self._known:
            table = np.full(1 << kernels.MAX_BITS, int(coded[0]) << 8, np.uint16)
            if size > 2 and not kernels.build_single_table(lengths, table):
                return b"", 0
            return self._kept(coded, table)
        return coded, self._known.get(coded, 0)

    def _kept(self, coded: bytes, table: npt.NDArray[Any]) -> tuple[bytes, int]:
        if coded not in self._known:
            self._known[coded] = len(self.built)
            self.built.append(table.astype(np.uint16))
        return coded, self._known[coded]


def _read_heads(
    stream: Stream, symbols: int, chunk_symbols: int, tables: _Tables
) -> tuple[Ints, npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Where the segments of a coded stream begin in its body, their bytes and their tables.

    That each chunk claims so many symbols is known already, by `check_streams`.

    Raises:
        ChunkError: a head is not what the coder writes, or the segments do not add up to the chunk.
    """
    body = _check_bounds(stream, 6)
    begin, end = stream.bounds[:-1], stream.bounds[1:]
    counts = np.minimum(chunk_symbols, symbols - chunk_symbols * np.arange(begin.size))
    table_of, table_bytes = _read_tables(stream, body, tables)
    own = -(-counts // kernels.SEGMENT)
    at = begin + 4 + table_bytes
    # A chunk that is stored as it is has no lengths: its segments are as long as their symbols are many.
    stored = (body[begin + 4] == kernels.STORED_FIRST) & (body[begin + 5] == kernels.STORED_LAST)
    data = at + np.where(stored, 0, 2 * own)
    single = body[begin + 4] == body[begin + 5]
    _refuse(stream, (data > end) | (single & (data != end)), kernels.BAD_LENGTHS)

    chunk = np.repeat(np.arange(begin.size), own)
    first = np.cumsum(own) - own
    segment = np.arange(chunk.size) - first[chunk]
    # Of a stored chunk these places hold anything, or are beyond the body: what they give is not used.
    place = np.minimum(at[chunk] + 2 * segment, body.size - 2)
    lengths = body[place].astype(np.int64) | body[place + 1].astype(np.int64) << 8
    whole = np.minimum(kernels.SEGMENT, counts[chunk] - kernels.SEGMENT * segment)
    lengths = np.where(stored[chunk], whole, lengths)
    too_long = np.zeros(begin.size, bool)
    too_long[chunk[lengths > kernels.SEGMENT * kernels.MAX_BITS // 8]] = True
    ends = np.cumsum(lengths)
    before = (ends - lengths)[first]
    _refuse(stream, too_long | (data + ends[first + own - 1] - before != end), kernels.BAD_LENGTHS)
    begins = (data - before)[chunk] + ends - lengths
    return begins, lengths.astype(np.int32), table_of[chunk]


def _read_tables(stream: Stream, body: Bytes, tables: _Tables) -> tuple[npt.NDArray[np.int32], Ints]:
    """Table of each chunk, and its bytes; a table that chunk after chunk repeats is compared in bulk."""
    at, end = stream.bounds[:-1] + 4, stream.bounds[1:]
    table_of, table_bytes = np.empty(at.size, np.int32), np.empty(at.size, np.int64)
    chunk, run = 0, 1
    while chunk < at.size:
        coded, index = tables.read(body, int(at[chunk]), int(end[chunk]))
        if not coded:
            _refuse(stream, np.arange(at.size) == chunk, kernels.BAD_TABLE)
        size, run, same = len(coded), 1, True
        expected = np.frombuffer(coded, np.uint8)
        while same and chunk < at.size:
            heads = at[chunk : chunk + run]
            fits = heads + size <= end[chunk : chunk + run]
            found = body[np.minimum(heads[:, None] + np.arange(size), body.size - 1)]
            equal = fits & (found == expected).all(axis=1)
            same = bool(equal.all())
            taken = equal.size if same else int(equal.argmin())
            table_of[chunk : chunk + taken], table_bytes[chunk : chunk + taken] = index, size
            chunk, run = chunk + taken, 2 * run
    return table_of, table_bytes


def _check_bounds(stream: Stream, least: int) -> Bytes:
    """The stream's body, once its chunks are known to lie in it and to have `least` bytes each."""
    body = np.frombuffer(stream.body, np.uint8)
    begin, end = stream.bounds[:-1], stream.bounds[1:]
    _refuse(stream, (begin < 0) | (end - begin < least) | (end > body.size), kernels.BAD_LENGTHS)
    return body


def _refuse(stream: Stream, bad: npt.NDArray[np.bool_], status: int) -> None:
    """Raise for the first chunk that is bad."""
    if bad.any():
        raise ChunkError(int(bad.argmax()), f"stream {stream.name!r}: {WRONG[status]}")


def _put(host: Bytes, at: int, stream: Stream) -> None:
    first, last = int(stream.bounds[0]), int(stream.bounds[-1])
    host[at : at + last - first] = np.frombuffer(stream.body, np.uint8)[first:last]


def _up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _checked(out: torch.Tensor, size: int, device: torch.device) -> torch.Tensor:
    where = torch.empty(0, device=device).device  # "cuda" is the current one of several
    if out.shape != (size,) or out.dtype != torch.uint8 or not out.is_contiguous() or out.device != where:
        found = f"{out.dtype} of shape {tuple(out.shape)} on {out.device}"
        raise ValueError(f"`out` is {found}, the elements are {size} contiguous bytes on {where}")
    return out


def _check_device(device: torch.device) -> None:
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = f"{torch.cuda.device_count()} CUDA devices, by torch {torch.__version__}"
        fix = f"run where there is one, with a torch that is built for it, or {ON_CPU}"
        raise SetupError(f"decoding on {device}", found=found, fix=fix)
    if device.type not in ("cuda", "cpu"):
        raise SetupError(f"decoding on {device}", found=f"a {device.type} device", expected="a CUDA device", fix=ON_CPU)


def _load_kernels(device: torch.device) -> Any:
    """The module of kernels, once it is known that they run on this device.

    Raises:
        SetupError: there is no triton, or it runs kernels elsewhere.
    """
    doing = f"decoding on {device}"
    try:
        loaded = importlib.import_module("modelpress.codec.gpu_kernels")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise SetupError(doing, found="no triton", fix=f"pip install triton (made for Linux), or {ON_CPU}") from error
    if device.type == "cpu" and not loaded.INTERPRETED:
        raise SetupError(doing, found="a CPU", expected="a CUDA device", fix=ON_CPU)
    if device.type != "cpu" and loaded.INTERPRETED:
        raise SetupError(doing, found="TRITON_INTERPRET, which runs kernels on the CPU", fix="unset it, start again")
    return loaded
