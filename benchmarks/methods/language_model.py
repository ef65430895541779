"""A decoder of 12 million parameters, trained on Python's own sources, quantized to 4 bits and pruned by half.

`trained_decoder` trains it once (about 10 minutes on two cores) and keeps it under `$XDG_CACHE_HOME`, by the digest of
its config and of its text; the next call reads it.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from torch import nn

import modelpress
from benchmarks._report import Row, main
from modelpress.checkpoint import Checkpoint, from_module, to_module
from modelpress.compress import compress
from modelpress.config import (
    CompressConfig,
    EvaluateConfig,
    ExportConfig,
    PruneConfig,
    QuantizeConfig,
    TrainConfig,
    WorkloadConfig,
)
from modelpress.evaluate import evaluate
from modelpress.export import export
from modelpress.prune import prune_
from modelpress.quantize import quantize
from modelpress.reports import EvaluationReport
from modelpress.workloads.causal_lm import CausalLM

NOTE = """A Llama-shaped decoder, trained from nothing on Python's standard library and judged on files that it never
saw. Perplexity is per token of its own tokenizer (byte-level BPE). The peers are counted on the same training blocks:
tokens by themselves, and after the token before, mixed by the weight that is best on the calibration blocks.

Weights of linear layers, the last one among them, are rounded to 4 bits in groups of 128 and run by ONNX Runtime; or
half of those in the blocks become zero, before and after an epoch of recovery on some of the training blocks. *More
perplexity* is that over the float model's; its interval is that of the paired difference of the log-likelihoods.
*Coded* is what the lossless codecs make of all tensors.
"""

CONFIG = WorkloadConfig(
    kind="causal-lm",
    model="tiny-decoder",
    data="python-sources",
    architecture={
        "vocab_size": 4096,
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
    },
    length=128,
    train_samples=10_000,
    calibration_samples=128,
    evaluation_samples=400,
    train_epochs=1,
)
"""12.2M parameters, 1.28M tokens."""

QUICK = CONFIG.model_copy(
    update={
        "architecture": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
        "train_samples": 800,
        "evaluation_samples": 100,
    }
)

JUDGED = EvaluateConfig(batch_sizes=[1], latency_seconds=0.5)
WEIGHT_ONLY = {
    "RTN": QuantizeConfig(method="weight-only", num_bits=4, algorithm="rtn", max_quality_drop=1),
    "GPTQ": QuantizeConfig(method="weight-only", num_bits=4, max_quality_drop=1),
    "GPTQ, act-order, not symmetric": QuantizeConfig(
        method="weight-only", num_bits=4, act_order=True, symmetric=False, max_quality_drop=1
    ),
}
RECOVERY_BLOCKS = 3000


def trained_decoder(cache: Path | None = None, config: WorkloadConfig = CONFIG) -> tuple[nn.Module, CausalLM]:
    """The trained decoder, in eval mode, and its workload.

    Args:
        cache: folder that keeps it; None: `modelpress` under `$XDG_CACHE_HOME` or `~/.cache`.
        config: what is trained.
    """
    workload = CausalLM(config)
    folder = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modelpress"
    key = hashlib.sha256(f"{modelpress.__version__} {config.fingerprint()} {workload.identity()}".encode()).hexdigest()
    path = folder / f"decoder-{key[:32]}.safetensors"
    if path.exists():
        return to_module(Checkpoint.from_bytes(path.read_bytes()), workload), workload
    module = workload.source(_say)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as partial:
        partial.write(from_module(module).to_bytes())
    Path(partial.name).rename(path)
    return module, workload


def measure(quick: bool) -> Iterator[Row]:
    """Rows of the decoder and of counted tokens."""
    started = time.perf_counter()
    module, workload = trained_decoder(config=QUICK if quick else CONFIG)
    seconds = time.perf_counter() - started
    case = f"Python's sources, {len(workload.blocks['evaluation'])} held-out blocks of {workload.config.length} tokens"
    system = "modelpress"
    report, _ = evaluate(from_module(module), workload, JUDGED, "source", None, 0)
    yield Row(case, system, "parameters", "", float(sum(one.numel() for one in module.parameters())))
    yield Row(
        case, system, "training tokens", "", float(workload.blocks["train"][:, 1:].size * workload.config.train_epochs)
    )
    yield Row(case, system, "perplexity", "", report.quality.shown["perplexity"])
    yield Row(case, system, "log-likelihood", "nats/token", report.quality.value)
    yield Row(case, system, "low", "nats/token", report.quality.low)
    yield Row(case, system, "high", "nats/token", report.quality.high)
    yield Row(case, system, report.further[0].metric, "", report.further[0].value)
    yield Row(case, system, "training, or reading it again", "s", seconds)
    for system, log_likelihood in counted(workload):
        yield Row(case, system, "perplexity", "", float(np.exp(-log_likelihood)))
        yield Row(case, system, "log-likelihood", "nats/token", log_likelihood)
    yield from quantized(module, workload, WEIGHT_ONLY)
    yield from pruned(module, workload, 100 if quick else RECOVERY_BLOCKS)


def quantized(module: nn.Module, workload: CausalLM, configs: Mapping[str, QuantizeConfig]) -> Iterator[Row]:
    """Rows of the float graph, and of it with its weights in 4 bits."""
    case = "4 bits, groups of 128"
    source = export(module, workload, ExportConfig())[0]
    report, scores = evaluate(source, workload, JUDGED, "export", None, 0)
    yield from _judged(case, "float", report)
    yield from _coded(case, "float", source)
    for name, config in configs.items():
        made, _ = quantize(source, workload, config)
        yield from _judged(case, name, evaluate(made, workload, JUDGED, "quantize", scores, 0)[0])
        yield from _coded(case, name, made)


def pruned(module: nn.Module, workload: CausalLM, blocks: int) -> Iterator[Row]:
    """Rows of half of the weights as zeros, by magnitude and by SparseGPT, and of the latter's recovery."""
    case = "50 % zeros in the blocks"
    scores = evaluate(from_module(module), workload, JUDGED, "source", None, 0)[1]
    head = ["model.lm_head"]
    for method in ("magnitude", "sparsegpt"):
        sparse = copy.deepcopy(module)
        prune_(sparse, workload, PruneConfig(method=method, ignore=head))
        yield from _judged(case, method, evaluate(from_module(sparse), workload, JUDGED, "prune", scores, 0)[0])
    fewer = copy.copy(workload)
    fewer.blocks = {**workload.blocks, "train": workload.blocks["train"][:blocks]}
    sparse = copy.deepcopy(module)
    training = TrainConfig(epochs=1, batch_size=32, learning_rate=5e-4)
    started = time.perf_counter()
    prune_(sparse, fewer, PruneConfig(method="sparsegpt", ignore=head, recovery=training))
    system = f"sparsegpt, recovered on {blocks} blocks"
    yield Row(case, system, "pruning and recovery", "s", time.perf_counter() - started)
    yield from _judged(case, system, evaluate(from_module(sparse), workload, JUDGED, "prune", scores, 0)[0])
    yield from _coded(case, system, from_module(sparse))


