"""Magnitude pruning: the smallest weights become zero (Han et al. 2015, arXiv:1506.02626)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modelpress.config import PruneConfig
from modelpress.progress import Progress
from modelpress.prune.masks import Masks, least, least_in_groups, parse_pattern, without_gone
from modelpress.prune.outcome import Outcome
from modelpress.prune.zeros import Zeros, refuse_empty
from modelpress.residence import IN_MEMORY, Residence, visit_
from modelpress.workload import Workload


def prune_magnitude_(
    module: nn.Module,
    workload: Workload,  # noqa: ARG001
    config: PruneConfig,
    progress: Progress,
    held: Masks,
    residence: Residence = IN_MEMORY,
) -> Outcome:
    """Set the smallest weights of linear and convolution layers to zero, in place.

    With scope `layer` each tensor of n weights gets exactly round(sparsity · n) zeros, with scope `global` all of them
    together do; with a pattern, each group has its own. Ties go to the weight that stands first, in the order of the
    module's names.

    Raises:
        ConfigError, CoverageError, StageError: see `prune_`.
    """
    zeros = Zeros(module, config, residence)

    def score(name: str, weight: Tensor) -> Tensor:
        return without_gone(weight.detach().abs().flatten(1), held.get(name))

    def visit(name: str, layer: nn.Module) -> None:
        weight = torch.as_tensor(layer.weight)
        zeros.put_(name, _layer_mask(score(name, weight), config).view_as(weight))

    if config.scope == "global":
        masks = global_masks({name: score(name, weight) for name, weight in zeros.chosen.items()}, config.sparsity)
        for name, mask in masks.items():
            if not mask.any():
                refuse_empty(name, mask.numel(), config)
        for name, mask in masks.items():
            zeros.put_(name, mask.view_as(zeros.chosen[name]))
    else:
        visit_(module, list(zeros.chosen), visit, progress=progress, residence=residence)
    return zeros.outcome()


def _layer_mask(score: Tensor, config: PruneConfig) -> Tensor:
    """Mask with exactly round(sparsity · n) False, or with the pattern."""
    pattern = parse_pattern(config.pattern)
    return least_in_groups(score, *pattern) if pattern else least(score, round(config.sparsity * score.numel()))


def global_masks(scores: dict[str, Tensor], sparsity: float) -> Masks:
    """Masks with exactly round(sparsity · n) False over all weights together."""
    if not scores:
        return {}
    joined = torch.cat([score.flatten() for score in scores.values()])
    parts = torch.split(least(joined, round(sparsity * len(joined))), [score.numel() for score in scores.values()])
    return {name: part.view_as(score) for (name, score), part in zip(scores.items(), parts, strict=True)}
