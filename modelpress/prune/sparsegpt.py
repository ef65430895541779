"""SparseGPT: weights become zero, and the others of their rows make up for it.

Frantar & Alistarh 2023, arXiv:2301.00774. The optimal brain surgeon, one column after the other: removing w_j changes
the outputs by w_j² ÷ [H⁻¹]_jj, and the columns to the right take over w_j · H⁻¹[j, j:] ÷ [H⁻¹]_jj, where H⁻¹ is that of
the columns from j on: row j of the Cholesky factor of the whole inverse, scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from modelpress.config import PruneConfig
from modelpress.errors import StageError
from modelpress.layerwise import LayerInputs
from modelpress.moments import InverseFactor
from modelpress.progress import Progress
from modelpress.prune.masks import Masks, least, least_in_groups, parse_pattern, without_gone
from modelpress.prune.outcome import Outcome
from modelpress.prune.zeros import prune_by_inputs_
from modelpress.residence import IN_MEMORY, Residence
from modelpress.workload import Workload

BLOCK = 128
"""Columns among which the weights to be removed are chosen at once (the paper's B_s, and its B)."""


def prune_sparsegpt_(
    module: nn.Module,
    workload: Workload,
    config: PruneConfig,
    progress: Progress,
    held: Masks,
    residence: Residence = IN_MEMORY,
) -> Outcome:
    """Set weights to zero and update the others of their rows, in place, block by block.

    Each matrix of n weights gets exactly round(sparsity · n) zeros, spread evenly over its blocks of `BLOCK` columns
    (each gets its share, rounded up or down), freely over the rows; or the pattern.

    Raises:
        ConfigError, CoverageError, StageError: see `prune_`; a second moment that is singular with `config.damping`.
    """

    def method(weight: Tensor, inputs: LayerInputs, known: Tensor | None) -> tuple[Tensor, Tensor]:
        factor = InverseFactor(inputs.second_moment, config.damping, inputs.name)
        after, mask = sparsify(weight, factor.rows, config, known)
        if not torch.isfinite(after).all():
            raise StageError(
                f"pruning {inputs.name}", found="updated weights that are NaN or infinite", fix="raise prune.damping"
            )
        return after, mask

    return prune_by_inputs_(module, workload, config, progress, held, residence, method)


def sparsify(
    weight: Tensor, factor: Callable[[int, int], Tensor], config: PruneConfig, held: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Updated weight, float64, and its mask (the paper's algorithm 1).

    Args:
        weight: (outputs, features); left as it is.
        factor: gives U[start:end, start:]; see `InverseFactor.rows`.
        config: sparsity and pattern.
        held: mask of an earlier step.
    """
    weight, pattern = weight.to(torch.float64, copy=True), parse_pattern(config.pattern)
    mask = torch.ones_like(weight, dtype=torch.bool)
    counts = _counts(weight, config.sparsity, held)
    for start in range(0, weight.shape[1], BLOCK):
        columns = slice(start, min(start + BLOCK, weight.shape[1]))
        upper = factor(columns.start, columns.stop)
        width = len(upper)
        block, local, keep = weight[:, columns], upper[:, :width], mask[:, columns]
        gone = None if held is None else held[:, columns]
        if not pattern:
            keep.copy_(least(_scores(block, local, gone), next(counts)))
        errors = torch.zeros_like(block)
        for column in range(block.shape[1]):
            if pattern and column % pattern[1] == 0:
                group = slice(column, column + pattern[1])
                scores = _scores(block[:, group], local[group, group], None if gone is None else gone[:, group])
                keep[:, group] = least_in_groups(scores, *pattern)
            errors[:, column] = block[:, column].masked_fill(keep[:, column], 0.0) / local[column, column]
            block[:, column:] -= errors[:, column, None] * local[column, column:]
        block.masked_fill_(~keep, 0.0)
        weight[:, columns.stop :].addmm_(errors, upper[:, width:], alpha=-1.0)
    return weight, mask


def _scores(weight: Tensor, factor: Tensor, held: Tensor | None) -> Tensor:
    return without_gone((weight / factor.diagonal()).square(), held)


def _counts(weight: Tensor, sparsity: float, held: Tensor | None) -> Iterator[int]:
    """Weights to remove in each block of columns: those removed already, and its share of the others to be."""
    free = torch.full((weight.shape[1],), len(weight)) if held is None else held.sum(dim=0)
    ends = [min(start + BLOCK, weight.shape[1]) for start in range(0, weight.shape[1], BLOCK)]
    gone = weight.numel() - int(free.sum())
    more = round(sparsity * weight.numel()) - gone
    before = 0
    for start, end in zip([0, *ends], ends, strict=False):
        upto = round(more * int(free[:end].sum()) / max(1, int(free.sum())))
        yield len(weight) * (end - start) - int(free[start:end].sum()) + upto - before
        before = upto
