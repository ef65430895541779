"""From shards back to tensors: every digest, length and name checked, nothing allocated on a claim alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

from modelpress.codec import CODECS, Buffer, Bytes, check_streams, decode
from modelpress.codec.difference import add_
from modelpress.container.safetensors_file import read
from modelpress.container.stored import Piece, read_pieces
from modelpress.container.tensors import from_bytes
from modelpress.cores import usable_cores
from modelpress.dtypes import DTYPES
from modelpress.errors import ConfigError, CorruptionError, UnsupportedFormatError
from modelpress.manifest import Manifest, TensorEntry

Original = Callable[[TensorEntry], Bytes]
"""Gives the base's tensor that an entry is the difference to: its bytes, verified, in memory that the caller may
change. `container.base.Base` is one."""


def read_tensors(
    manifest: Manifest, fetch: Callable[[str], bytes], *, threads: int | None = None, original: Original | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a pack, verified, in the manifest's order.

    `fetch` gives the bytes of the shard with a sha256, opened where the pack is encrypted; one shard is held at a time,
    and the tensor being read. Tensors own their memory. `threads` decode at the same time; by default as many as this
    process may use cores. `original` gives the base's tensors to a pack that is stored as differences; that is another
    shard and another tensor.

    Raises:
        ConfigError: a pack with a base, and no `original`.
        CorruptionError: a shard, a coded tensor or a decoded tensor is not what the manifest says.
        UnsupportedFormatError: a codec or a format version that this release does not know.
    """
    check_original(manifest, original)
    threads = threads or usable_cores()
    waiting = iter(manifest.tensors)
    entry = next(waiting, None)
    begun = Begun(entry) if entry else None
    for position in range(len(manifest.shards)):
        pieces = {piece.name: piece for piece in read_shard(manifest, position, fetch)}
        while entry is not None and begun is not None and (entry.is_base or position in entry.shards):
            doing = f"reading tensor {entry.name!r} from shard {manifest.shards[position].sha256}"
            if not entry.is_base:
                begun.add(pieces.pop(entry.name, None), doing, threads)
                if position != entry.shards[-1]:
                    break
            yield entry.name, begun.finish(doing, original)
            entry = next(waiting, None)
            begun = Begun(entry) if entry else None
        if pieces:
            raise CorruptionError(
                f"reading shard {manifest.shards[position].sha256}",
                found=f"tensor {next(iter(pieces))!r}",
                expected="only the tensors that the manifest puts there, in its order",
            )
        del pieces  # the next shard is fetched when this one is let go
    while not manifest.shards and entry is not None:
        yield entry.name, Begun(entry).finish(f"reading tensor {entry.name!r} from the base", original)
        entry = next(waiting, None)
    if entry is not None:
        raise CorruptionError(
            f"reading pack {manifest.name}",
            found=f"the shards end before tensor {entry.name!r}",
            expected=f"all {len(manifest.tensors)} tensors, in the order of their shards",
        )


def pieces_of(manifest: Manifest, name: str, fetch: Callable[[str], bytes]) -> list[Piece]:
    """One tensor of a pack as it is stored, in element order; its shards are verified.

    Raises:
        CorruptionError: a shard is not what the manifest says.
        UnsupportedFormatError: a codec or a format version that this release does not know.
    """
    (entry,) = (entry for entry in manifest.tensors if entry.name == name)
    read_shards = (read_shard(manifest, position, fetch) for position in entry.shards)
    return [piece for pieces in read_shards for piece in pieces if piece.name == name]


def decode_tensor(
    entry: TensorEntry, pieces: Iterable[Piece], *, threads: int = 1, original: Original | None = None
) -> torch.Tensor:
    """The tensor that `pieces_of` found, verified; see `read_tensors` for `original`.

    Raises:
        CorruptionError: the pieces are not what the manifest says.
    """
    doing, begun = f"reading tensor {entry.name!r}", Begun(entry)
    for piece in pieces:
        begun.add(piece, doing, threads)
    return begun.finish(doing, original)


