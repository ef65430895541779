"""Lossless coding of a checkpoint: per tensor the smallest codec that decodes fast enough, proved by decoding."""

from __future__ import annotations

import hashlib
import math
import re
import time
from dataclasses import dataclass, field

import numpy as np

from modelpress.checkpoint import Checkpoint
from modelpress.codec import CODECS, Bytes, Stream, bound_bytes
from modelpress.config import CompressConfig
from modelpress.container import Coded, Piece, StoredTensor, decode_piece
from modelpress.container.safetensors_file import compact
from modelpress.container.stored import check_names
from modelpress.container.tensors import dtype_of, to_bytes
from modelpress.dtypes import DType
from modelpress.errors import ConfigError, StageError
from modelpress.manifest import MAX_EXPANSION
from modelpress.progress import Progress, silent
from modelpress.reports import CodedTensor, CompressReport

TIE = 1.001
"""Of two codecs whose bytes differ by less, the one that decodes faster is taken."""

__all__ = ["Choice", "Coded", "choose", "compress", "natural_key", "plain_piece", "summary"]


@dataclass(frozen=True)
class Choice:
    """How a tensor, or a difference, is stored, and what the other codecs would have cost."""

    piece: Piece
    seconds: float | None = None
    """CPU time of decoding it."""
    costs: dict[str, int] = field(default_factory=dict)
    """By codec: coded bytes, and what describing them adds to the shard's header."""
    too_slow: list[str] = field(default_factory=list)
    not_tried: list[str] = field(default_factory=list)


def compress(
    checkpoint: Checkpoint, config: CompressConfig | None, progress: Progress = silent
) -> tuple[Coded, CompressReport]:
    """Code every tensor; without a config each is stored raw.

    The bytes depend on the tensors, the config and the versions of modelpress and zstandard alone: the decode-speed
    floor is held against each codec's known speed, not against a measurement in this run.

    Raises:
        ConfigError: a dtype or a name that a pack cannot hold, or a config with a base.
        StageError: a decoded tensor differs from what was coded.
    """
    if config is not None and config.base is not None:
        raise ConfigError(
            "coding a checkpoint by itself",
            found=f"compress.base {config.base!r}",
            fix="call modelpress.delta.compress_against with that pack",
        )
    names = sorted(checkpoint.tensors, key=natural_key)
    check_names(names)
    stored: list[StoredTensor] = []
    rows: list[CodedTensor] = []
    for number, name in enumerate(names):
        progress(number, len(names), name)
        tensor = checkpoint.tensors[name]
        dtype, raw, shape = dtype_of(name, tensor), to_bytes(tensor), tuple(tensor.shape)
        plain = plain_piece(name, dtype, shape, raw)
        bound = bound_bytes(raw, dtype)
        digest = hashlib.sha256(raw.data).hexdigest()
        choice = choose(raw, dtype, plain, digest, config) if config else Choice(plain)
        stored.append(StoredTensor(choice.piece, digest, math.ceil(bound)))
        rows.append(_row(choice, raw.size, bound))
    progress(len(names), len(names))
    return Coded(checkpoint.kind, tuple(stored), dict(checkpoint.files), dict(checkpoint.metadata)), summary(rows)


def natural_key(name: str) -> tuple[tuple[tuple[int, int, str], ...], str]:
    """Sort key by dotted components, numbers by value: `layer.2` before `layer.10`, a layer's tensors together."""
    parts = name.split(".")
    return tuple((0, int(part), "") if re.fullmatch("[0-9]{1,9}", part) else (1, 0, part) for part in parts), name


