"""Deep Compression's experiment (Han et al. 2016, arXiv:1510.00149, table 1) with modelpress's own line.

LeNet-300-100 and LeNet-5 are trained, pruned by magnitude in rising steps, their weights shared by codebooks whose
values are trained, coded and published into a store in a folder. The data are scikit-learn's digits at 28×28 pixels,
half of them held out: the papers' MNIST is not in any package.
"""

from __future__ import annotations

import copy
import heapq
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from onnx import numpy_helper
from torch import nn

from benchmarks._report import Row, main
from modelpress import graph
from modelpress.checkpoint import Checkpoint, from_module
from modelpress.compress import compress
from modelpress.config import (
    CompressConfig,
    Config,
    EvaluateConfig,
    ExportConfig,
    PruneConfig,
    QuantizeConfig,
    ShardConfig,
    TrainConfig,
    WorkloadConfig,
)
from modelpress.distill import RECOVERY_LOSS, distillation_loss, frozen
from modelpress.evaluate import evaluate
from modelpress.export import export
from modelpress.progress import silent
from modelpress.prune.magnitude import prune_magnitude_
from modelpress.prune.masks import Masks
from modelpress.publish import publish
from modelpress.quantize.from_module import quantize_module
from modelpress.reports import EvaluationReport, Report, UploadReport
from modelpress.scores import Scored
from modelpress.shard import draft_manifest, write_shards
from modelpress.store.local import LocalStore
from modelpress.train import train_
from modelpress.workload import Workload, load_workload

PAPER = {"lenet-300-100": 40.0, "lenet-5": 39.0}
"""Deep Compression's ratios, table 1."""
DENSE_EPOCHS = {"lenet-300-100": 60, "lenet-5": 30}
EPOCHS = {"lenet-300-100": 40, "lenet-5": 10}
"""Of each pruning step up to a sparsity of 0.95; twice as many above."""
STEPS = (0.8, 0.9, 0.94, 0.96, 0.97, 0.98, 0.985)
QUICK_STEPS = (0.8, 0.9, 0.95)
NUM_BITS = (3, 2)
GAP_BITS = {2: 5, 4: 8}
"""Deep Compression's bits for the distance to the next weight, by the dimensions of the tensor."""

NOTE = f"""Asked: at least 64 times fewer published bytes than the source's fp32 checkpoint has, with an error within
the interval of the dense network's. Deep Compression reports {PAPER["lenet-300-100"]:g}× and {PAPER["lenet-5"]:g}×
on MNIST, DeepCABAC 63.6× on VGG-16 (arXiv:1907.11900), both without a manifest or a graph.

*Published* is every byte of the pack: manifest with the configs, reports, graph, shards. *Weights* is what the coded
tensors take in the shards; tensors of less than 1 KiB, biases among them, stand in the graph. *From* and *to* are the
error's 95 % interval; *difference* is that to the dense network's error on the same held-out digits, with its own.
Nothing was removed physically: this is the classic recipe, prune, share, code. *Han et al.'s code* is the same coded
tensors in the paper's format, counted: gaps of 5 bits in linear layers and 8 in convolutions, both streams Huffman
coded; without headers, code tables and codebooks.
"""


@dataclass(frozen=True)
class Run:
    """One network on its data, and what it is compared with."""

    name: str
    workload: Workload
    dense: nn.Module
    source_bytes: int
    scores: Scored
    """Per held-out sample, the dense network's."""


def measure(quick: bool) -> Iterator[Row]:
    """Rows of both networks, stage by stage."""
    for name in PAPER:
        dense_epochs = 10 if quick else DENSE_EPOCHS[name]
        workload = load_workload(
            WorkloadConfig(kind="image-classification", model=name, data="digits-28", train_epochs=dense_epochs)
        )
        dense = workload.source()
        source = from_module(dense)
        report, scores = _judged(source, workload, None)
        run = Run(name, workload, dense, len(source.to_bytes()), scores)
        yield Row(name, "Deep Compression, as published for MNIST", "ratio", "×", PAPER[name])
        yield Row(name, "dense, fp32 checkpoint", "published", "B", float(run.source_bytes))
        yield from _quality(name, "dense, fp32 checkpoint", report)
        yield from _published(run, "dense, lossless codecs", _exported(run, dense), {}, {})
        steps, epochs = (QUICK_STEPS, 3) if quick else (STEPS, EPOCHS[name])
        pruned = copy.deepcopy(dense)
        prune_in_steps_(pruned, run, steps, epochs)
        config = PruneConfig(method="magnitude", scope="global", sparsity=steps[-1])
        label = f"{100 * steps[-1]:g} % pruned"
        yield from _published(run, label, _exported(run, pruned), {"prune": config}, {})
        for bits in NUM_BITS:
            for recovery in (None, TrainConfig(epochs=epochs, learning_rate=1.5e-3)):
                yield from _shared(run, pruned, label, config, bits, recovery)


def prune_in_steps_(module: nn.Module, run: Run, steps: Sequence[float], epochs: int) -> None:
    """Magnitude pruning over all layers, recovered after each step on the answers of the dense network."""
    masks: Masks = {}
    for sparsity in steps:
        config = PruneConfig(method="magnitude", scope="global", sparsity=sparsity)
        outcome = prune_magnitude_(module, run.workload, config, silent, masks)
        masks = outcome.masks
        training = TrainConfig(epochs=epochs if sparsity < 0.95 else 2 * epochs, learning_rate=3e-3)
        with frozen(run.dense):
            loss = distillation_loss(run.dense, run.workload, RECOVERY_LOSS)
            train_(module, loss, run.workload, training, after_update=outcome.hold)
        outcome.hold()


