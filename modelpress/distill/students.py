"""What a student is before it learns: the workload's own smaller model, or a part of the teacher."""

from __future__ import annotations

import copy

import torch
from torch import nn

from modelpress.blocks import drop_layers_, layer_list, unlike
from modelpress.config import DistillConfig, PruneConfig
from modelpress.errors import WorkloadError
from modelpress.progress import silent
from modelpress.workload import Workload


def make_student(teacher: nn.Module, workload: Workload, config: DistillConfig) -> nn.Module:
    """The untrained student: the workload's own smaller model, or a copy of the teacher with chosen layers or a share
    of each layer's width.

    Raises:
        WorkloadError: an unknown architecture key, a layer that the teacher has not, layers that are not alike, or no
            list of layers at all.
        CoverageError, ExportError, StageError: `width-slice`, and the teacher cannot be cut (see `prune_`).
    """
    if config.student == "architecture":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.train.seed)
            return workload.skeleton(config.architecture)
    student = copy.deepcopy(teacher)
    if config.student == "width-slice":
        return _narrowed(student, workload, config.keep_width)
    layers = layer_list(student)
    missing = [index for index in config.keep_layers if index >= len(layers)]
    if missing:
        raise WorkloadError(
            "dropping layers",
            found=f"distill.keep_layers names {missing}",
            expected=f"numbers from 0 to {len(layers) - 1}: the teacher has {len(layers)} layers",
        )
    gone = [index for index in range(len(layers)) if index not in config.keep_layers]
    if found := unlike(student, gone):
        raise WorkloadError(
            "dropping layers",
            found=found,
            expected="layers that differ in their tensors alone: a checkpoint has the first layers of the teacher",
            fix="name other layers in distill.keep_layers, or set distill.student to 'architecture'",
        )
    drop_layers_(student, gone)
    return student


def _narrowed(student: nn.Module, workload: Workload, keep_width: float) -> nn.Module:
    """The neurons, heads and channels that matter most, and the layers that read them re-fitted (arXiv:2407.14679
    starts its students so)."""
    from modelpress.prune.structured import prune_structured_  # which imports this package for its recovery

    config = PruneConfig(structures=["channels", "neurons", "heads"], sparsity=1 - keep_width)
    prune_structured_(student, workload, config, silent, {})
    return student