def choose(
    raw: Bytes, dtype: DType, plain: Piece, digest: str, config: CompressConfig, floor: float | None = None
) -> Choice:
    """The cheapest candidate that decodes to the same bytes within the floor, and what the others would have cost.

    Args:
        raw: what is coded, (elements · itemsize,) uint8.
        dtype: of its elements.
        plain: the same stored raw.
        digest: sha256 (hex) that the piece is to carry.
        config: the codecs.
        floor: raw bytes per second and core; by default the config's.
    """
    floor = config.min_decode_bytes_per_second if floor is None else floor
    pieces: list[Piece] = []
    too_slow: list[str] = []
    not_tried: list[str] = []
    for codec_id in config.codecs if raw.size else ():
        codec = CODECS[codec_id]
        if codec.decode_bytes_per_second < floor:
            too_slow.append(codec_id)
        elif not codec.suits(raw, dtype):
            not_tried.append(codec_id)
        else:
            streams = codec.encode(raw, dtype, config)
            pieces.append(
                Piece(
                    plain.name, dtype, plain.shape, codec_id, digest, config.chunk_symbols, 0, plain.elements, streams
                )
            )
    costs = {piece.codec: _cost(piece) for piece in [*pieces, plain]}
    enough = TIE * min(costs.values())

    def rank(piece: Piece) -> tuple[float, int]:
        """By bytes; of those that are as good as the smallest, the one that decodes fastest."""
        cost = costs[piece.codec]
        return (-CODECS[piece.codec].decode_bytes_per_second if cost <= enough else 0.0, cost)

    for piece in sorted(pieces, key=rank):
        if costs[piece.codec] >= costs[plain.codec]:
            break
        if raw.size <= MAX_EXPANSION * piece.stored_bytes:  # beyond, a reader refuses the claim
            return Choice(piece, _prove(piece, raw), costs, too_slow, not_tried)
    return Choice(plain, None, costs, too_slow, not_tried)


def plain_piece(name: str, dtype: DType, shape: tuple[int, ...], raw: Bytes) -> Piece:
    """A tensor as it is."""
    elements = math.prod(shape)
    streams = [Stream.of("raw", "raw", [raw.data] if raw.size else [])]
    return Piece(name, dtype, shape, "raw", None, max(elements, 1), 0, elements, streams)


def _prove(piece: Piece, raw: Bytes) -> float:
    """Decode and compare; CPU seconds of the decoding."""
    started = time.thread_time()
    decoded = decode_piece(piece, f"proving tensor {piece.name!r} coded as {piece.codec}")
    seconds = time.thread_time() - started
    if not np.array_equal(decoded, raw):
        raise StageError(
            f"proving tensor {piece.name!r} coded as {piece.codec}",
            found="other bytes after decoding",
            expected="the tensor, bit by bit",
            fix=f"leave {piece.codec!r} out of compress.codecs, and report this",
        )
    return seconds


def _cost(piece: Piece) -> int:
    """Bytes that the piece takes in a shard, within a few."""
    header = sum(len(entry.name) + len("'':{'dtype':'U8','shape':[],'data_offsets':[,]},") for entry in piece.entries())
    digits = 3 * sum(len(str(entry.size_bytes)) for entry in piece.entries())
    described = 0 if piece.is_plain else len(compact(compact({piece.name: piece.describe()})))
    return piece.stored_bytes + header + digits + described


def _row(choice: Choice, raw_bytes: int, bound: float) -> CodedTensor:
    piece = choice.piece
    return CodedTensor(
        name=piece.name,
        dtype=piece.dtype.name,
        shape=list(piece.shape),
        codec=piece.codec,
        raw_bytes=raw_bytes,
        stored_bytes=piece.stored_bytes,
        entropy_bound_bytes=bound,
        decode_seconds=choice.seconds,
        candidates=choice.costs,
        too_slow=choice.too_slow,
        not_tried=choice.not_tried,
    )


def summary(rows: list[CodedTensor]) -> CompressReport:
    """The report of so many tensors."""
    raw, stored = sum(row.raw_bytes for row in rows), sum(row.stored_bytes for row in rows)
    coded = sum(row.raw_bytes for row in rows if row.codec != "raw")
    return CompressReport(
        raw_bytes=raw,
        stored_bytes=stored,
        compression_ratio=raw / stored if stored else 1.0,
        coded_share=coded / raw if raw else 0.0,
        tensors=rows,
    )
