"""Magnitude pruning: the smallest weights become zero (Han et al. 2015, arXiv:1506.02626)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modelpress.config import PruneConfig
from modelpress.progress import Progress
from modelpress.prune.masks import Masks, least, least_in_groups, parse_pattern, without_gone
from modelpress.prune.outcome import Outcome
from modelpress.prune.zeros import choose, outcome, refuse_empty
from modelpress.workload import Workload


def prune_magnitude_(
    module: nn.Module,
    workload: Workload,  # noqa: ARG001
    config: PruneConfig,
    progress: Progress,  # noqa: ARG001
    held: Masks,
) -> Outcome:
    """Set the smallest weights of linear and convolution layers to zero, in place.

    With scope `layer` each tensor of n weights gets exactly round(sparsity · n) zeros, with scope `global` all of them
    together do; with a pattern, each group has its own. Ties go to the weight that stands first, in the order of the
    module's names.

    Raises:
        ConfigError, CoverageError, StageError: see `prune_`.
    """
    weights, chosen = choose(module, config)
    scores = {name: without_gone(weight.detach().abs().flatten(1), held.get(name)) for name, weight in chosen.items()}
    flat = global_masks(scores, config.sparsity) if config.scope == "global" else _layer_masks(scores, config)
    masks = {name: mask.view_as(chosen[name]) for name, mask in flat.items()}
    for name, mask in masks.items():
        if not mask.any():
            refuse_empty(name, mask.numel(), config)
    return outcome(weights, chosen, masks)


def _layer_masks(scores: dict[str, Tensor], config: PruneConfig) -> Masks:
    """Masks with exactly round(sparsity · n) False in each, or with the pattern."""
    pattern = parse_pattern(config.pattern)
    if pattern:
        return {name: least_in_groups(score, *pattern) for name, score in scores.items()}
    return {name: least(score, round(config.sparsity * score.numel())) for name, score in scores.items()}


def global_masks(scores: dict[str, Tensor], sparsity: float) -> Masks:
    """Masks with exactly round(sparsity · n) False over all weights together."""
    if not scores:
        return {}
    joined = torch.cat([score.flatten() for score in scores.values()])
    parts = torch.split(least(joined, round(sparsity * len(joined))), [score.numel() for score in scores.values()])
    return {name: part.view_as(score) for (name, score), part in zip(scores.items(), parts, strict=True)}
