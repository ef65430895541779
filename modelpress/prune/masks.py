"""Which weights become zero, from how much each is worth: exact counts, ties to the one that stands first.

Scores are (outputs, features) or flat, at least 0; the least go. A mask is True where a weight stays. Weights that an
earlier step has removed (`held` False) go first, so that masks only grow.
"""

from __future__ import annotations

import torch
from torch import Tensor

Masks = dict[str, Tensor]
"""By layer, in the shape of its weight, True where a weight stays."""

GONE = -1.0
"""Score of a weight that is removed already."""


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """(zeros, of how many neighbours) of "2:4"; None for "unstructured"."""
    zeros, _, size = pattern.partition(":")
    return (int(zeros), int(size)) if size else None


def least(scores: Tensor, count: int) -> Tensor:
    """Mask without the `count` least scores."""
    mask = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[torch.argsort(scores.flatten(), stable=True)[:count]] = False
    return mask.view_as(scores)


def least_in_rows(scores: Tensor, count: int) -> Tensor:
    """Mask without the `count` least scores of each row."""
    mask = torch.ones_like(scores, dtype=torch.bool)
    return mask.scatter_(1, torch.argsort(scores, dim=1, stable=True)[:, :count], False)


def least_in_groups(scores: Tensor, zeros: int, size: int) -> Tensor:
    """Mask without the `zeros` least scores of each `size` neighbours in a row, which `size` must divide."""
    return least_in_rows(scores.reshape(-1, size), zeros).view_as(scores)


def without_gone(scores: Tensor, held: Tensor | None) -> Tensor:
    """Scores with `GONE` where an earlier step has removed the weight."""
    return scores if held is None else scores.masked_fill(~held.view_as(scores), GONE)
