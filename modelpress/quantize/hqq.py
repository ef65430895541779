"""HQQ: real zero points that make the weights' error sparse; needs no data.

Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models"
(https://mobiusml.github.io/hqq_blog/): minimises Σ |w − ŵ|^p, p < 1, which lets single outliers err so that the others
need not. An auxiliary error takes the outliers' part by a generalised soft threshold; then the zero point has a closed
form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modelpress.quantize.groups import Grid, GroupedWeight, encode, in_groups, parameters

NORM = 0.7
"""p of the norm."""

_ITERATIONS = 20
_BETA, _GROWTH = 10.0, 1.01
"""The threshold falls as β grows; both as in the authors' code."""


def hqq(weight: Tensor, grid: Grid) -> GroupedWeight:
    """Quantize a weight with real zero points; in Σ |w − ŵ|^p no group is worse than rounded to the nearest.

    Zero is no value of the grid: pruned weights come back small, and not as zeros.

    Args:
        weight: (out, in) float.
        grid: bits and group size; `symmetric` must be False.

    Raises:
        StageError: the weight is no matrix, or is not finite.
    """
    groups = in_groups(weight, grid.group_size)
    best = parameters(groups, grid)
    least = _norm(groups, *best, grid)
    low = groups.amin(-1)
    scale = (groups.amax(-1) - low) / grid.levels
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)
    zero_point = -low / scale
    beta = _BETA
    for _ in range(_ITERATIONS):
        error = _norm(groups, scale, zero_point, grid)
        better = error < least
        least = torch.where(better, error, least)
        best = (torch.where(better, scale, best[0]), torch.where(better, zero_point, best[1]))
        codes = encode(groups, scale.unsqueeze(-1), zero_point.unsqueeze(-1), grid)
        outliers = _shrink(groups - (codes - zero_point.unsqueeze(-1)) * scale.unsqueeze(-1), beta)
        zero_point = (codes - (groups - outliers) / scale.unsqueeze(-1)).mean(-1)
        beta *= _GROWTH
    codes = encode(groups, best[0].unsqueeze(-1), best[1].unsqueeze(-1), grid)
    return GroupedWeight(codes.flatten(1)[:, : weight.shape[1]].to(torch.uint8), best[0], best[1], grid)


def norm(error: Tensor) -> Tensor:
    """Σ |error|^p over the last axis: what HQQ minimises."""
    return error.abs().pow(NORM).sum(-1)


def _norm(groups: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    scale, zero_point = scale.unsqueeze(-1), zero_point.unsqueeze(-1)
    return norm((encode(groups, scale, zero_point, grid) - zero_point) * scale - groups)


def _shrink(error: Tensor, beta: float) -> Tensor:
    """Generalised soft threshold of the p-norm: sign(e) · max(0, |e| − |e|^(p−1) / β)."""
    size = error.abs()
    return error.sign() * (size - size.clamp(min=1e-8).pow(NORM - 1.0) / beta).clamp(min=0.0)
