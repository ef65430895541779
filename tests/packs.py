"""Small packs with everything a real one has: several shards, coded and raw tensors, a split tensor, files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from modelpress import graph
from modelpress.checkpoint import Checkpoint
from modelpress.compress import compress
from modelpress.config import CompressConfig, ShardConfig
from modelpress.manifest import Manifest
from modelpress.publish import publish
from modelpress.reports import SourceReport, UploadReport
from modelpress.shard import ShardFile, draft_manifest, write_shards
from modelpress.store import Store

# Without a decode-speed floor the codecs chosen, and so the digest, do not depend on the machine's mood.
COMPRESS = CompressConfig(chunk_symbols=4096, min_decode_bytes_per_second=0)


@dataclass(frozen=True)
class Pack:
    """What is published, and the checkpoint it came from."""

    manifest: Manifest
    shards: list[ShardFile]
    blobs: dict[str, bytes]
    checkpoint: Checkpoint

    @property
    def digest(self) -> str:
        return self.manifest.digest

    def publish(self, store: Store) -> UploadReport:
        return publish(store, self.manifest, self.shards, self.blobs, source_bytes=1_000_000)


def torch_checkpoint(seed: int = 0) -> Checkpoint:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "layer.0.weight": torch.randn(64, 96, generator=generator),
        "layer.0.bias": torch.zeros(64),
        "layer.1.weight": torch.randn(96, 64, generator=generator).to(torch.bfloat16),
        "layer.2.weight": torch.randn(300, 64, generator=generator),
        "layer.3.codes": (torch.rand(50, 60, generator=generator) > 0.9).to(torch.int8),
        "scale": torch.tensor(0.5),
        "none": torch.empty(0, 3),
    }
    files = {"config.json": b'{"hidden": 64}', "sub/vocab.txt": b"word\n" * 200, "empty": b""}
    return Checkpoint("torch", tensors, files, {"architecture": {"hidden": 64}})


def onnx_checkpoint(seed: int = 0) -> Checkpoint:
    weight = np.random.default_rng(seed).standard_normal((96, 64)).astype(np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    signature = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", d]) for n, d in (("x", 96), ("y", 64))]
    body = helper.make_graph([node], "g", signature[:1], signature[1:], [numpy_helper.from_array(weight, "w")])
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    checkpoint = graph.split(model)
    return Checkpoint("onnx", checkpoint.tensors, checkpoint.files | {"labels.txt": b"a\nb\n"}, checkpoint.metadata)


def make_pack(
    folder: Path, checkpoint: Checkpoint | None = None, *, name: str = "demo", max_shard: int = 32_768
) -> Pack:
    """Compress, shard and draft; `folder` takes the shard files."""
    checkpoint = checkpoint or torch_checkpoint()
    coded, _ = compress(checkpoint, COMPRESS)
    shards, _ = write_shards(coded, ShardConfig(max_shard_size=max_shard), folder)
    source = SourceReport(parameters=1, size_bytes=2, trained=False)
    manifest, blobs = draft_manifest(name, coded, shards, reports={"source": source})
    return Pack(manifest, shards, blobs, checkpoint)


def assert_same(found: Checkpoint, expected: Checkpoint) -> None:
    """Bit for bit the same checkpoint."""
    assert found.kind == expected.kind
    assert found.files == expected.files
    assert found.metadata == expected.metadata
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert found.tensors[name].shape == tensor.shape
        assert torch.equal(found.tensors[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
