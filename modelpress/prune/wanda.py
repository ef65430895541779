"""Wanda: the weights that move the outputs least become zero (Sun et al. 2023, arXiv:2306.11695)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modelpress.config import PruneConfig
from modelpress.layerwise import LayerInputs
from modelpress.progress import Progress
from modelpress.prune.masks import Masks, least_in_groups, least_in_rows, parse_pattern, without_gone
from modelpress.prune.outcome import Outcome
from modelpress.prune.zeros import prune_by_inputs_
from modelpress.residence import IN_MEMORY, Residence
from modelpress.workload import Workload

SCORED = 2**19
"""Scores at a time: sorting takes several times their memory."""

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
        norms, mask = norms_of(inputs.second_moment), torch.empty_like(weight, dtype=torch.bool)
        rows = max(1, SCORED // weight.shape[1])
        for start in range(0, len(weight), rows):
            part = slice(start, start + rows)
            scores = without_gone(weight[part].double().abs() * norms, None if known is None else known[part])
            mask[part] = (
                least_in_groups(scores, *pattern)
                if pattern
                else least_in_rows(scores, round(config.sparsity * scores.shape[1]))
            )
        return weight, mask

    # Nothing is inverted, and the norms are sums of squares: float32 is exact enough for them, and half the size.
    return prune_by_inputs_(module, workload, config, progress, held, residence, method, torch.float32)


def norms_of(second_moment: Tensor) -> Tensor:
    """‖X‖₂ of each input, (features,) float64."""
    norms = second_moment.diagonal().double().clamp(min=0).sqrt()
    return norms.clamp(min=SILENT * (float(norms.max()) or 1.0))
