"""Cutting coded tensors into shards, and drafting the manifest that lists them."""

from __future__ import annotations

import errno
import hashlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from modelpress.config import ShardConfig
from modelpress.container import Coded, Piece, StoredTensor, metadata_of, stored_sha256
from modelpress.container.safetensors_file import Entry, compact, write
from modelpress.errors import ConfigError, StoreFullError
from modelpress.manifest import (
    FORMAT_VERSION,
    PLAIN_VERSION,
    FileEntry,
    Manifest,
    ShardEntry,
    TensorEntry,
    library_versions,
)
from modelpress.pack_files import pack_file, pack_reports
from modelpress.parallel.slices import rank_of
from modelpress.progress import Progress, silent
from modelpress.reports import Report, ShardReport

BASE_BYTES = (
    8
    + 7
    + len('{"__metadata__":{"format":"pt","modelpress":""}}')
    + len(compact(compact({"format_version": 1, "tensors": {}})))
)
"""Bytes of a shard that holds nothing, with the padding of its header."""
_NUMBERED = re.compile(r"(?:[^.]*\.)*?[0-9]+(?=\.|$)")


@dataclass(frozen=True)
class ShardFile:
    """A shard on the local disk, and the names of the tensors with a piece in it."""

    path: Path
    sha256: str
    size_bytes: int
    tensors: tuple[str, ...]


@dataclass
class _Plan:
    """The pieces of one shard, and an upper bound of its size."""

    pieces: list[Piece] = field(default_factory=list)
    size: int = BASE_BYTES


def write_shards(
    coded: Coded, config: ShardConfig, folder: Path, progress: Progress = silent
) -> tuple[list[ShardFile], ShardReport]:
    """Write the tensors as shards `shard-00000.safetensors`, … into `folder`, in reading order.

    No shard is larger than `config.max_shard_size`, header included; a tensor that is larger is split over
    neighbouring shards, at chunk boundaries where it is coded and between any two elements where it is raw.

    Raises:
        ConfigError: one chunk alone is larger than `max_shard_size`; the message tells the least possible. Or the
            shards are to be `by` rank, and no tensor is cut for ranks.
        StoreFullError: the disk is full; the file that was being written is removed.
    """
    names = [tensor.name for tensor in coded.tensors]
    check_by(names, config)
    plans = plan(coded.tensors, config, groups_of(names, config))
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for number, pieces in enumerate(plans):
        progress(number, len(plans))
        shards.append(write_shard(folder / f"shard-{number:05d}.safetensors", pieces))
    progress(len(plans), len(plans))
    sizes = [shard.size_bytes for shard in shards]
    return shards, ShardReport(shards=len(shards), total_bytes=sum(sizes), largest_bytes=max(sizes, default=0))


def check_by(names: Sequence[str], config: ShardConfig) -> None:
    """Refuse shards by rank of tensors that no rank has a share of.

    Raises:
        ConfigError: see above.
    """
    if config.by == "rank" and all(rank_of(name) is None for name in names):
        raise ConfigError(
            "cutting shards by rank",
            found=f"{len(names)} tensors, all of them whole",
            expected="shares of tensor-parallel ranks",
            fix="cut the checkpoint with modelpress.parallel.slices.sliced, or set shard.by to layer",
        )


def plan(tensors: Sequence[StoredTensor], config: ShardConfig, groups: Mapping[str, object]) -> list[list[Piece]]:
    """The pieces of each shard, in reading order; see `write_shards`. `groups`: of all tensors (`groups_of`)."""
    tensors = [tensor for tensor in tensors if not tensor.is_base]
    plans = [_Plan()]
    for before, tensor in zip([None, *tensors], tensors, strict=False):
        if before is not None and groups[before.name] != groups[tensor.name]:
            plans.append(_Plan())
        whole = tensor.piece
        size = _upper_bound(whole, config.max_shard_size)
        if plans[-1].size + size > config.max_shard_size:
            plans.append(_Plan())
        if BASE_BYTES + size <= config.max_shard_size:
            plans[-1].pieces.append(whole)
            plans[-1].size += size
            continue
        described = StoredTensor(_described(whole, tensor.raw_sha256), tensor.raw_sha256, tensor.entropy_bound_bytes)
        for part, part_size in _split(described.piece, config.max_shard_size):
            if plans[-1].pieces:
                plans.append(_Plan())
            plans[-1].pieces.append(part)
            plans[-1].size += part_size
    return [plan.pieces for plan in plans if plan.pieces]


