"""Distillation: a smaller student learns from a teacher's answers rather than from labels alone.

Classifiers and language models learn softened class probabilities (Hinton et al. 2015, arXiv:1503.02531); embedding
models learn the teacher's embeddings. A student may also match what goes on inside: hidden states (Sun et al. 2019,
arXiv:1908.09355; Jiao et al. 2019, arXiv:1909.10351), attention (Wang et al. 2020, arXiv:2002.10957), or where a CNN
looks (Zagoruyko and Komodakis 2017, arXiv:1612.03928).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modelpress.blocks import count_parameters, layer_list
from modelpress.config import DistillConfig
from modelpress.distill.cache import TeacherCache
from modelpress.distill.hooks import frozen, recorded, without_dropout
from modelpress.distill.losses import counted, hidden_loss, imitation_loss
from modelpress.distill.matching import Matching, matched
from modelpress.distill.students import make_student
from modelpress.errors import StageError
from modelpress.place import resident
from modelpress.progress import Progress, silent
from modelpress.reports import DistillReport
from modelpress.train import LossFn, train_
from modelpress.workload import Batch, Workload

__all__ = [
    "RECOVERY_LOSS",
    "Matching",
    "TeacherCache",
    "count_parameters",
    "counted",
    "distill",
    "distillation_loss",
    "frozen",
    "hidden_loss",
    "imitation_loss",
    "layer_list",
    "make_student",
    "matched",
    "recorded",
    "without_dropout",
]

RECOVERY_LOSS = DistillConfig(temperature=2.0, alpha=1.0)
"""Of a fine-tune that brings back what the model was; it is no second training on the labels."""


def distill(
    teacher: nn.Module, workload: Workload, config: DistillConfig, progress: Progress = silent
) -> tuple[nn.Module, DistillReport]:
    """Make the student that `config` names and train it on the teacher's answers. The teacher stays as it is.

    Raises:
        WorkloadError: the teacher has no such layers, or the workload no such architecture.
        StageError: the student is not smaller than the teacher, its outputs or what is matched have another shape, the
            teacher's answers cannot be cached, or training fails (see `train_`).
    """
    student = make_student(teacher, workload, config)
    teacher_parameters, student_parameters = count_parameters(teacher), count_parameters(student)
    if student_parameters >= teacher_parameters:
        raise StageError(
            "distilling",
            found=f"a student of {student_parameters:,} parameters and a teacher of {teacher_parameters:,}",
            expected="a smaller student",
            fix="lower the widths in distill.architecture, or keep fewer layers",
        )
    with resident(teacher, student), frozen(teacher), matched(teacher, student, workload, config) as matching:
        cache = TeacherCache(teacher, workload, config, progress) if config.cache_top_k else None
        loss_fn = distillation_loss(teacher, workload, config, matching, cache)
        trained = _Together(student, matching.projections) if matching and len(matching.projections) else student
        training = train_(trained, loss_fn, workload, config.train, progress)
    report = DistillReport(
        teacher_parameters=teacher_parameters,
        student_parameters=student_parameters,
        architecture=config.architecture,
        keep_layers=config.keep_layers,
        cache_bytes=cache.size_bytes if cache else None,
        train=training,
    )
    return student, report


def distillation_loss(
    teacher: nn.Module,
    workload: Workload,
    config: DistillConfig,
    matching: Matching | None = None,
    cache: TeacherCache | None = None,
) -> LossFn:
    """α · (loss against the teacher's outputs) + (1 − α) · (the workload's own loss) + what is matched inside.

    A student in training mode always takes the workload's own loss. One in eval mode (early stop, on calibration
    batches) takes it where the batch has targets, and is measured by the other terms alone where it has none: unseeded
    batches need not have any. The cache answers for the teacher in training mode; it knows the training data alone.

    Args:
        teacher: frozen, in eval mode; it runs only where a term needs it.
        workload: says what outputs are, and has the loss of the task.
        config: temperature, alpha, divergence and the weights.
        matching: what `matched` sees of the two.
        cache: the teacher's answers to the training data.
    """

    def loss_fn(student: nn.Module, batch: Batch) -> Tensor:
        mask = batch.inputs.get("attention_mask")
        cached = cache if student.training else None
        target = None
        if matching is not None or (config.alpha > 0 and cached is None):
            with torch.no_grad():
                target = teacher(**batch.inputs)
        output = student(**batch.inputs)
        loss: Tensor = output.new_zeros(())
        if config.alpha > 0 and cached is not None:
            loss = loss + config.alpha * cached.loss(output, batch, config.divergence, mask)
        elif config.alpha > 0:
            assert target is not None
            loss = loss + config.alpha * imitation_loss(
                output, target, workload.outputs, config.temperature, config.divergence, mask
            )
        if config.alpha < 1 and (student.training or batch.targets is not None):
            loss = loss + (1 - config.alpha) * workload.loss(output, batch)
        if matching is not None:
            loss = loss + matching.loss(mask)
        return loss

    return loss_fn


class _Together(nn.Module):
    """A student and the projections that are trained with it."""

    def __init__(self, student: nn.Module, projections: nn.ModuleList) -> None:
        super().__init__()
        self.student, self.projections = student, projections

    def forward(self, **inputs: Tensor) -> Tensor:
        """The student's outputs."""
        output: Tensor = self.student(**inputs)
        return output
