"""Pruning: weights as zeros, or whole channels, neurons and heads that physically disappear."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import nn

from modelpress.config import DistillConfig, PruneConfig
from modelpress.distill import count_parameters, distillation_loss, frozen
from modelpress.errors import CoverageError
from modelpress.progress import Progress, silent
from modelpress.prune.magnitude import prune_magnitude_
from modelpress.prune.outcome import Outcome
from modelpress.prune.structured import prune_structured_
from modelpress.reports import PruneReport
from modelpress.train import train_
from modelpress.workload import Workload

PRUNERS: dict[str, Callable[[nn.Module, Workload, PruneConfig, Progress], Outcome]] = {
    "magnitude": prune_magnitude_,
    "structured": prune_structured_,
}

RECOVERY_LOSS = DistillConfig(temperature=2.0, alpha=1.0)
"""Recovery brings back what the model was; it is not a second training on the labels."""


def prune_(module: nn.Module, workload: Workload, config: PruneConfig, progress: Progress = silent) -> PruneReport:
    """Prune `module` in place, then fine-tune it on the unpruned model's answers if `config.recovery` says so.

    Zeros of `magnitude` stay zeros in the recovery.

    Raises:
        ConfigError: a pattern in `targets` or `ignore` that matches nothing.
        CoverageError: nothing to prune, or a layer of which nothing would be left.
        StageError: weights or activations that are NaN or infinite, or a failed recovery.
        ExportError: `structured`, and the module cannot be traced.
    """
    unpruned = copy.deepcopy(module) if config.recovery else None
    parameters_before = count_parameters(module)
    outcome = PRUNERS[config.method](module, workload, config, progress)
    if not outcome.tensors:
        raise CoverageError(
            f"pruning ({config.method})",
            found=f"sparsity {config.sparsity:g} removes nothing from any layer",
            expected="at least one weight or structure removed",
            fix="raise prune.sparsity",
        )
    recovery = None
    if unpruned is not None and config.recovery is not None:
        with frozen(unpruned):
            loss = distillation_loss(unpruned, workload, RECOVERY_LOSS)
            recovery = train_(module, loss, workload, config.recovery, progress, outcome.hold)
    outcome.hold()
    return PruneReport(
        method=config.method,
        eligible_parameters=outcome.eligible_parameters,
        touched_parameters=outcome.touched_parameters,
        coverage=outcome.touched_parameters / outcome.eligible_parameters,
        parameters_before=parameters_before,
        parameters_after=count_parameters(module),
        zeros_after=sum(change.zeros for change in outcome.tensors),
        tensors=outcome.tensors,
        recovery=recovery,
    )