def groups_of(names: Sequence[str], config: ShardConfig) -> Mapping[str, object]:
    """Of each of a model's tensors that with which it may share a shard: its layer, its rank, or anything."""
    if config.by == "layer":
        return layers_of(names)
    return {name: rank_of(name) if config.by == "rank" else None for name in names}


def layer_of(name: str, holders: Collection[str] = ()) -> str:
    """The layer of a tensor: its name up to and with the first numeric component (`model.layers.3`); where it has none,
    up to and with the first module that is none of `holders` (`model.lm_head`)."""
    if match := _NUMBERED.match(name):
        return match[0]
    parts = name.split(".")
    modules = (".".join(parts[:count]) for count in range(1, len(parts)))
    return next((module for module in modules if module not in holders), name)


def layers_of(names: Sequence[str]) -> dict[str, str]:
    """The layer of each of a model's tensors.

    No layers are modules that hold numbered ones, and a module that holds all others, as a wrapper does. Else the two
    ends of a model, embedding and output layer, would be one layer where both stand in the same wrapper.
    """
    numbered = [match[0].split(".")[:-1] for name in names if (match := _NUMBERED.match(name))]
    parents = [name.split(".")[:-2] for name in names]
    wrapper = [level[0] for level in takewhile(lambda level: len(set(level)) == 1, zip(*parents, strict=False))]
    holders = {".".join(parts[:count]) for parts in [*numbered, wrapper] for count in range(1, len(parts) + 1)}
    return {name: layer_of(name, holders) for name in names}


def draft_manifest(
    name: str,
    coded: Coded,
    shards: Sequence[ShardFile],
    *,
    config: Mapping[str, Any] | None = None,
    lineage: Mapping[str, Any] | None = None,
    licence: str = "unknown",
    reports: Mapping[str, Report] | None = None,
) -> tuple[Manifest, dict[str, bytes]]:
    """The manifest of a pack, and the blobs of its files by their sha256; with the shards, all that is published.

    Measured times (`..._seconds`, `..._per_second`) are left out of the reports.
    """
    blobs: dict[str, bytes] = {}
    files: list[FileEntry] = []
    for file_name, data in sorted(coded.files.items()):
        entry, blob = pack_file(file_name, data)
        blobs[entry.stored_sha256] = blob
        files.append(entry)
    reports_entry = None
    if reports:
        reports_entry, blob = pack_reports(
            {stage: timeless(report.model_dump(mode="json")) for stage, report in reports.items()}
        )
        blobs[reports_entry.stored_sha256] = blob
    where = {
        tensor.name: tuple(i for i, s in enumerate(shards) if tensor.name in set(s.tensors)) for tensor in coded.tensors
    }
    manifest = Manifest(
        format_version=PLAIN_VERSION if coded.base is None else FORMAT_VERSION,
        name=name,
        kind=coded.kind,
        metadata=coded.metadata,
        shards=tuple(ShardEntry(sha256=shard.sha256, size_bytes=shard.size_bytes) for shard in shards),
        tensors=tuple(tensor_entry(tensor, where[tensor.name]) for tensor in coded.tensors),
        files=tuple(files),
        config=dict(config or {}),
        versions=library_versions(),
        lineage=dict(lineage or {}),
        licence=licence,
        reports=reports_entry,
        base=coded.base,
    )
    return manifest, blobs


