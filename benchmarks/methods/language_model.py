"""A decoder of 12 million parameters, trained on Python's own sources: what the benchmarks of language models share.

`trained_decoder` trains it once (about 10 minutes on two cores) and keeps it under `$XDG_CACHE_HOME`, by the digest of
its config and of its text; the next call reads it.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch import nn

import modelpress
from benchmarks._report import Row, main
from modelpress.checkpoint import Checkpoint, from_module, to_module
from modelpress.config import EvaluateConfig, WorkloadConfig
from modelpress.evaluate import evaluate
from modelpress.workloads.causal_lm import CausalLM

NOTE = """A Llama-shaped decoder, trained from nothing on Python's standard library and judged on files that it never
saw. Perplexity is per token of its own tokenizer (byte-level BPE). The peers are counted on the same training blocks:
tokens by themselves, and after the token before, mixed by the weight that is best on the calibration blocks.
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
