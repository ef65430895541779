"""A tensor as it is stored, whole or a piece of it, and how a shard's metadata describes that."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any, Final

import numpy as np
from pydantic import BaseModel, ConfigDict, FailFast, Field, StringConstraints, ValidationError

from modelpress.codec import CODECS, Buffer, Coder, Stream
from modelpress.container.safetensors_file import MAX_RANK, Entry, compact
from modelpress.dtypes import DTYPES, DType
from modelpress.errors import ConfigError, CorruptionError, UnsupportedFormatError
from modelpress.manifest import PLAIN_VERSION, check_version
from modelpress.strictjson import loads

DESCRIPTION = "modelpress"
"""Key of the description in the file's metadata."""
RAW: Final = "raw"
MAX_CHUNK_SYMBOLS = 2**24

Size = Annotated[int, Field(ge=0, lt=2**63, strict=True)]


class StreamInfo(BaseModel):
    """One stream of a piece: its bytes are the U8 tensor `<tensor>#<name>`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    coder: Coder
    lengths: Annotated[tuple[Size, ...] | None, FailFast()] = None
    """Bytes of each chunk; absent for coder `raw`, whose chunks have a fixed number of bytes per symbol."""


class PieceInfo(BaseModel):
    """A run of elements of one tensor."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: str
    shape: tuple[Size, ...] = Field(max_length=MAX_RANK)
    codec: str
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    chunk_symbols: Annotated[int, Field(ge=1, le=MAX_CHUNK_SYMBOLS, strict=True)]
    start: Size
    count: Size
    streams: tuple[StreamInfo, ...] = Field(max_length=16)


@dataclass(frozen=True)
class Piece:
    """Elements `[start, start + count)` of a tensor, coded. A whole tensor is the piece that has them all.

    `start` is a multiple of `chunk_symbols`, and so is `count` unless the piece ends the tensor; a raw piece has
    one chunk and any bounds.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    codec: str
    raw_sha256: str | None
    chunk_symbols: int
    start: int
    count: int
    streams: Sequence[Stream]

    @property
    def elements(self) -> int:
        """Elements of the whole tensor."""
        return prod(self.shape)

    @property
    def is_plain(self) -> bool:
        """Whether it stands in the file under its own name, with dtype and shape and no description."""
        return self.codec == RAW and self.count == self.elements

    @property
    def stored_bytes(self) -> int:
        """Length of its coded bytes."""
        return sum(stream.size_bytes for stream in self.streams)

    def ordered_chunks(self) -> Iterator[Buffer]:
        """Coded bytes in decoding order: chunk by chunk, in each chunk stream by stream."""
        for chunks in zip(*(stream.each_chunk() for stream in self.streams), strict=True):
            yield from chunks

    def cut(self, start: int, count: int) -> Piece:
        """The part of it with elements `[start, start + count)` of the tensor; nothing is copied."""
        if self.codec == RAW:
            first, last = (
                (start - self.start) * self.dtype.itemsize,
                (start - self.start + count) * self.dtype.itemsize,
            )
            streams = [Stream.of(RAW, RAW, [memoryview(self.streams[0].body)[first:last]])]
        else:
            begin = (start - self.start) // self.chunk_symbols
            end = -(-(start - self.start + count) // self.chunk_symbols)
            streams = [stream.cut(begin, end) for stream in self.streams]
        return Piece(
            self.name, self.dtype, self.shape, self.codec, self.raw_sha256, self.chunk_symbols, start, count, streams
        )

    def describe(self) -> dict[str, Any]:
        """What `PieceInfo` reads."""
        return {
            "dtype": self.dtype.name,
            "shape": list(self.shape),
            "codec": self.codec,
            "sha256": self.raw_sha256,
            "chunk_symbols": self.chunk_symbols,
            "start": self.start,
            "count": self.count,
            "streams": [_describe_stream(stream) for stream in self.streams],
        }

    def entries(self) -> list[Entry]:
        """Its tensors in the file."""
        if self.is_plain:
            return [Entry(self.name, self.dtype.name, self.shape, [self.streams[0].body])]
        if self.codec == RAW:
            return [Entry(stream_key(self.name, RAW), self.dtype.name, (self.count,), [self.streams[0].body])]
        return [
            Entry(stream_key(self.name, stream.name), "U8", (stream.size_bytes,), [stream.body])
            for stream in self.streams
        ]


def stream_key(name: str, stream: str) -> str:
    """Name in the file of one stream of a tensor."""
    return f"{name}#{stream}"


def stored_sha256(pieces: Sequence[Piece]) -> str:
    """Digest of a tensor's coded bytes, however it is cut into pieces."""
    digest = hashlib.sha256()
    for piece in pieces:
        for chunk in piece.ordered_chunks():
            digest.update(chunk)
    return digest.hexdigest()


def metadata_of(pieces: Sequence[Piece]) -> dict[str, str]:
    """The file's metadata: nothing of ours where every tensor is plain, so that it is an ordinary checkpoint.

    `format` is what Hugging Face's loaders ask for.
    """
    described = {piece.name: piece.describe() for piece in pieces if not piece.is_plain}
    metadata = {"format": "pt"}
    if described:
        metadata[DESCRIPTION] = compact({"format_version": PLAIN_VERSION, "tensors": described})
    return metadata


def check_names(names: Sequence[str]) -> None:
    """Refuse tensor names that cannot stand in a shard.

    Raises:
        ConfigError: one is taken by the format, or could be confused with another tensor's stream.
    """
    known = set(names)
    for name in names:
        owner, mark, _ = name.rpartition("#")
        if name == "__metadata__" or (mark and owner in known):
            raise ConfigError(
                f"storing tensor {name!r}",
                found="a name that the format uses" + (f" for the streams of {owner!r}" if mark else ""),
                fix="rename the tensor",
            )


