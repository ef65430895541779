"""Pruning: weights as zeros, or whole channels, neurons and heads that physically disappear."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import nn

from modelpress.config import PruneConfig, TrainConfig
from modelpress.distill import count_parameters
from modelpress.errors import ConfigError, CoverageError
from modelpress.progress import Progress, silent
from modelpress.prune.magnitude import prune_magnitude_
from modelpress.prune.masks import Masks
from modelpress.prune.outcome import Outcome
from modelpress.prune.recovery import recover_
from modelpress.prune.sparsegpt import prune_sparsegpt_
from modelpress.prune.structured import prune_structured_
from modelpress.prune.wanda import prune_wanda_
from modelpress.reports import PruneReport, PruneStep, TrainReport
from modelpress.residence import IN_MEMORY, Residence
from modelpress.workload import Workload

PRUNERS: dict[str, Callable[[nn.Module, Workload, PruneConfig, Progress, Masks, Residence], Outcome]] = {
    "magnitude": prune_magnitude_,
    "wanda": prune_wanda_,
    "sparsegpt": prune_sparsegpt_,
    "structured": prune_structured_,
}
"""The last arguments: masks of an earlier step, which only grow, and where the weights are."""


def prune_(
    module: nn.Module,
    workload: Workload,
    config: PruneConfig,
    progress: Progress = silent,
    residence: Residence = IN_MEMORY,
) -> PruneReport:
    """Prune `module` in place, then fine-tune it on the unpruned model's answers if `config.recovery` says so.

    Zeros stay zeros in the recovery. With `config.steps` both are done several times, to a sparsity that rises.

    `residence` says where the weights are; what needs all of them at once is refused where they are elsewhere.

    Raises:
        ConfigError: a pattern in `targets` or `ignore` that matches nothing, or an option that `residence` rules out.
        CoverageError: nothing to prune, or a layer of which nothing would be left.
        StageError: weights or activations that are NaN or infinite, a layer that calibration data cannot judge or
            whose size `config.pattern` does not divide, or a failed recovery.
        ExportError: `structured`, and the module cannot be traced.
    """
    if not residence.at_once:
        _check_blockwise(config)
    unpruned = copy.deepcopy(module) if config.recovery else None
    parameters_before = count_parameters(module)
    rows: list[PruneStep] = []
    masks: Masks = {}
    recovery: TrainReport | None = None
    matched = 0
    for step, sparsity in enumerate(sparsities(config.sparsity, config.steps)):
        outcome = PRUNERS[config.method](
            module, workload, config.model_copy(update={"sparsity": sparsity}), progress, masks, residence
        )
        masks = outcome.masks
        if step == config.steps - 1 and not outcome.tensors:
            raise CoverageError(
                f"pruning ({config.method})",
                found=f"sparsity {config.sparsity:g} removes nothing from any layer",
                expected="at least one weight or structure removed",
                fix="raise prune.sparsity",
            )
        if unpruned is not None and config.recovery is not None:
            training = _share(config.recovery, step, config.steps)
            recovery, matched = recover_(
                module,
                unpruned,
                workload,
                training,
                config.recovery_hidden_weight,
                outcome.hold,
                progress,
                outcome.kept_layers,
            )
        outcome.hold()
        rows.append(PruneStep(sparsity=sparsity, zeros=sum(row.zeros for row in outcome.tensors), recovery=recovery))
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
        matched_states=matched,
        steps=rows if config.steps > 1 else [],
        kept_layers=outcome.kept_layers,
        influences=outcome.influences,
        refitted_layers=outcome.refitted_layers,
    )


def _check_blockwise(config: PruneConfig) -> None:
    """Refuse what needs all weights at once.

    Raises:
        ConfigError: there is such an option.
    """
    refused = {
        "prune.method 'structured'": config.method == "structured",
        "prune.scope 'global'": config.scope == "global",
        "prune.recovery": config.recovery is not None,
    }
    for option, asked in refused.items():
        if asked:
            raise ConfigError(
                "pruning one block at a time",
                found=f"{option}, which needs the whole model in memory",
                expected="a method that sets weights to zero, layer by layer, and no fine-tune",
                fix="prune it with the line (modelpress run), or take method 'magnitude', 'wanda' or 'sparsegpt'",
            )


def sparsities(final: float, steps: int) -> list[float]:
    """Sparsity after each step: s · (1 − (1 − t/n)³), fast while there is much to spare (arXiv:1710.01878)."""
    return [final * (1 - (1 - step / steps) ** 3) for step in range(1, steps)] + [final]


def _share(config: TrainConfig, step: int, steps: int) -> TrainConfig:
    """One step's part of the epochs, the later ones the longer, each with an order of the data of its own."""
    epochs = config.epochs * (step + 1) // steps - config.epochs * step // steps
    return config.model_copy(update={"epochs": epochs, "seed": config.seed + step})
