"""What a teacher is for in language: where text is scarce, its answers teach more than the text does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from modelpress import intervals
from modelpress.config import DistillConfig, TrainConfig, WorkloadConfig
from modelpress.distill import distill
from modelpress.workloads.causal_lm import CausalLM
from tests.decoders import make_text_folder


def scores(module: nn.Module, workload: CausalLM) -> np.ndarray:
    with torch.no_grad():
        parts = [workload.condense(module(**b.inputs).numpy(), b) for b in workload.batches("evaluation", 32)]
    return workload.score(np.concatenate(parts))


def test_a_decoder_with_a_teacher_beats_the_same_decoder_without(tmp_path: Path) -> None:
    """The same start, sixty blocks and number of updates; the teacher has read a thousand."""
    config = WorkloadConfig(
        kind="causal-lm", model="tiny-decoder", data=str(make_text_folder(tmp_path, ("email", "asyncio", "http"))),
        length=32, calibration_samples=8, evaluation_samples=100, train_samples=1000, train_epochs=2,
        architecture={"vocab_size": 320, "hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 2},
    )  # fmt: skip
    teacher = CausalLM(config).source()
    scarce = CausalLM(config.model_copy(update={"train_samples": 60}))

    def student(**changes: object) -> np.ndarray:
        values = {
            "architecture": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1},
            "temperature": 1.0,
            "train": TrainConfig(epochs=25, batch_size=15, learning_rate=0.01),
            **changes,
        }
        return scores(distill(teacher, scarce, DistillConfig.model_validate(values))[0], scarce)

    alone = student(alpha=0.0)
    for how in ({"alpha": 1.0}, {"alpha": 1.0, "cache_top_k": 32}):
        assert intervals.paired_difference(student(**how), alone, 0.95).low > 0
