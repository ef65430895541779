"""Bit allocation by Lagrange multipliers (Shoham & Gersho 1988, IEEE Trans. ASSP 36(9)).

Each tensor has options of so many bytes and so much error; bytes and errors add up. For a multiplier λ ≥ 0 every tensor
by itself takes the option of least bytes + λ · error, which lies on the lower convex hull of its options. As λ falls,
one tensor after another moves one vertex along its hull: all solutions form one chain, which is found at once by
sorting the hulls' edges. None of them can be had in fewer bytes at no more error.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

STEPS = 4096
"""Of an error budget, as the knapsack counts it."""


class Option(NamedTuple):
    """What one choice for one tensor costs: bytes, or seconds."""

    cost: float
    error: float


@dataclass(frozen=True)
class Chain:
    """All Lagrangian solutions, from the least error to the fewest bytes; solution k + 1 changes one tensor of k."""

    start: tuple[int, ...]
    """Of each tensor, the option of the first solution."""
    moves: tuple[tuple[int, int], ...]
    """The tensor that moves, and its new option."""
    errors: tuple[float, ...]
    """Of each solution; they rise."""
    costs: tuple[float, ...]
    """Cost of each solution; they fall."""

    def choice(self, position: int) -> tuple[int, ...]:
        """Option of each tensor in the solution at `position`."""
        chosen = list(self.start)
        for tensor, option in self.moves[:position]:
            chosen[tensor] = option
        return tuple(chosen)

    def solve(self, budget: float) -> int:
        """Position of the solution of fewest bytes whose error is within `budget`; 0 where none is."""
        return max(bisect.bisect_right(self.errors, budget) - 1, 0)


def chain(tensors: Sequence[Sequence[Option]]) -> Chain:
    """The solutions for tensors that have one option or more each; errors are finite and not below 0."""
    hulls = [hull(options) for options in tensors]
    edges = []
    for tensor, vertices in enumerate(hulls):
        for place, (before, after) in enumerate(itertools.pairwise(vertices)):
            one, other = tensors[tensor][before], tensors[tensor][after]
            multiplier = (one.cost - other.cost) / (other.error - one.error)
            edges.append((-multiplier, tensor, place, before, after))
    edges.sort()
    start = tuple(vertices[0] for vertices in hulls)
    errors = [sum(options[first].error for options, first in zip(tensors, start, strict=True))]
    costs = [sum(options[first].cost for options, first in zip(tensors, start, strict=True))]
    for _, tensor, _, before, after in edges:
        errors.append(errors[-1] + tensors[tensor][after].error - tensors[tensor][before].error)
        costs.append(costs[-1] + tensors[tensor][after].cost - tensors[tensor][before].cost)
    return Chain(start, tuple((tensor, after) for _, tensor, _, _, after in edges), tuple(errors), tuple(costs))


def hull(options: Sequence[Option]) -> list[int]:
    """Places of the vertices of the lower convex hull, by rising error and falling bytes."""
    order = sorted(range(len(options)), key=lambda place: (options[place].error, options[place].cost, place))
    vertices: list[int] = []
    for place in order:
        if vertices and options[place].cost >= options[vertices[-1]].cost:
            continue
        while len(vertices) > 1 and _saving(options, vertices[-2], vertices[-1]) <= _saving(
            options, vertices[-2], place
        ):
            vertices.pop()
        vertices.append(place)
    return vertices


def knapsack(tensors: Sequence[Sequence[Option]], budget: float) -> tuple[int, ...] | None:
    """The choice of fewest bytes within a budget of error, by dynamic programming; None where none is within it.

    It is exact but for the errors, each of which is rounded up to a multiple of the budget ÷ `STEPS`: so it finds what
    lies between two solutions of the chain, where a multiplier finds nothing.
    """
    best = np.zeros(STEPS + 1)  # fewest bytes of the tensors so far, by steps of the budget that are taken
    taken: list[np.ndarray] = []
    for options in tensors:
        costs = np.full((len(options), STEPS + 1), np.inf)
        for place, option in enumerate(options):
            steps = int(np.ceil(option.error / budget * STEPS)) if option.error else 0
            if steps <= STEPS:
                costs[place, steps:] = best[: STEPS + 1 - steps] + option.cost
        taken.append(costs.argmin(axis=0))
        best = costs.min(axis=0)
    if not np.isfinite(best[STEPS]):
        return None
    left, choice = STEPS, []
    for options, places in zip(reversed(tensors), reversed(taken), strict=True):
        place = int(places[left])
        choice.append(place)
        error = options[place].error
        left -= int(np.ceil(error / budget * STEPS)) if error else 0
    return tuple(reversed(choice))


def total(tensors: Sequence[Sequence[Option]], choice: Sequence[int]) -> Option:
    """What a choice takes in all."""
    taken = [options[place] for options, place in zip(tensors, choice, strict=True)]
    return Option(sum(one.cost for one in taken), sum(one.error for one in taken))


def _saving(options: Sequence[Option], before: int, after: int) -> float:
    """Bytes saved per error accepted."""
    return (options[before].cost - options[after].cost) / (options[after].error - options[before].error)
