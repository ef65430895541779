"""A pack and a new version of it, stored as the difference."""

from __future__ import annotations

from pathlib import Path

import torch

from modelpress.checkpoint import Checkpoint
from modelpress.config import CompressConfig, ShardConfig
from modelpress.delta import compress_against, open_base
from modelpress.reports import CompressReport
from modelpress.shard import draft_manifest, write_shards
from modelpress.store import Store
from tests.packs import COMPRESS, Pack


def codes(seed: int, *shape: int) -> torch.Tensor:
    """int8 codes of bell-shaped weights."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * 30).round().clamp(-127, 127).to(torch.int8)


def moved(tensor: torch.Tensor, share: float, seed: int = 9) -> torch.Tensor:
    """So many of the codes one step further, either way, modulo 2^bits."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1
    chosen = torch.rand(tensor.shape, generator=generator) < share
    return (tensor.long() + steps * chosen).to(tensor.dtype)


def first() -> Checkpoint:
    """Codes with scales, packed 4-bit codes, a table of which a version touches some rows, floats."""
    generator = torch.Generator().manual_seed(3)
    tensors = {
        "layer.0.codes": codes(0, 200, 300),
        "layer.0.scale": torch.rand(300, generator=generator) + 0.5,
        "layer.1.packed": torch.randint(0, 256, (90, 100), generator=generator).to(torch.uint8),
        "layer.2.index": torch.randint(0, 16, (120, 100), generator=generator).to(torch.uint8),
        "table": torch.randn(400, 32, generator=generator),
        "norm.bias": torch.randn(64, generator=generator),
        "none": torch.empty(0, 3),
        "old.name": torch.arange(300, dtype=torch.int16),
    }
    return Checkpoint("torch", tensors, {"config.json": b"{}" * 60}, {"architecture": {}})


def second() -> Checkpoint:
    """The same, a little trained: some codes moved, some rows, the bias; one tensor is new."""
    base = first()
    tensors = dict(base.tensors)
    tensors["layer.0.codes"] = moved(tensors["layer.0.codes"], 0.05)
    tensors["layer.1.packed"] = moved(tensors["layer.1.packed"], 0.05)
    tensors["layer.2.index"] = moved(tensors["layer.2.index"], 0.02)
    tensors["table"] = tensors["table"].clone()
    tensors["table"][5:9] += 0.125
    tensors["norm.bias"] = tensors["norm.bias"] * 1.01
    tensors["new"] = torch.arange(20, dtype=torch.int32)
    tensors["table.copy"] = base.tensors["table"].clone()
    tensors["new.name"] = tensors.pop("old.name")
    return Checkpoint("torch", tensors, base.files, base.metadata)


def make_delta(
    folder: Path, store: Store, checkpoint: Checkpoint, base: Pack, config: CompressConfig = COMPRESS
) -> tuple[Pack, CompressReport]:
    """A pack that refers to `base`, which is published; `folder` takes its shards."""
    config = config.model_copy(update={"base": base.digest})
    coded, report = compress_against(checkpoint, config, open_base(store, "demo", base.digest))
    shards, _ = write_shards(coded, ShardConfig(max_shard_size=32_768), folder)
    manifest, blobs = draft_manifest("demo", coded, shards, reports={"compress": report})
    return Pack(manifest, shards, blobs, checkpoint), report
