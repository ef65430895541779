"""What a teacher adds: the same student with and without it, on the same data, with the same number of updates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks._report import Row, main
from modelpress import intervals
from modelpress.config import DistillConfig, TrainConfig, WorkloadConfig
from modelpress.distill import count_parameters, distill
from modelpress.workload import Workload
from modelpress.workloads.causal_lm import CausalLM
from modelpress.workloads.image_classification import ImageClassification

NOTE = """The peer is the same student, from the same start, trained on the labels (or the text) alone. Differences are
paired by sample: on the digits a sample's score is the share of the seeds whose student is right, on the language model
a block's mean log-likelihood per token; intervals are two-sided, 95 %, over the samples. Students of the language model
read few blocks many times, and the weights of each one's best epoch on the calibration blocks stay, so that the peer
is not judged after it has learned its few blocks by heart; the teacher has read more of the same corpus, twice.
Evaluation files are nobody's.
"""

ALONE = "student alone"
CONFIDENCE = 0.95

DIGITS_TAUGHT: dict[str, dict[str, Any]] = {
    "KD, T = 1": {"temperature": 1.0, "alpha": 0.9},
    "KD, T = 4": {"temperature": 4.0, "alpha": 0.9},
}
TEXT_TAUGHT: dict[str, dict[str, Any]] = {
    "forward KL": {"alpha": 1.0},
    "forward KL, cached top 32": {"alpha": 1.0, "cache_top_k": 32},
    "reverse KL": {"alpha": 1.0, "divergence": "reverse-kl"},
}


def measure(quick: bool) -> Iterator[Row]:
    """Rows of both cases."""
    yield from digits(quick)
    yield from text(quick)


def digits(quick: bool) -> Iterator[Row]:
    """A CNN on sixty labelled digits, five seeds."""
    whole = WorkloadConfig(
        kind="image-classification", model="digits-cnn", data="digits", train_epochs=3 if quick else 12
    )
    teacher = ImageClassification(whole).source()
    scarce = ImageClassification(whole.model_copy(update={"train_samples": 60}))
    seeds = range(2 if quick else 5)
    train = TrainConfig(epochs=30 if quick else 80, batch_size=30, learning_rate=0.005)
    student: dict[str, Any] = {"architecture": {"channels": [8, 16], "hidden": 32}}

    def scores(how: dict[str, Any]) -> np.ndarray:
        """(seeds, samples)."""
        rows = []
        for seed in seeds:
            config = DistillConfig(**student, **how, train=train.model_copy(update={"seed": seed}))
            rows.append(_scores(distill(teacher, scarce, config)[0], scarce))
        return np.stack(rows)

    case = f"digits CNN, 60 labels, {len(seeds)} seeds"
    yield Row(case, "teacher", "accuracy", "", float(_scores(teacher, scarce).mean()))
    yield Row(case, "teacher", "parameters", "", float(count_parameters(teacher)))
    alone = scores({"alpha": 0.0})
    yield Row(case, ALONE, "accuracy", "", float(alone.mean()))
    yield Row(case, ALONE, "parameters", "", float(count_parameters(scarce.skeleton(student["architecture"]))))
    for system, how in DIGITS_TAUGHT.items():
        taught = scores(how)
        yield Row(case, system, "accuracy", "", float(taught.mean()))
        yield from _difference(case, system, taught.mean(axis=0), alone.mean(axis=0))
        yield Row(case, system, "seeds better", "", float((taught.mean(axis=1) > alone.mean(axis=1)).sum()))


def text(quick: bool) -> Iterator[Row]:
    """A decoder on Python's sources."""
    config = WorkloadConfig(
        kind="causal-lm",
        model="tiny-decoder",
        data="python-sources",
        architecture={"vocab_size": 2048, "hidden_size": 160, "intermediate_size": 448, "num_hidden_layers": 4},
        length=128,
        train_samples=400 if quick else 4000,
        calibration_samples=32,
        evaluation_samples=60 if quick else 300,
        train_epochs=2,
    )
    whole = CausalLM(config)
    teacher = whole.source()
    few = CausalLM(config.model_copy(update={"train_samples": 40 if quick else 300}))
    epochs = 4 if quick else 15
    student: dict[str, Any] = {
        "architecture": {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2},
        "temperature": 1.0,
        "train": TrainConfig(
            epochs=epochs, batch_size=16, learning_rate=3e-3, weight_decay=0.1, early_stop_epochs=epochs
        ),
    }
    case = f"decoder, {len(few.blocks['train'])} blocks of {config.length} tokens, {epochs} epochs"
    taught_by = _scores(teacher, few)
    yield from _language(case, "teacher", teacher, taught_by)
    module, _ = distill(teacher, few, DistillConfig(**student, alpha=0.0))
    alone = _scores(module, few)
    yield from _language(case, ALONE, module, alone)
    for system, how in TEXT_TAUGHT.items():
        module, report = distill(teacher, few, DistillConfig(**student, **how))
        found = _scores(module, few)
        yield from _language(case, system, module, found)
        yield from _difference(case, system, found, alone)
        if report.cache_bytes is not None:
            yield Row(case, system, "cache", "B", float(report.cache_bytes))


def _scores(module: nn.Module, workload: Workload) -> np.ndarray:
    """Per-sample scores on the evaluation split."""
    with torch.no_grad():
        parts = [
            workload.condense(module(**batch.inputs).numpy(), batch)
            for batch in workload.batches("evaluation", workload.evaluation_batch_size)
        ]
    return workload.score(np.concatenate(parts))


def _language(case: str, system: str, module: nn.Module, scores: np.ndarray) -> Iterator[Row]:
    yield Row(case, system, "perplexity", "", float(np.exp(-scores.mean())))
    yield Row(case, system, "log-likelihood", "nats/token", float(scores.mean()))
    yield Row(case, system, "parameters", "", float(count_parameters(module)))


def _difference(case: str, system: str, scores: np.ndarray, baseline: np.ndarray) -> Iterator[Row]:
    found = intervals.paired_difference(scores, baseline, CONFIDENCE)
    yield Row(case, system, "difference", "", found.value)
    yield Row(case, system, "difference low", "", found.low)
    yield Row(case, system, "difference high", "", found.high)


if __name__ == "__main__":
    main("methods.distill", measure, note=NOTE)
