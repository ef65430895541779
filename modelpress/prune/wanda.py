"""Wanda: the weights that move the outputs least become zero (Sun et al. 2023, arXiv:2306.11695)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modelpress.config import PruneConfig
from modelpress.layerwise import LayerInputs, walk_
from modelpress.moments import flat_weight
from modelpress.progress import Progress
from modelpress.prune.masks import Masks, least_in_groups, least_in_rows, parse_pattern, without_gone
from modelpress.prune.outcome import Outcome
from modelpress.prune.zeros import BATCH_SIZE, MIN_ROWS, Judged, choose, judge, outcome
from modelpress.workload import Workload

SILENT = 1e-12
"""Norm of an input that is always zero, as a share of the largest: its weights go first, the smallest of them first."""


def prune_wanda_(
    module: nn.Module, workload: Workload, config: PruneConfig, progress: Progress, held: Masks
) -> Outcome:
    """Set the weights of least |W| · ‖X‖₂ in each row to zero, in place, block by block; no weight is updated.

    Each row of n weights (all that one output reads) gets exactly round(sparsity · n) zeros, or the pattern.

    Raises:
        ConfigError, CoverageError, StageError: see `prune_`.
    """
    weights, chosen = choose(module, config)
    masks: Masks = {}
    judged: dict[str, Judged] = {}

    def visit(inputs: LayerInputs) -> None:
        weight = torch.as_tensor(inputs.layer.weight)
        flat = flat_weight(inputs.layer).double()
        scores = without_gone(scores_of(flat, inputs.second_moment), held.get(inputs.name))
        pattern = parse_pattern(config.pattern)
        mask = (
            least_in_groups(scores, *pattern)
            if pattern
            else least_in_rows(scores, round(config.sparsity * len(flat.T)))
        )
        judged[inputs.name] = judge(flat, flat.masked_fill(~mask, 0.0), inputs)
        masks[inputs.name] = mask.view_as(weight)
        weight.masked_fill_(~masks[inputs.name], 0.0)

    batches = list(workload.batches("calibration", BATCH_SIZE))
    walk_(module, list(chosen), batches, visit, min_rows=MIN_ROWS, progress=progress)
    return outcome(weights, chosen, masks, judged)


def scores_of(weight: Tensor, second_moment: Tensor) -> Tensor:
    """|W| · ‖X‖₂, (outputs, features) float64."""
    norms = second_moment.diagonal().clamp(min=0).sqrt()
    norms = norms.clamp(min=SILENT * (float(norms.max()) or 1.0))
    return weight.abs() * norms
