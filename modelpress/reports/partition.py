"""Reports of a model that is split into parts."""

from __future__ import annotations

from typing import Literal

from modelpress.reports.base import Report


class PartReport(Report):
    """One part: contiguous blocks, and what runs before the first or after the last one with them."""

    first_block: str
    """Name of its first block."""
    last_block: str
    """Name of its last block."""
    blocks: int
    """How many it has."""
    size_bytes: int
    """Its parameters and buffers; one that two parts share counts for both."""
    flops: int
    """Of a forward pass of the example: matrix products, convolutions and attention."""
    forward_seconds: float
    """Of a forward pass of the example on this machine, the median."""


class PartitionReport(Report):
    """A model in contiguous parts of its blocks."""

    by: Literal["bytes", "flops", "seconds"]
    """What was balanced."""
    parts: list[PartReport]
    """In the order in which they run."""
    bounds: list[int]
    """Part p has the blocks from number `bounds[p]` up to and without `bounds[p + 1]`."""
    imbalance: float
    """The dearest part's cost ÷ the mean: 1 is perfect. No partition into as many contiguous parts has less."""
    equal_counts_imbalance: float
    """The same of parts with equally many blocks."""
    block_bytes: list[int]
    """Of each block; what runs before the first and after the last one is counted with these."""
    block_flops: list[int]
    """The same in FLOPs."""
    block_seconds: list[float]
    """The same in seconds."""


class RankLoadReport(Report):
    """What one rank read of a pack."""

    pack: str
    """The pack's digest."""
    tensors: int
    """Tensors, or shares of them, that this rank has now."""
    tensor_bytes: int
    """Their bytes."""
    shards: int
    """Shards that hold something of them."""
    pack_shards: int
    """Shards of the whole pack."""
    needed_bytes: int
    """Bytes of the shards that hold something of them."""
    read_bytes: int
    """Bytes of those that this rank read itself, from the store or the local cache; the others were sent to it."""
    seconds: float
    """From the manifest to the last tensor."""