def read_pieces(entries: Mapping[str, Entry], metadata: Mapping[str, str], doing: str) -> list[Piece]:
    """Everything in a shard as pieces; every tensor of the file belongs to exactly one of them.

    Raises:
        CorruptionError: a description that does not fit the file's tensors.
        UnsupportedFormatError: a newer format version or an unknown codec.
    """
    left = dict(entries)
    pieces = [
        _read_piece(name, info, left, f"{doing}, tensor {name!r}")
        for name, info in _read_infos(metadata, doing).items()
    ]
    described = {piece.name for piece in pieces}
    for entry in left.values():
        if entry.name in described:
            raise CorruptionError(f"{doing}, tensor {entry.name!r}", found="it twice, plain and coded", expected="once")
        elements = prod(entry.shape)
        chunks = [part for part in entry.parts if len(part)]
        pieces.append(
            Piece(
                entry.name,
                DTYPES[entry.dtype],
                entry.shape,
                RAW,
                None,
                max(elements, 1),
                0,
                elements,
                [Stream.of(RAW, RAW, chunks)],
            )
        )
    return pieces


def _describe_stream(stream: Stream) -> dict[str, Any]:
    info: dict[str, Any] = {"name": stream.name, "coder": stream.coder}
    if stream.coder != "raw":
        info["lengths"] = np.diff(stream.bounds).tolist()
    return info


def _read_infos(metadata: Mapping[str, str], doing: str) -> dict[str, PieceInfo]:
    if DESCRIPTION not in metadata:
        return {}
    document = loads(metadata[DESCRIPTION].encode("utf-8", "surrogatepass"), f"{doing}, description")
    check_version(document.get("format_version"), doing, PLAIN_VERSION)
    tensors = document.get("tensors")
    if set(document) != {"format_version", "tensors"} or not isinstance(tensors, dict):
        raise CorruptionError(
            f"{doing}, description", found=f"{sorted(document)}", expected="format_version and tensors"
        )
    infos = {}
    for name, info in tensors.items():
        try:
            infos[name] = PieceInfo.model_validate(info)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            found = f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
            raise CorruptionError(
                f"{doing}, tensor {name!r}", found=found, expected="a piece as in FORMAT.md"
            ) from error
    return infos


def _read_piece(name: str, info: PieceInfo, left: dict[str, Entry], doing: str) -> Piece:
    if info.codec not in CODECS:
        raise UnsupportedFormatError(
            doing, found=f"codec {info.codec!r}", expected=f"one of {', '.join(CODECS)}", fix="update modelpress"
        )
    if info.dtype not in DTYPES:
        raise CorruptionError(doing, found=f"dtype {info.dtype!r}", expected=f"one of {', '.join(DTYPES)}")
    dtype, elements = DTYPES[info.dtype], prod(info.shape)
    end = info.start + info.count
    step = 1 if info.codec == RAW else info.chunk_symbols
    if info.count < 1 or end > elements or info.start % step or (end != elements and info.count % step):
        raise CorruptionError(
            doing,
            found=f"elements {info.start} to {end} of {elements}",
            expected=f"at least one, within the tensor, in whole chunks of {step}",
        )
    layout = CODECS[info.codec].layout(dtype)
    if [stream.name for stream in info.streams] != list(layout):
        raise CorruptionError(
            doing, found=f"streams {[stream.name for stream in info.streams]}", expected=f"streams {list(layout)}"
        )
    chunk_symbols = info.count if info.codec == RAW else info.chunk_symbols
    streams = [
        _read_stream(name, stream, left, info, width, chunk_symbols, doing)
        for stream, width in zip(info.streams, layout.values(), strict=True)
    ]
    return Piece(name, dtype, info.shape, info.codec, info.sha256, chunk_symbols, info.start, info.count, streams)


def _read_stream(
    name: str,
    stream: StreamInfo,
    left: dict[str, Entry],
    piece: PieceInfo,
    width: int | None,
    chunk_symbols: int,
    doing: str,
) -> Stream:
    key = stream_key(name, stream.name)
    entry = left.pop(key, None)
    expected_dtype = piece.dtype if piece.codec == RAW else "U8"
    if entry is None or entry.dtype != expected_dtype or len(entry.shape) != 1:
        found = "nothing" if entry is None else f"{entry.dtype} {list(entry.shape)}"
        raise CorruptionError(f"{doing}, stream {key!r}", found=found, expected=f"{expected_dtype} with one axis")
    (body,) = entry.parts
    chunks = -(-piece.count // chunk_symbols)
    if stream.coder == "raw":
        if stream.lengths is not None or width is None:
            raise CorruptionError(f"{doing}, stream {key!r}", found="coder 'raw'", expected="another, with lengths")
        size = piece.count * width
        count = chunks
    else:
        lengths = stream.lengths or ()
        size, count = sum(lengths), len(lengths)
    if count != chunks:
        raise CorruptionError(f"{doing}, stream {key!r}", found=f"{count} chunks", expected=f"{chunks}")
    if len(body) != size:
        raise CorruptionError(f"{doing}, stream {key!r}", found=f"{len(body)} bytes", expected=f"{size}")
    if stream.coder == "raw":
        bounds = np.arange(chunks + 1, dtype=np.int64)
        bounds *= chunk_symbols * (width or 1)
        np.minimum(bounds, size, out=bounds)
    else:
        bounds = np.cumsum([0, *lengths], dtype=np.int64)
    return Stream(stream.name, stream.coder, body, bounds)