def _shared(
    run: Run, pruned: nn.Module, label: str, prune: PruneConfig, bits: int, recovery: TrainConfig | None
) -> Iterator[Row]:
    config = QuantizeConfig(method="codebook", num_bits=bits, recovery=recovery, max_quality_drop=0.5)
    made, report = quantize_module(pruned, _exported(run, pruned), run.workload, config, ExportConfig())
    system = f"{label}, {2**bits - 1} values" + (", trained" if recovery else "")
    yield from _published(run, system, made, {"prune": prune, "quantize": config}, {"quantize": report})
    if recovery:
        yield Row(run.name, f"{system}, Han et al.'s code", "weights", "B", han_bytes(indexed_weights(made)))


def _exported(run: Run, module: nn.Module) -> Checkpoint:
    return export(module, run.workload, ExportConfig())[0]


def _published(
    run: Run,
    system: str,
    checkpoint: Checkpoint,
    configs: dict[str, Config],
    reports: dict[str, Report],
) -> Iterator[Row]:
    """Code, shard, publish and judge what was published."""
    coded, compressed = compress(checkpoint, CompressConfig())
    with tempfile.TemporaryDirectory(prefix="modelpress-") as folder:
        shards, sharded = write_shards(coded, ShardConfig(), Path(folder))
        manifest, blobs = draft_manifest(
            run.name,
            coded,
            shards,
            config={stage: config.model_dump(mode="json", exclude_defaults=True) for stage, config in configs.items()},
            licence=run.workload.licence(),
            reports={**reports, "compress": compressed, "shard": sharded},
        )
        sent = publish(LocalStore(Path(folder, "store")), manifest, shards, blobs, source_bytes=run.source_bytes)
    yield from _sizes(run.name, system, sent, compressed.stored_bytes)
    judged, _ = _judged(checkpoint, run.workload, run.scores)
    yield from _quality(run.name, system, judged)


def _sizes(case: str, system: str, sent: UploadReport, weights: int) -> Iterator[Row]:
    yield Row(case, system, "published", "B", float(sent.published_bytes))
    yield Row(case, system, "ratio", "×", sent.compression_ratio)
    yield Row(case, system, "weights", "B", float(weights))


def _judged(checkpoint: Checkpoint, workload: Workload, baseline: Scored | None) -> tuple[EvaluationReport, Scored]:
    config = EvaluateConfig(batch_sizes=[32], latency_seconds=0.2)
    return evaluate(checkpoint, workload, config, "quantize", baseline, 0)


def _quality(case: str, system: str, report: EvaluationReport) -> Iterator[Row]:
    """Errors in percent, differences in percentage points."""
    found = report.quality
    yield Row(case, system, "error", "%", 100 * (1 - found.value))
    yield Row(case, system, "from", "%", 100 * (1 - found.high))
    yield Row(case, system, "to", "%", 100 * (1 - found.low))
    if found.difference is None or found.difference_low is None or found.difference_high is None:
        return
    yield Row(case, system, "difference", "points", -100 * found.difference)
    yield Row(case, system, "least", "points", -100 * found.difference_high)
    yield Row(case, system, "most", "points", -100 * found.difference_low)


def indexed_weights(checkpoint: Checkpoint) -> list[npt.NDArray[np.float32]]:
    """The weights whose indices are coded tensors; smaller ones stand in the graph."""
    arrays = {one.name: numpy_helper.to_array(one) for one in graph.join(checkpoint).graph.initializer}
    names = [name.removesuffix("_indices") for name in checkpoint.tensors if name.endswith("_indices")]
    return [arrays[f"{name}_values"][arrays[f"{name}_indices"]] for name in names]


def han_bytes(tensors: Sequence[npt.NDArray[np.float32]]) -> float:
    """Bytes of matrices and kernels in Deep Compression's format, without headers, code tables and codebooks."""
    bits = 0
    for tensor in tensors:
        longest = 2 ** GAP_BITS[tensor.ndim] - 1
        flat = tensor.ravel()
        places = np.flatnonzero(flat)
        gaps = np.diff(places, prepend=-1) - 1
        # A gap that does not fit becomes zeros that are stored as weights, each after the longest gap.
        fillers = int((gaps // (longest + 1)).sum())
        distances = Counter((gaps % (longest + 1)).tolist())
        distances[longest] += fillers
        values = Counter(flat[places].tolist())
        values[0.0] += fillers
        bits += huffman_bits(distances) + huffman_bits(values)
    return float(-(-bits // 8))


def huffman_bits(counts: Counter[int] | Counter[float]) -> int:
    """Bits of all symbols in a Huffman code of their own: the sum of the weights of all inner nodes."""
    heap = [count for count in counts.values() if count]
    heapq.heapify(heap)
    if len(heap) == 1:
        return heap[0]
    total = 0
    while len(heap) > 1:
        pair = heapq.heappop(heap) + heapq.heappop(heap)
        total += pair
        heapq.heappush(heap, pair)
    return total


if __name__ == "__main__":
    torch.manual_seed(0)
    main("methods.deep_compression", measure, note=NOTE)
