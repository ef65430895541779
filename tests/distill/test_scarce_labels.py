"""What distillation is for: with few labels, the teacher's soft answers teach more than the labels do."""

from __future__ import annotations

import numpy as np
import torch

from modelpress.config import DistillConfig, TrainConfig, WorkloadConfig
from modelpress.distill import distill
from modelpress.workloads.image_classification import ImageClassification


def test_a_student_with_a_teacher_beats_the_same_student_without() -> None:
    """Sixty labelled digits; the same start, data and number of updates; three seeds."""
    whole = WorkloadConfig(kind="image-classification", model="digits-cnn", data="digits", train_epochs=6)
    teacher = ImageClassification(whole).source()
    scarce = ImageClassification(whole.model_copy(update={"train_samples": 60}))

    def accuracy(alpha: float, seed: int) -> float:
        config = DistillConfig(
            architecture={"channels": [8, 16], "hidden": 32},
            temperature=4.0,
            alpha=alpha,
            train=TrainConfig(epochs=80, batch_size=30, learning_rate=0.005, seed=seed),
        )
        student, _ = distill(teacher, scarce, config)
        with torch.no_grad():
            outputs = [student(**batch.inputs).numpy() for batch in scarce.batches("evaluation", 256)]
        return float(scarce.score(np.concatenate(outputs)).mean())

    alone = [accuracy(0.0, seed) for seed in range(3)]
    taught = [accuracy(0.9, seed) for seed in range(3)]
    assert np.mean(taught) > np.mean(alone) + 0.01, (taught, alone)
