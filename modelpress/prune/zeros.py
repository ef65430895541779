"""What the methods that set weights to zero share: which weights, what is refused before any changes, the report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modelpress.config import PruneConfig
from modelpress.errors import CoverageError, StageError
from modelpress.layerwise import LayerInputs, walk_
from modelpress.moments import flat_weight, output_error
from modelpress.progress import Progress
from modelpress.prune.masks import Masks, parse_pattern
from modelpress.prune.outcome import Outcome
from modelpress.prune.select import select
from modelpress.reports import TensorChange
from modelpress.residence import Residence
from modelpress.workload import Workload

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
        if not weight.is_meta and not torch.isfinite(weight).all():  # one on disk is looked at when it is read
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


class Zeros:
    """Weights of a module that become zero, layer by layer, and the rows of the report.

    Args:
        module: the module; its weights are changed in place.
        config: which of them; see `choose`.
        residence: masks of all layers are kept where all weights may be in memory.
    """

    def __init__(self, module: nn.Module, config: PruneConfig, residence: Residence) -> None:
        self.weights, self.chosen = choose(module, config)
        self.masks: Masks = {}
        self._keep = residence.at_once
        self._rows: dict[str, TensorChange] = {}

    def put_(self, name: str, mask: Tensor, judged: Judged | None = None) -> None:
        """Set what a layer's mask leaves out to zero; the mask has the shape of its weight."""
        weight = self.chosen[name]
        with torch.no_grad():
            _mask_(weight, mask)
        if self._keep:
            self.masks[name] = mask
        if not mask.all():
            self._rows[name] = TensorChange(
                name=f"{name}.weight",
                before=list(weight.shape),
                after=list(weight.shape),
                zeros=weight.numel() - int(weight.count_nonzero()),
                calibration_rows=judged.rows if judged else None,
                output_error=judged.error if judged else None,
            )

    def outcome(self) -> Outcome:
        """What was done."""

        def hold() -> None:
            with torch.no_grad():
                for name, mask in self.masks.items():
                    _mask_(self.chosen[name], mask)

        touched = [name for name in self.chosen if name in self._rows]
        return Outcome(
            eligible_parameters=sum(weight.numel() for weight in self.weights.values()),
            touched_parameters=sum(self.chosen[name].numel() for name in touched),
            tensors=[self._rows[name] for name in touched],
            hold=hold,
            masks=self.masks,
        )


def _mask_(weight: Tensor, mask: Tensor) -> None:
    # Not a product: infinity times 0 is NaN, and -1 times 0 is a negative zero.
    weight.masked_fill_(~mask, 0.0)


Method = Callable[[Tensor, LayerInputs, Tensor | None], tuple[Tensor, Tensor]]
"""From a layer's weight, (outputs, features), its inputs, and the mask of an earlier step of the same shape or None, to
the weight as it is to be, or the given one where only zeros come in, and its mask. The given one is left as it is."""


def prune_by_inputs_(
    module: nn.Module,
    workload: Workload,
    config: PruneConfig,
    progress: Progress,
    held: Masks,
    residence: Residence,
    method: Method,
    dtype: torch.dtype = torch.float64,
) -> Outcome:
    """Run a method that judges weights by their layer's inputs on each chosen layer, in place, block by block.

    `dtype` is that of the second moments.

    Raises:
        ConfigError, CoverageError, StageError: see `prune_`.
    """
    zeros = Zeros(module, config, residence)

    def visit(inputs: LayerInputs) -> None:
        weight = torch.as_tensor(inputs.layer.weight)
        before = flat_weight(inputs.layer)
        known = held.get(inputs.name)
        after, mask = method(before, inputs, None if known is None else known.view_as(before))
        judged = Judged(inputs.rows, output_error(before, after, inputs.second_moment, mask))
        if after is not before:
            weight.copy_(after.view_as(weight))
        zeros.put_(inputs.name, mask.view_as(weight), judged)

    batches = list(workload.batches("calibration", BATCH_SIZE))
    walk_(
        *(module, list(zeros.chosen), batches, visit),
        min_rows=MIN_ROWS,
        progress=progress,
        residence=residence,
        dtype=dtype,
    )
    return zeros.outcome()
