"""From shards back to tensors: every digest, length and name checked, nothing allocated on a claim alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from modelpress.codec import CODECS, Buffer, Bytes, decode
from modelpress.container.safetensors_file import read
from modelpress.container.stored import Piece, read_pieces
from modelpress.container.tensors import from_bytes
from modelpress.dtypes import DTYPES
from modelpress.errors import CorruptionError, UnsupportedFormatError
from modelpress.manifest import Manifest, TensorEntry


def read_tensors(manifest: Manifest, fetch: Callable[[str], bytes]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a pack, verified, in the manifest's order.

    `fetch` gives the bytes of the shard with a sha256; one shard is held at a time, and of a tensor that is split the
    pieces read so far. Tensors own their memory.

    Raises:
        CorruptionError: a shard, a coded tensor or a decoded tensor is not what the manifest says.
        UnsupportedFormatError: a codec or a format version that this release does not know.
    """
    begun: list[Piece] = []
    parts: list[Bytes] = []
    digest = hashlib.sha256()
    waiting = iter(manifest.tensors)
    entry = next(waiting, None)
    for position in range(len(manifest.shards)):
        pieces = {piece.name: piece for piece in _read_shard(manifest, position, fetch)}
        while entry is not None and position in entry.shards:
            piece = pieces.pop(entry.name, None)
            doing = f"reading tensor {entry.name!r} from shard {manifest.shards[position].sha256}"
            if piece is None:
                raise CorruptionError(doing, found="no such tensor in the shard", expected=_describe(entry))
            _check_piece(piece, entry, sum(earlier.count for earlier in begun), doing)
            parts.append(decode_piece(piece, doing, consumed=digest.update))
            begun.append(piece)
            if position != entry.shards[-1]:
                break
            yield entry.name, _finish(entry, begun, parts, digest.hexdigest(), doing)
            begun, parts, digest = [], [], hashlib.sha256()
            entry = next(waiting, None)
        if pieces:
            raise CorruptionError(
                f"reading shard {manifest.shards[position].sha256}",
                found=f"tensor {next(iter(pieces))!r}",
                expected="only the tensors that the manifest puts there, in its order",
            )


def decode_piece(piece: Piece, doing: str, consumed: Callable[[Buffer], None] | None = None) -> Bytes:
    """Decode a piece: (count · itemsize,) uint8, in memory of its own.

    Raises:
        CorruptionError: its streams do not give so many elements.
    """
    return decode(
        CODECS[piece.codec],
        piece.streams,
        piece.dtype,
        piece.count,
        piece.chunk_symbols,
        doing=doing,
        consumed=consumed,
    )


def _read_shard(manifest: Manifest, position: int, fetch: Callable[[str], bytes]) -> list[Piece]:
    shard = manifest.shards[position]
    doing = f"reading shard {position} ({shard.sha256}) of pack {manifest.name}"
    data = fetch(shard.sha256)
    found = hashlib.sha256(data).hexdigest()
    if len(data) != shard.size_bytes or found != shard.sha256:
        raise CorruptionError(
            doing,
            found=f"{len(data)} bytes, sha256 {found}",
            expected=f"{shard.size_bytes} bytes, sha256 {shard.sha256}",
            fix="restore the shard from a copy, or publish the pack again",
        )
    entries, metadata = read(data, doing)
    return read_pieces(entries, metadata, doing)


def _check_piece(piece: Piece, entry: TensorEntry, start: int, doing: str) -> None:
    if entry.codec not in CODECS:
        raise UnsupportedFormatError(doing, found=f"codec {entry.codec!r}", expected=f"one of {', '.join(CODECS)}")
    found = (piece.dtype.name, piece.shape, piece.codec)
    if found != (entry.dtype, entry.shape, entry.codec):
        raise CorruptionError(doing, found=_words(*found), expected=_describe(entry))
    if piece.start != start:
        raise CorruptionError(doing, found=f"elements from {piece.start}", expected=f"elements from {start}")


def _finish(entry: TensorEntry, pieces: Sequence[Piece], parts: list[Bytes], coded: str, doing: str) -> torch.Tensor:
    stored = sum(piece.stored_bytes for piece in pieces)
    if coded != entry.stored_sha256 or stored != entry.stored_bytes:
        raise CorruptionError(
            doing,
            found=f"{stored} coded bytes, sha256 {coded}",
            expected=f"{entry.stored_bytes} bytes, sha256 {entry.stored_sha256}",
        )
    raw = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if raw.size != entry.raw_bytes:
        raise CorruptionError(doing, found=f"{raw.size} bytes", expected=f"{entry.raw_bytes} for {_describe(entry)}")
    found = hashlib.sha256(raw.data).hexdigest()
    if found != entry.raw_sha256:
        raise CorruptionError(doing, found=f"decoded sha256 {found}", expected=f"sha256 {entry.raw_sha256}")
    return from_bytes(raw, DTYPES[entry.dtype], entry.shape)


def _describe(entry: TensorEntry) -> str:
    return _words(entry.dtype, entry.shape, entry.codec)


def _words(dtype: str, shape: tuple[int, ...], codec: str) -> str:
    return f"{dtype} {list(shape)} coded as {codec}"
