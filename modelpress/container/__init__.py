"""The published bytes: shards that are valid safetensors files. `FORMAT.md` beside this file is the specification."""

from __future__ import annotations

from modelpress.container.base import Base
from modelpress.container.coded import Coded, StoredTensor
from modelpress.container.read import decode_piece, read_tensors
from modelpress.container.stored import Piece, metadata_of, read_pieces, stored_sha256

__all__ = [
    "Base",
    "Coded",
    "Piece",
    "StoredTensor",
    "decode_piece",
    "metadata_of",
    "read_pieces",
    "read_tensors",
    "stored_sha256",
]
