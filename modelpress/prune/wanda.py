"""Wanda: the weights that move the outputs least become zero (Sun et al. 2023, arXiv:2306.11695)."""

from __future__ import annotations

from torch import Tensor, nn

from modelpress.config import PruneConfig
from modelpress.layerwise import LayerInputs
from modelpress.progress import Progress
from modelpress.prune.masks import Masks, least_in_groups, least_in_rows, parse_pattern, without_gone
from modelpress.prune.outcome import Outcome
from modelpress.prune.zeros import prune_by_inputs_
from modelpress.residence import IN_MEMORY, Residence
from modelpress.workload import Workload

SILENT = 1e-12
"""Norm of an input that is always zero, as a share of the largest: its weights go first, the smallest of them first."""


def prune_wanda_(
    module: nn.Module,
    workload: Workload,
    config: PruneConfig,
    progress: Progress,
    held: Masks,
    residence: Residence = IN_MEMORY,
) -> Outcome:
    """Set the weights of least |W| · ‖X‖₂ in each row to zero, in place, block by block; no weight is updated.

    Each row of n weights (all that one output reads) gets exactly round(sparsity · n) zeros, or the pattern.

    Raises:
        ConfigError, CoverageError, StageError: see `prune_`.
    """
    pattern = parse_pattern(config.pattern)

    def method(weight: Tensor, inputs: LayerInputs, known: Tensor | None) -> tuple[Tensor, Tensor]:
        scores = without_gone(scores_of(weight, inputs.second_moment), known)
        mask = (
            least_in_groups(scores, *pattern)
            if pattern
            else least_in_rows(scores, round(config.sparsity * len(weight.T)))
        )
        return weight.masked_fill(~mask, 0.0), mask

    return prune_by_inputs_(module, workload, config, progress, held, residence, method)


def scores_of(weight: Tensor, second_moment: Tensor) -> Tensor:
    """|W| · ‖X‖₂, (outputs, features) float64."""
    norms = second_moment.diagonal().clamp(min=0).sqrt()
    norms = norms.clamp(min=SILENT * (float(norms.max()) or 1.0))
    return weight.abs() * norms
