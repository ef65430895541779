"""What the methods that set weights to zero share: which weights, what is refused before any changes, the report."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modelpress.config import PruneConfig
from modelpress.errors import CoverageError, StageError
from modelpress.layerwise import LayerInputs
from modelpress.prune.masks import Masks, parse_pattern
from modelpress.prune.outcome import Outcome
from modelpress.prune.select import select
from modelpress.reports import TensorChange

BATCH_SIZE = 32
"""Calibration samples at a time."""

MIN_ROWS = 16
"""Fewer inputs say nothing about a layer."""


@dataclass(frozen=True)
class Judged:
    """What calibration data said of a layer."""

    rows: int
    """Inputs seen."""
    error: float
    """‖(W − W')X‖² ÷ ‖WX‖²."""


def prunable_weights(module: nn.Module) -> dict[str, Tensor]:
    """Weights of linear and convolution layers by module name, shared ones once.

    Raises:
        CoverageError: there are none.
    """
    found: dict[str, Tensor] = {}
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear | nn.Conv1d | nn.Conv2d) and not any(child.weight is w for w in found.values()):
            found[name] = child.weight
    if not found:
        raise CoverageError(
            f"pruning {type(module).__name__}",
            found="no linear or convolution layer",
            expected="at least one",
            fix="remove `prune` from the config",
        )
    return found


def choose(module: nn.Module, config: PruneConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All weights that can be pruned, and those that the config means.

    Raises:
        ConfigError, CoverageError, StageError: see `prune_`; nothing is changed yet.
    """
    weights = prunable_weights(module)
    chosen = {name: weights[name] for name in select(list(weights), config.targets, config.ignore)}
    if not chosen:
        raise CoverageError(
            "choosing modules to prune",
            found=f"none of {len(weights)} that can be pruned",
            expected="at least one",
            fix="narrow prune.ignore",
        )
    pattern = parse_pattern(config.pattern)
    for name, weight in chosen.items():
        if not torch.isfinite(weight).all():
            raise StageError(
                f"pruning {name}",
                found="weights that are NaN or infinite",
                expected="finite weights",
                fix="look at the training that the model comes from, or name the module in prune.ignore",
            )
        features = weight[0].numel()
        if pattern and features % pattern[1]:
            raise StageError(
                f"pruning {name} by pattern {config.pattern}",
                found=f"{features} inputs of each output (weight {list(weight.shape)})",
                expected=f"a multiple of {pattern[1]}",
                fix="name the module in prune.ignore",
            )
        # Exact in each row (wanda) or in the whole (the others, whose masks are checked where the scope is global).
        unit = features if config.method == "wanda" else weight.numel()
        if not pattern and config.scope == "layer" and round(config.sparsity * unit) == unit:
            refuse_empty(name, unit, config)
    return weights, chosen


def refuse_empty(name: str, weights: int, config: PruneConfig) -> None:
    """Raise the error of a layer of which nothing would be left."""
    raise CoverageError(
        f"pruning {name}",
        found=f"all {weights} weights would become zero at sparsity {config.sparsity:g}",
        expected="at least one weight left",
        fix="lower prune.sparsity, set prune.scope to 'layer', or name the module in prune.ignore",
    )


def judge(before: Tensor, after: Tensor, inputs: LayerInputs) -> Judged:
    """Error of a layer's outputs on calibration data: tr(ΔHΔᵀ) ÷ tr(WHWᵀ); weights (outputs, features) float64."""

    def energy(weight: Tensor) -> float:
        return float(((weight @ inputs.second_moment) * weight).sum())

    whole = energy(before)
    return Judged(inputs.rows, energy(before - after) / whole if whole else 0.0)


def outcome(
    weights: dict[str, Tensor], chosen: dict[str, Tensor], masks: Masks, judged: dict[str, Judged] | None = None
) -> Outcome:
    """Set what the masks leave out to zero, and say what was done."""

    def hold() -> None:
        with torch.no_grad():
            for name, mask in masks.items():
                # Not a product: infinity times 0 is NaN, and -1 times 0 is a negative zero.
                chosen[name].masked_fill_(~mask, 0.0)

    hold()
    judged = judged or {}
    changes = [
        TensorChange(
            name=f"{name}.weight",
            before=list(weight.shape),
            after=list(weight.shape),
            zeros=int((weight == 0).sum()),
            calibration_rows=judged[name].rows if name in judged else None,
            output_error=judged[name].error if name in judged else None,
        )
        for name, weight in chosen.items()
        if not masks[name].all()
    ]
    return Outcome(
        eligible_parameters=sum(weight.numel() for weight in weights.values()),
        touched_parameters=sum(chosen[change.name.removesuffix(".weight")].numel() for change in changes),
        tensors=changes,
        hold=hold,
        masks=masks,
    )