def decode_piece(
    piece: Piece,
    doing: str,
    *,
    out: Bytes | None = None,
    threads: int = 1,
    consumed: Callable[[Buffer], None] | None = None,
) -> Bytes:
    """Decode a piece: (count · itemsize,) uint8, into `out` or memory of its own; see `modelpress.codec.decode`.

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
        out=out,
        threads=threads,
        consumed=consumed,
    )


def _check_claims(piece: Piece, doing: str) -> None:
    """Refuse a piece whose streams claim other lengths than its elements need, before anything is allocated.

    Raises:
        CorruptionError: they do; both numbers are given.
    """
    check_streams(CODECS[piece.codec], piece.streams, piece.dtype, piece.count, piece.chunk_symbols, doing)


class Begun:
    """A tensor of which the first pieces have been read: its memory, filled so far, and what was seen of it.

    Args:
        entry: what it must become.
        coded_digest: check the digest of its coded bytes as well. Where its shards' digests and that of its raw bytes
            are checked it adds nothing: equal shards hold equal coded bytes.
    """

    def __init__(self, entry: TensorEntry, *, coded_digest: bool = True) -> None:
        self.entry = entry
        self._raw: Bytes | None = None
        self._elements = self._stored_bytes = 0
        self._digest = hashlib.sha256() if coded_digest else None

    def add(self, piece: Piece | None, doing: str, threads: int) -> None:
        """Decode the next piece to its place.

        Raises:
            CorruptionError: it is not the piece that must follow, or its streams are not what its codec writes.
            UnsupportedFormatError: a codec that this release does not know.
        """
        entry = self.entry
        if piece is None:
            raise CorruptionError(doing, found="no such tensor in the shard", expected=_describe(entry))
        _check_piece(piece, entry, self._elements, doing)
        size = piece.dtype.itemsize
        if (self._elements + piece.count) * size > entry.raw_bytes:
            found = f"{self._elements + piece.count} elements"
            raise CorruptionError(doing, found=found, expected=f"{entry.raw_bytes // size} for {_describe(entry)}")
        consumed = self._digest.update if self._digest else None
        if piece.count == piece.elements:
            self._raw = decode_piece(piece, doing, threads=threads, consumed=consumed)
        else:
            if self._raw is None:
                _check_claims(piece, doing)
                self._raw = np.empty(entry.raw_bytes, np.uint8)
            out = self._raw[self._elements * size : (self._elements + piece.count) * size]
            decode_piece(piece, doing, out=out, threads=threads, consumed=consumed)
        self._elements += piece.count
        self._stored_bytes += piece.stored_bytes

    def finish(self, doing: str, original: Original | None = None) -> torch.Tensor:
        """The whole tensor, the base's added where it is a difference, if every digest agrees.

        Raises:
            CorruptionError: a length or a digest differs.
        """
        entry, stored = self.entry, self._stored_bytes
        coded = self._digest.hexdigest() if self._digest else entry.stored_sha256
        if coded != entry.stored_sha256 or stored != entry.stored_bytes:
            raise CorruptionError(
                doing,
                found=f"{stored} coded bytes, sha256 {coded}",
                expected=f"{entry.stored_bytes} bytes, sha256 {entry.stored_sha256}",
            )
        size = self._elements * DTYPES[entry.dtype].itemsize
        if entry.base is not None and original is not None and size == (0 if entry.is_base else entry.raw_bytes):
            # Between "decoded" and "raw digest checked": the digest of the result decides.
            base, difference = original(entry), self._raw
            self._raw = base if difference is None else add_(base, difference, DTYPES[entry.dtype])
            size = self._raw.size
        if self._raw is None or size != entry.raw_bytes:
            raise CorruptionError(doing, found=f"{size} bytes", expected=f"{entry.raw_bytes} for {_describe(entry)}")
        found = hashlib.sha256(self._raw.data).hexdigest()
        if found != entry.raw_sha256:
            raise CorruptionError(doing, found=f"decoded sha256 {found}", expected=f"sha256 {entry.raw_sha256}")
        return from_bytes(self._raw, DTYPES[entry.dtype], entry.shape)


def read_shard(manifest: Manifest, position: int, fetch: Callable[[str], Buffer]) -> list[Piece]:
    """What stands in a shard of a pack, verified as a whole.

    Raises:
        CorruptionError: the shard is not what the manifest says.
        UnsupportedFormatError: a codec or a format version that this release does not know.
    """
    shard = manifest.shards[position]
    doing = f"reading shard {position} ({shard.sha256}) of pack {manifest.name}"
    data, content = fetch(shard.sha256), shard.content
    found = hashlib.sha256(data).hexdigest()
    if len(data) != content.size_bytes or found != content.sha256:
        raise CorruptionError(
            doing,
            found=f"{len(data)} bytes, sha256 {found}",
            expected=f"{content.size_bytes} bytes, sha256 {content.sha256}",
            fix="restore the shard from a copy, or publish the pack again",
        )
    entries, metadata = read(data, doing)
    return read_pieces(entries, metadata, doing)


def check_original(manifest: Manifest, original: Original | None) -> None:
    """Refuse to read differences without what they are to.

    Raises:
        ConfigError: the pack has a base, and `original` is None.
    """
    if manifest.base is not None and original is None:
        raise ConfigError(
            f"reading pack {manifest.name}",
            found="no base",
            expected=f"{manifest.name}@{manifest.base}, which its tensors are the difference to",
            fix="read it with modelpress.load, or give container.base.Base as `original`",
        )


def _check_piece(piece: Piece, entry: TensorEntry, start: int, doing: str) -> None:
    if entry.codec not in CODECS:
        raise UnsupportedFormatError(doing, found=f"codec {entry.codec!r}", expected=f"one of {', '.join(CODECS)}")
    found = (piece.dtype.name, piece.shape, piece.codec)
    if found != (entry.dtype, entry.shape, entry.codec):
        raise CorruptionError(doing, found=_words(*found), expected=_describe(entry))
    if piece.raw_sha256 not in (None, entry.raw_sha256):
        raise CorruptionError(doing, found=f"sha256 {piece.raw_sha256}", expected=f"sha256 {entry.raw_sha256}")
    if piece.start != start:
        raise CorruptionError(doing, found=f"elements from {piece.start}", expected=f"elements from {start}")


def _describe(entry: TensorEntry) -> str:
    return _words(entry.dtype, entry.shape, entry.codec)


def _words(dtype: str, shape: tuple[int, ...], codec: str) -> str:
    return f"{dtype} {list(shape)} coded as {codec}"
