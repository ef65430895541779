"""Which weights become zero, from how much each is worth: exact counts, ties to the one that stands first.

Scores are (outputs, features) or flat, at least 0; the least go. A mask is True where a weight stays. Weights that an
earlier step has removed (`held` False) go first, so that masks only grow.
"""

from __future__ import annotations

import torch
from torch import Tensor

Masks = dict[str, Tensor]
"""By layer, in the shape of its weight, True where a weight stays."""

TIES = 2**18
"""Scores among which equal ones are looked for at a time."""

GONE = -1.0
"""Score of a weight that is removed already."""


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """(zeros, of how many neighbours) of "2:4"; None for "unstructured"."""
    zeros, _, size = pattern.partition(":")
    return (int(zeros), int(size)) if size else None


def least(scores: Tensor, count: int) -> Tensor:
    """Mask without the `count` least scores."""
    if not count:
        return torch.ones_like(scores, dtype=torch.bool)
    flat = scores.detach().flatten()
    values = flat.to("cpu", torch.float64 if flat.dtype == torch.float64 else torch.float32, copy=True)
    values.numpy().partition(count - 1)  # sorting takes six times the memory
    bound = float(values[count - 1])
    del values
    mask = flat > bound
    ties = count - int((flat < bound).count_nonzero())  # of the equal ones at the bound, those that stand first go
    for start in range(0, len(flat), TIES):
        equal = (flat[start : start + TIES] == bound).nonzero().flatten()
        mask[start + equal[ties:]] = True
        ties = max(0, ties - len(equal))
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
