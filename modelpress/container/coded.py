"""A whole model, coded: what `compress` hands to `shard`. In bytes it is one shard without a size limit, plus files."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from math import prod
from typing import Any

from modelpress.checkpoint import FILE_PREFIX, Kind
from modelpress.codec import Buffer
from modelpress.container.safetensors_file import Entry, compact, read, write
from modelpress.container.stored import RAW, Piece, metadata_of, read_pieces
from modelpress.dtypes import DTYPES, DType
from modelpress.errors import CorruptionError

HEADER = "coded"


@dataclass(frozen=True)
class StoredTensor:
    """One coded tensor, whole, with what the manifest says about it."""

    piece: Piece
    raw_sha256: str
    """Digest of the tensor's own bytes."""
    entropy_bound_bytes: int
    """Order-0 bound of its planes, or of the difference's, rounded up."""
    base: str | None = None
    """Name of the base's tensor that the piece holds the difference to."""

    @classmethod
    def unchanged(cls, name: str, raw_sha256: str, base: str, dtype: DType, shape: tuple[int, ...]) -> StoredTensor:
        """What is the base's tensor bit by bit: a piece without streams, which stands in no shard."""
        piece = Piece(name, dtype, shape, RAW, raw_sha256, 1, 0, prod(shape), ())
        return cls(piece, raw_sha256, 0, base)

    @property
    def is_base(self) -> bool:
        """Whether it is the base's tensor as it is."""
        return self.base is not None and not self.piece.streams

    @property
    def name(self) -> str:
        """Its name in the checkpoint."""
        return self.piece.name


@dataclass(frozen=True)
class Coded:
    """Coded tensors in reading order, and the checkpoint's files and metadata."""

    kind: Kind
    tensors: tuple[StoredTensor, ...]
    files: dict[str, bytes] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    base: str | None = None
    """Digest of the pack that some tensors are the difference to."""

    def to_bytes(self) -> bytes:
        """One valid safetensors file, deterministically; files are U8 tensors under `file:NAME`."""
        pieces = [tensor.piece for tensor in self.tensors if not tensor.is_base]
        entries = [entry for piece in pieces for entry in piece.entries()]
        entries += [Entry(FILE_PREFIX + name, "U8", (len(data),), [data]) for name, data in sorted(self.files.items())]
        header: dict[str, Any] = {
            "kind": self.kind,
            "metadata": self.metadata,
            "tensors": [[t.name, t.raw_sha256, t.entropy_bound_bytes] for t in self.tensors],
        }
        if self.base is not None:
            based = [tensor for tensor in self.tensors if tensor.base is not None]
            header |= {
                "base": self.base,
                "differences": {t.name: t.base for t in based if not t.is_base},
                "unchanged": {t.name: [t.base, t.piece.dtype.name, list(t.piece.shape)] for t in based if t.is_base},
            }
        return b"".join(write(entries, metadata_of(pieces) | {HEADER: compact(header)}))

    @classmethod
    def from_bytes(cls, data: Buffer) -> Coded:
        """Read what `to_bytes` wrote; tensors are views of `data`.

        Raises:
            CorruptionError: not such a file.
        """
        doing = "reading coded tensors"
        entries, metadata = read(data, doing)
        try:
            header = json.loads(metadata[HEADER])
            kind, own, order = (
                header["kind"],
                header["metadata"],
                [(str(n), str(d), int(b)) for n, d, b in header["tensors"]],
            )
            base, differences = header.get("base"), dict(header.get("differences", {}))
            unchanged = {
                str(name): (str(original), DTYPES[dtype], tuple(shape))
                for name, (original, dtype, shape) in header.get("unchanged", {}).items()
            }
        except (KeyError, ValueError, TypeError) as error:
            raise CorruptionError(doing, found=repr(error), expected="what modelpress compress wrote") from error
        files = {
            name.removeprefix(FILE_PREFIX): b"".join(entries.pop(name).parts)
            for name in [name for name in entries if name.startswith(FILE_PREFIX)]
        }
        pieces = {piece.name: piece for piece in read_pieces(entries, metadata, doing)}
        if sorted(pieces.keys() | unchanged) != sorted(name for name, _, _ in order):
            raise CorruptionError(doing, found=f"{len(pieces)} tensors", expected=f"the {len(order)} that are listed")
        tensors = tuple(
            StoredTensor(pieces[name], digest, bound, differences.get(name))
            if name in pieces
            else StoredTensor.unchanged(name, digest, *unchanged[name])
            for name, digest, bound in order
        )
        return cls(kind, tensors, files, own, base)