def timeless(value: Any) -> Any:
    """A report without measured times: the same bytes made again are the same pack."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if not key.endswith(("seconds", "per_second"))}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def tensor_entry(tensor: StoredTensor, shards: tuple[int, ...]) -> TensorEntry:
    """What the manifest says of a tensor whose pieces lie in these shards."""
    piece = tensor.piece
    return TensorEntry(
        name=tensor.name,
        dtype=piece.dtype.name,
        shape=piece.shape,
        codec=piece.codec,
        raw_sha256=tensor.raw_sha256,
        stored_sha256=stored_sha256([piece]),
        stored_bytes=piece.stored_bytes,
        entropy_bound_bytes=tensor.entropy_bound_bytes,
        shards=shards,
        base=tensor.base,
    )


def _described(piece: Piece, raw_sha256: str) -> Piece:
    """The piece with the digest that a description carries; a plain tensor had no need of it."""
    return Piece(
        piece.name,
        piece.dtype,
        piece.shape,
        piece.codec,
        raw_sha256,
        min(piece.chunk_symbols, 1 << 24),
        piece.start,
        piece.count,
        piece.streams,
    )


def _upper_bound(piece: Piece, limit: int) -> int:
    """Most bytes that a piece can add to a shard of at most `limit` bytes."""
    return piece.stored_bytes + _header_bound(piece.entries(), limit) + _description_bound(piece)


def _header_bound(entries: Sequence[Entry], limit: int) -> int:
    header = {
        entry.name: {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [limit, limit]}
        for entry in entries
    }
    return len(compact(header)) + 1


def _description_bound(piece: Piece) -> int:
    return 0 if piece.is_plain else len(compact(compact({piece.name: piece.describe()}))) + 1


def _split(piece: Piece, limit: int) -> Iterator[tuple[Piece, int]]:
    """Pieces that fill shards of their own, with upper bounds of what they take."""
    step = 1 if piece.codec == "raw" else piece.chunk_symbols
    lengths = _chunk_costs(piece)
    overhead = BASE_BYTES + _split_overhead(piece, max(limit, 2 * piece.stored_bytes))
    start = 0
    while start < piece.count:
        if piece.codec == "raw":
            chunks, size = max(limit - overhead, 0) // piece.dtype.itemsize, overhead
        else:
            chunks, size = 0, overhead
            for cost in lengths[start // step :]:
                if size + cost > limit:
                    break
                chunks, size = chunks + 1, size + cost
        if not chunks:
            least = overhead + (piece.dtype.itemsize if piece.codec == "raw" else max(lengths))
            raise ConfigError(
                f"splitting tensor {piece.name!r} over shards",
                found=f"shard.max_shard_size = {limit} bytes",
                expected=f"at least {least} bytes, for one chunk of it and its header",
                fix="raise shard.max_shard_size, or lower compress.chunk_symbols",
            )
        count = min(chunks * step, piece.count - start)
        part = piece.cut(start, count)
        yield part, _upper_bound(part, limit)
        start += count


def _chunk_costs(piece: Piece) -> list[int]:
    """Bytes that each chunk adds: itself, and its lengths in the description."""
    if piece.codec == "raw":
        return []
    return [
        sum(len(chunk) + len(str(len(chunk))) + 1 for chunk in chunks)
        for chunks in zip(*(stream.chunks for stream in piece.streams), strict=True)
    ]


def _split_overhead(piece: Piece, limit: int) -> int:
    """Upper bound of what a part of the piece adds besides its chunks."""
    description = piece.describe() | {"start": piece.count, "count": piece.count}
    for stream in description["streams"]:
        if "lengths" in stream:
            stream["lengths"] = []
    keys = [f"{piece.name}#{stream.name}" for stream in piece.streams]
    entries = [
        Entry(key, piece.dtype.name if piece.codec == "raw" else "U8", (max(limit, piece.count),), []) for key in keys
    ]
    return _header_bound(entries, limit) + len(compact(compact({piece.name: description}))) + 1


def write_shard(path: Path, pieces: Sequence[Piece]) -> ShardFile:
    """Write the shard that holds these pieces.

    Raises:
        StoreFullError: the disk is full; the file is removed.
    """
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("wb") as file:
            for part in write([entry for piece in pieces for entry in piece.entries()], metadata_of(pieces)):
                file.write(part)
                digest.update(part)
                size += len(part)
    except OSError as error:
        path.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreFullError(
                f"writing shard {path}", found=f"no space after {size} bytes", fix="free space on this disk"
            ) from error
        raise
    return ShardFile(path, digest.hexdigest(), size, tuple(piece.name for piece in pieces))
