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


class Option(NamedTuple):
    """What one choice for one tensor costs."""

    bytes: int
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
    sizes: tuple[int, ...]
    """Bytes of each solution; they fall."""

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
            multiplier = (one.bytes - other.bytes) / (other.error - one.error)
            edges.append((-multiplier, tensor, place, before, after))
    edges.sort()
    start = tuple(vertices[0] for vertices in hulls)
    errors = [sum(options[first].error for options, first in zip(tensors, start, strict=True))]
    sizes = [sum(options[first].bytes for options, first in zip(tensors, start, strict=True))]
    for _, tensor, _, before, after in edges:
        errors.append(errors[-1] + tensors[tensor][after].error - tensors[tensor][before].error)
        sizes.append(sizes[-1] + tensors[tensor][after].bytes - tensors[tensor][before].bytes)
    return Chain(start, tuple((tensor, after) for _, tensor, _, _, after in edges), tuple(errors), tuple(sizes))


def hull(options: Sequence[Option]) -> list[int]:
    """Places of the vertices of the lower convex hull, by rising error and falling bytes."""
    order = sorted(range(len(options)), key=lambda place: (options[place].error, options[place].bytes, place))
    vertices: list[int] = []
    for place in order:
        if vertices and options[place].bytes >= options[vertices[-1]].bytes:
            continue
        while len(vertices) > 1 and _saving(options, vertices[-2], vertices[-1]) <= _saving(
            options, vertices[-2], place
        ):
            vertices.pop()
        vertices.append(place)
    return vertices


def _saving(options: Sequence[Option], before: int, after: int) -> float:
    """Bytes saved per error accepted."""
    return (options[before].bytes - options[after].bytes) / (options[after].error - options[before].error)