def _judged(case: str, system: str, report: EvaluationReport) -> Iterator[Row]:
    found = report.quality
    yield Row(case, system, "perplexity", "", found.shown["perplexity"])
    if found.difference is None or found.difference_low is None or found.difference_high is None:
        return
    yield Row(case, system, "more perplexity", "%", 100 * math.expm1(-found.difference))
    yield Row(case, system, "from", "%", 100 * math.expm1(-found.difference_high))
    yield Row(case, system, "to", "%", 100 * math.expm1(-found.difference_low))


def _coded(case: str, system: str, checkpoint: Checkpoint) -> Iterator[Row]:
    _, report = compress(checkpoint, CompressConfig())
    yield Row(case, system, "coded", "B", float(report.stored_bytes))


def counted(workload: CausalLM) -> Iterator[tuple[str, float]]:
    """Mean log-likelihood of the evaluation tokens under counts of the training tokens (of single ones: one more)."""
    size = workload.vocab_size
    train, held, judged = (workload.blocks[split] for split in ("train", "calibration", "evaluation"))
    alone = np.bincount(train[:, 1:].ravel(), minlength=size) + 1.0
    alone /= alone.sum()
    pairs = np.bincount(train[:, :-1].ravel().astype(np.int64) * size + train[:, 1:].ravel(), minlength=size * size)
    pairs = pairs.reshape(size, size)
    seen = np.maximum(pairs.sum(axis=1), 1)

    def log_likelihood(blocks: np.ndarray, weight: float) -> float:
        before, after = blocks[:, :-1].ravel(), blocks[:, 1:].ravel()
        return float(np.log(weight * pairs[before, after] / seen[before] + (1 - weight) * alone[after]).mean())

    weight = max(np.linspace(0, 0.95, 20), key=lambda one: log_likelihood(held, float(one)))
    yield "token counts", log_likelihood(judged, 0.0)
    yield "token pair counts, interpolated", log_likelihood(judged, float(weight))


def _say(done: int, total: int, note: str = "") -> None:
    if done % 25 == 0 or done == total:
        print(f"{done} of {total}: {note}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main("methods.language_model", measure, note=NOTE)
