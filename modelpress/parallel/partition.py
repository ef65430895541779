"""Cutting a chain of blocks into contiguous parts so that the largest part is as small as it can be.

The classic linear partition problem, by dynamic programming over prefixes: exact, O(parts · blocks²). What a block
costs is counted (bytes, FLOPs) or measured (seconds) by `modelpress.parallel.costs`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from modelpress.errors import ConfigError

SLACK = 1e-12
"""Relative difference below which two sums of the same costs count as equal: prefix sums round."""


@dataclass(frozen=True)
class Partition:
    """Contiguous parts of a chain: part p has the blocks `bounds[p]` up to and without `bounds[p + 1]`."""

    costs: tuple[float, ...]
    """Of each block, in the unit that was balanced."""
    bounds: tuple[int, ...]
    """Ascending, from 0 to the number of blocks; one more than there are parts."""

    @property
    def parts(self) -> int:
        """How many parts there are."""
        return len(self.bounds) - 1

    @property
    def sums(self) -> tuple[float, ...]:
        """What each part costs."""
        return tuple(math.fsum(self.costs[first:last]) for first, last in itertools.pairwise(self.bounds))

    @property
    def largest(self) -> float:
        """What the dearest part costs: in a pipeline, what all others wait for."""
        return max(self.sums)

    @property
    def imbalance(self) -> float:
        """The dearest part's cost ÷ the mean part's: 1 is perfect; 1 where nothing costs anything."""
        total = math.fsum(self.costs)
        return self.largest * self.parts / total if total else 1.0

    def blocks(self, part: int) -> range:
        """The numbers of a part's blocks."""
        return range(self.bounds[part], self.bounds[part + 1])

    def part_of(self, block: int) -> int:
        """The part that a block is in."""
        return next(part for part in range(self.parts) if block in self.blocks(part))


def balanced(costs: Sequence[float], parts: int) -> Partition:
    """The partition whose dearest part is cheapest; among those, one with the least sum of squares, so that the
    other parts are even as well. No part is empty.

    Args:
        costs: of each block, from 0 up, finite.
        parts: how many.

    Raises:
        ConfigError: fewer than one part, more parts than blocks, or a cost that is negative, NaN or infinite.
    """
    _check(costs, parts)
    prefix = [0.0]
    for cost in costs:
        prefix.append(prefix[-1] + cost)
    least = _least_largest(prefix, parts)
    return Partition(tuple(costs), _least_squares(prefix, parts, least * (1 + SLACK)))


def equal_counts(costs: Sequence[float], parts: int) -> Partition:
    """The naive partition: as equal numbers of blocks as there can be, whatever they cost.

    Raises:
        ConfigError: see `balanced`.
    """
    _check(costs, parts)
    return Partition(tuple(costs), tuple(round(len(costs) * part / parts) for part in range(parts + 1)))


def bubble(parts: int, microbatches: int) -> float:
    """Share of a pipeline's time in which a part waits: (p − 1) ÷ (m + p − 1), for equal parts and free transport, by
    GPipe (Huang et al. 2019, arXiv:1811.06965) and by 1F1B alike.

    Raises:
        ConfigError: fewer than one of either.
    """
    if parts < 1 or microbatches < 1:
        found = f"{parts} parts, {microbatches} microbatches"
        raise ConfigError("computing a pipeline's bubble", found=found, expected="at least one of each")
    return (parts - 1) / (microbatches + parts - 1)


def _check(costs: Sequence[float], parts: int) -> None:
    doing = f"splitting {len(costs)} blocks into {parts} parts"
    if not 1 <= parts <= len(costs):
        raise ConfigError(
            doing,
            found=f"{parts} parts for {len(costs)} blocks",
            expected="at least one part, and at least one block in each",
            fix="ask for fewer parts; a block is never cut (tensor parallelism does that)",
        )
    for number, cost in enumerate(costs):
        if not (math.isfinite(cost) and cost >= 0):
            raise ConfigError(doing, found=f"block {number} costs {cost}", expected="finite costs from 0 up")


def _least_largest(prefix: Sequence[float], parts: int) -> float:
    """The least possible cost of the dearest part."""
    blocks = len(prefix) - 1
    best = [math.inf if end == 0 else prefix[end] for end in range(blocks + 1)]  # in one part
    for part in range(2, parts + 1):
        best = [
            min((max(best[start], prefix[end] - prefix[start]) for start in range(part - 1, end)), default=math.inf)
            for end in range(blocks + 1)
        ]
    return best[blocks]


def _least_squares(prefix: Sequence[float], parts: int, most: float) -> tuple[int, ...]:
    """Bounds of the partition with the least sum of squares among those without a part above `most`."""
    blocks = len(prefix) - 1
    best = [0.0] + [math.inf] * blocks
    starts: list[list[int]] = []
    for _ in range(parts):
        after, chosen = [math.inf] * (blocks + 1), [0] * (blocks + 1)
        for end in range(1, blocks + 1):
            for start in range(end):
                cost = prefix[end] - prefix[start]
                if cost <= most and best[start] + cost * cost < after[end]:
                    after[end], chosen[end] = best[start] + cost * cost, start
        best = after
        starts.append(chosen)
    bounds = [blocks]
    for chosen in reversed(starts):
        bounds.append(chosen[bounds[-1]])
    return tuple(reversed(bounds))
