"""A light fine-tune of the sentence encoder as a new version: what is sent, and what the earlier scales cost.

The first version is the pretrained encoder, published; the second is fine-tuned here, contrastively, on other pairs
than those it is judged on. Both go through compress, shard and publish, so that bytes are those of objects in a store.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from torch import Tensor, nn

from benchmarks._encoder import encoder_config
from benchmarks._report import Row, main
from modelpress import graph, load
from modelpress.agreement import mean_cosine
from modelpress.checkpoint import Checkpoint
from modelpress.compress import compress
from modelpress.config import CompressConfig, ExportConfig, QuantizeConfig, ShardConfig
from modelpress.delta import compress_against, open_base
from modelpress.export import export
from modelpress.progress import silent
from modelpress.publish import publish
from modelpress.quantize import static
from modelpress.quantize.build import builder
from modelpress.quantize.frozen import Frozen
from modelpress.quantize.selection import chosen_layers, eligible_layers
from modelpress.reports import UploadReport
from modelpress.shard import draft_manifest, write_shards
from modelpress.store.base import Store
from modelpress.store.local import LocalStore
from modelpress.workloads.sentence_embedding import SentenceEmbedding

NOTE = """\
An encoder of 22.7M parameters; the second version was fine-tuned on retrieval pairs, and its weights moved by `moved`
of their norm. `full bytes` is what the second version takes when it stands alone, `sent` what publishing it as the
difference to the first sends, `share` the one ÷ the other; all files of a pack count. `codes moved` is the share of the
quantized weights' bytes that differ. `cosine` is the mean between the embeddings and those of the fine-tuned float
graph on held-out texts, `mrr` their retrieval. Every layer and the embedding tables are quantized. The peers are what
stores do without scales held still: sending only tensors that changed (`dedup of fp32 tensors`), and zstandard with
the first version's file as its dictionary, at level 19, over the whole file on earlier scales (`zstd --patch-from`).
"""

BATCH = 32
MAX_SHARE = 0.2
LEARNING_RATE = 2e-5
ASKED = "asked"
FP32 = "fp32 (no quantization)"

METHODS: dict[str, dict[str, Any]] = {
    "int8 dynamic": {"method": "dynamic", "embeddings": True},
    "int8 static": {"method": "static", "embeddings": True},
    "W4 g128, rtn": {"method": "weight-only", "num_bits": 4, "algorithm": "rtn", "embeddings": True},
    "W4 g128, gptq": {"method": "weight-only", "num_bits": 4, "embeddings": True},
}
QUICK = ("int8 dynamic", "W4 g128, rtn")


@dataclass(frozen=True)
class Version:
    """A published graph."""

    checkpoint: Checkpoint
    digest: str
    report: UploadReport


def measure(quick: bool) -> Iterable[Row]:
    """Rows of each method, on earlier scales and on fresh ones, and of the peers."""
    torch.manual_seed(0)
    workload = SentenceEmbedding(encoder_config(calibration=24 if quick else 128, evaluation=50 if quick else 300))
    before = workload.source()
    after = fine_tuned(before, workload, 4 if quick else 60)
    first, second = (export(module, workload, ExportConfig())[0] for module in (before, after))
    yield Row(FP32, "modelpress", "moved", "", moved(before, after))
    with tempfile.TemporaryDirectory(prefix="modelpress-") as folder:
        yield from _floats(first, second, Path(folder, "fp32"))
        for name, options in METHODS.items():
            if not quick or name in QUICK:
                yield from _quantized(name, QuantizeConfig(**options), first, second, workload, Path(folder, name))
        yield Row(next(iter(METHODS)), ASKED, "share", "", MAX_SHARE)


def fine_tuned(module: nn.Module, workload: SentenceEmbedding, steps: int) -> nn.Module:
    """A copy after so many steps of AdamW on the contrastive loss."""
    tuned = copy.deepcopy(module).eval()
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=LEARNING_RATE)
    done = 0
    for epoch in range(steps):
        for batch in workload.batches("train", BATCH, seed=epoch):
            if done == steps:
                return tuned
            loss = workload.loss(tuned(**batch.inputs), batch)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            done += 1
    return tuned


def moved(before: nn.Module, after: nn.Module) -> float:
    """Norm of the parameters' change ÷ theirs."""
    pairs = list(zip(before.parameters(), after.parameters(), strict=True))
    change = sum(float((b.detach() - a.detach()).double().square().sum()) for a, b in pairs)
    return float(np.sqrt(change / sum(float(a.detach().double().square().sum()) for a, _ in pairs)))


def _floats(first: Checkpoint, second: Checkpoint, folder: Path) -> Iterator[Row]:
    """The graph in float: whole, by equal tensors, as differences, and by zstandard against the first version."""
    base, whole, delta = _publish_both(first, second, folder)
    yield Row(FP32, "modelpress", "full bytes", "B", whole.sent_bytes)
    yield Row(FP32, "modelpress", "sent", "B", delta.sent_bytes)
    yield Row(FP32, "modelpress", "share", "", delta.sent_bytes / whole.sent_bytes)
    earlier = base.checkpoint.tensors
    changed = [tensor.nbytes for name, tensor in second.tensors.items() if not torch.equal(tensor, earlier[name])]
    total = sum(tensor.nbytes for tensor in second.tensors.values())
    yield Row(FP32, "dedup of fp32 tensors", "sent", "B", sum(changed))
    yield Row(FP32, "dedup of fp32 tensors", "share", "", sum(changed) / total)
    yield from _patch(FP32, first, second)


