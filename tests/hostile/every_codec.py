"""Packs of a few kilobytes that use every codec and every coder, also with tensors cut between shards."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from modelpress.codec import CODECS
from modelpress.config import CompressConfig, ShardConfig
from modelpress.container import Coded, Piece, StoredTensor
from modelpress.container.tensors import dtype_of, to_bytes
from modelpress.manifest import Manifest
from modelpress.shard import draft_manifest, write_shards

CHUNK = 256
MOST_BYTES = 5000
"""Of a shard."""


def store_as(name: str, tensor: torch.Tensor, codec_id: str, chunk_symbols: int = CHUNK) -> StoredTensor:
    """A tensor in a codec, whether or not it gets smaller."""
    dtype, raw = dtype_of(name, tensor), to_bytes(tensor)
    config = CompressConfig.model_construct(chunk_symbols=chunk_symbols, zstd_level=3)
    digest = hashlib.sha256(raw.data).hexdigest()
    if codec_id == "raw":
        chunk_symbols = max(tensor.numel(), 1)
    streams = CODECS[codec_id].encode(raw, dtype, config)
    piece = Piece(name, dtype, tuple(tensor.shape), codec_id, digest, chunk_symbols, 0, tensor.numel(), streams)
    return StoredTensor(piece, digest, 0)


Pack = tuple[Manifest, dict[str, bytes]]
"""The manifest, and the shards by digest."""


def make(folder: Path) -> list[Pack]:
    """Small packs, of one shard and of several."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(700, generator=generator) * 0.02
    sparse = weights * (torch.rand(700, generator=generator) < 0.1)
    noise = torch.randint(0, 256, (MOST_BYTES,), dtype=torch.uint8, generator=generator)
    long = (torch.randn(9000, generator=generator) * 9).to(torch.int8)
    groups = [
        [
            store_as("planes.bf16", weights.bfloat16(), "planes-huffman"),
            store_as("planes.f32", weights[:300].reshape(3, 100), "planes-huffman"),
            store_as("zstd.i64", torch.arange(50).repeat(10), "zstd"),
        ],
        [
            store_as("rle.f16", sparse.half(), "rle-huffman"),
            store_as("mask.bool", sparse.bool(), "mask-huffman"),
            store_as("mask.i8", (sparse * 500).to(torch.int8), "mask-huffman"),
            store_as("raw.scalar", torch.tensor(-0.0), "raw"),
            store_as("raw.empty", torch.zeros(0, 3), "raw"),
        ],
        [store_as("raw.split", noise, "raw"), store_as("planes.split", long, "planes-huffman")],
    ]
    return [pack_of(folder / str(number), group) for number, group in enumerate(groups)]


def pack_of(folder: Path, stored: list[StoredTensor], most_bytes: int = MOST_BYTES) -> Pack:
    """Sharded, with a manifest."""
    coded = Coded("torch", tuple(stored))
    shards, _ = write_shards(coded, ShardConfig.model_construct(max_shard_size=most_bytes), folder)
    return draft_manifest("pack", coded, shards)[0], {shard.sha256: shard.path.read_bytes() for shard in shards}
