"""A whole model, coded: what `compress` hands to `shard`. In bytes it is one shard without a size limit, plus files."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from modelpress.checkpoint import FILE_PREFIX, Kind
from modelpress.codec import Buffer
from modelpress.container.safetensors_file import Entry, compact, read, write
from modelpress.container.stored import Piece, metadata_of, read_pieces
from modelpress.errors import CorruptionError

HEADER = "coded"


@dataclass(frozen=True)
class StoredTensor:
    """One coded tensor, whole, with what the manifest says about it."""

    piece: Piece
    raw_sha256: str
    """Digest of the tensor's own bytes."""
    entropy_bound_bytes: int
    """Order-0 bound of its planes, rounded up."""

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

    def to_bytes(self) -> bytes:
        """One valid safetensors file, deterministically; files are U8 tensors under `file:NAME`."""
        pieces = [tensor.piece for tensor in self.tensors]
        entries = [entry for piece in pieces for entry in piece.entries()]
        entries += [Entry(FILE_PREFIX + name, "U8", (len(data),), [data]) for name, data in sorted(self.files.items())]
        header = {
            "kind": self.kind,
            "metadata": self.metadata,
            "tensors": [[t.name, t.raw_sha256, t.entropy_bound_bytes] for t in self.tensors],
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
        except (KeyError, ValueError, TypeError) as error:
            raise CorruptionError(doing, found=repr(error), expected="what modelpress compress wrote") from error
        files = {
            name.removeprefix(FILE_PREFIX): b"".join(entries.pop(name).parts)
            for name in [name for name in entries if name.startswith(FILE_PREFIX)]
        }
        pieces = {piece.name: piece for piece in read_pieces(entries, metadata, doing)}
        if sorted(pieces) != sorted(name for name, _, _ in order):
            raise CorruptionError(doing, found=f"{len(pieces)} tensors", expected=f"the {len(order)} that are listed")
        tensors = tuple(StoredTensor(pieces[name], digest, bound) for name, digest, bound in order)
        return cls(kind, tensors, files, own)