def _quantized(
    case: str,
    config: QuantizeConfig,
    first: Checkpoint,
    second: Checkpoint,
    workload: SentenceEmbedding,
    folder: Path,
) -> Iterator[Row]:
    base = _made(first, workload, config)
    versions = {
        "modelpress: earlier scales": _made(second, workload, config, Frozen(base)),
        "modelpress: fresh scales": _made(second, workload, config),
    }
    expected = _outputs(second, workload)
    for place, (system, version) in enumerate(versions.items()):
        published, whole, delta = _publish_both(base, version, folder / str(place))
        found = _outputs(version, workload)
        yield Row(case, system, "full bytes", "B", whole.sent_bytes)
        yield Row(case, system, "sent", "B", delta.sent_bytes)
        yield Row(case, system, "share", "", delta.sent_bytes / whole.sent_bytes)
        yield Row(case, system, "codes moved", "", _codes_moved(published.checkpoint, version))
        yield Row(case, system, "cosine", "", mean_cosine(found, expected))
        yield Row(case, system, "mrr", "", float(workload.score(found).mean()))
    yield from _patch(case, base, versions["modelpress: earlier scales"])


def _publish_both(first: Checkpoint, second: Checkpoint, folder: Path) -> tuple[Version, UploadReport, UploadReport]:
    """The first version published; the second alone in a store of its own, and as the difference beside the first."""
    store = LocalStore(folder / "store")
    base = _publish(first, store, folder / "first")
    whole = _publish(second, LocalStore(folder / "alone"), folder / "whole").report
    delta = _publish(second, store, folder / "delta", base.digest)
    _, found = load.load_checkpoint(store, "encoder", delta.digest)
    assert found.to_bytes() == second.to_bytes()
    return base, whole, delta.report


def _publish(checkpoint: Checkpoint, store: Store, folder: Path, base: str | None = None) -> Version:
    config = CompressConfig(base=base) if base is None else CompressConfig(base=base, max_delta_share=1.0)
    if base is None:
        coded, report = compress(checkpoint, config)
    else:
        coded, report = compress_against(checkpoint, config, open_base(store, "encoder", base))
    shards, _ = write_shards(coded, ShardConfig(), folder)
    manifest, blobs = draft_manifest("encoder", coded, shards, reports={"compress": report})
    sent = publish(store, manifest, shards, blobs, source_bytes=1)
    return Version(checkpoint, manifest.digest, sent)


def _made(
    checkpoint: Checkpoint, workload: SentenceEmbedding, config: QuantizeConfig, frozen: Frozen | None = None
) -> Checkpoint:
    """The graph with every layer quantized: no budget decides what stays in float."""
    model = graph.join(checkpoint)
    if config.method == "static":
        model = static.prepare(model)
    layers = chosen_layers(eligible_layers(model, config.embeddings), config)
    batches = [batch.inputs for batch in workload.batches("calibration", BATCH)]
    made = builder(model, layers, batches, config, silent, frozen)([layer.node for layer in layers], [])
    return graph.split(made)


def _codes_moved(base: Checkpoint, version: Checkpoint) -> float:
    different = total = 0
    for name, codes in version.tensors.items():
        if name.endswith("_quantized") and name in base.tensors:
            different += int((codes != base.tensors[name]).sum())
            total += codes.numel()
    return different / total


def _outputs(checkpoint: Checkpoint, workload: SentenceEmbedding) -> np.ndarray:
    session = graph.session(checkpoint)
    parts: list[dict[str, Tensor]] = [batch.inputs for batch in workload.batches("evaluation", BATCH)]
    return np.concatenate([graph.run(session, inputs) for inputs in parts])


def _patch(case: str, first: Checkpoint, second: Checkpoint) -> Iterator[Row]:
    """zstandard with the first version as the dictionary, in the parameters of `zstd --patch-from -19`."""
    old, new = first.to_bytes(), second.to_bytes()
    window = max(len(old), len(new)).bit_length() + 1
    parameters = zstandard.ZstdCompressionParameters.from_level(
        19 if len(new) < 2**25 else 9, window_log=window, enable_ldm=True, dict_size=len(old), source_size=len(new)
    )
    dictionary = zstandard.ZstdCompressionDict(old, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    patched = zstandard.ZstdCompressor(compression_params=parameters, dict_data=dictionary).compress(new)
    alone = zstandard.ZstdCompressor(level=3).compress(new)
    yield Row(case, "zstd --patch-from", "full bytes", "B", len(alone))
    yield Row(case, "zstd --patch-from", "sent", "B", len(patched))
    yield Row(case, "zstd --patch-from", "share", "", len(patched) / len(alone))


if __name__ == "__main__":
    main("delta", measure, note=NOTE)
